"""What the other KMEs see: the methods of ``peering``, on a listener of its own."""

from __future__ import annotations

import time

import structlog
from aiohttp import web

from keysource.etsi014.messages import to_json
from keysource.kme import crashpoints, peering
from keysource.kme.audit import Audit
from keysource.kme.auth import Certificate, certificate_of, common_name, uri_names
from keysource.kme.logs import hashed
from keysource.kme.records import BadDeposit, Reservation, Terms
from keysource.kme.sae_api import Handler, Refused, bounded_errors
from keysource.kme.site import Site

_LONGEST = 200  # of a name that a caller made up, where it is written down
log = structlog.get_logger("kme")


class PeerApi:
    """Serves the KMEs of the configuration."""

    def __init__(self, site: Site, audit: Audit) -> None:
        self._site = site
        self._audit = audit

    def application(self) -> web.Application:
        application = web.Application(client_max_size=peering.MAX_BODY, middlewares=[self._middleware])
        application.router.add_post(peering.RESERVE, self._reserve)
        application.router.add_post(peering.DEPOSIT, self._deposit)
        application.router.add_post(peering.WITHDRAW, self._withdraw)
        return application

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        return await bounded_errors(handler, self._site.told)(request)

    async def _reserve(self, request: web.Request) -> web.Response:
        peer = self._caller(request)
        crashpoints.at("reserve.asked")
        try:
            asked = peering.request_untrusted(peering.ReserveRequest, await request.read())
            offers = asked.offers()
        except ValueError as error:
            raise Refused(400, str(error)) from None
        terms = asked.terms()
        stock = self._check(peer, terms, asked.link)
        answer = await self._site.reserve(stock, terms, offers)
        missing = set(answer.missing)
        held = [offer.key_id for offer in offers if not missing & {unit.key_id for unit in offer.units}]
        return await self._reserved(request, peer, terms, held, answer)

    async def _deposit(self, request: web.Request) -> web.Response:
        peer = self._caller(request)
        try:
            asked = peering.request_untrusted(peering.DepositRequest, await request.read())
            deposits = asked.deposits()
        except ValueError as error:
            raise Refused(400, str(error)) from None
        terms = asked.terms()
        stock = self._check(peer, terms, asked.link)
        try:
            answer = await self._site.deposit(stock, terms, deposits)
        except BadDeposit as error:
            self._site.told.error("a deposit was refused", peer, time.monotonic(), peer=peer, reason=str(error))
            raise Refused(409, str(error)) from None
        held = [] if answer.missing else [deposit.key_id for deposit in deposits]
        return await self._reserved(request, peer, terms, held, answer)

    async def _reserved(
        self, request: web.Request, peer: str, terms: Terms, held: list[str], answer: Reservation
    ) -> web.Response:
        if held:
            facts = {"peer": peer, "master": terms.master, "slaves": list(terms.slaves), "size": terms.size}
            self._audit.write("reserved", held, **facts, origin=answer.origin, hops=answer.hops)
        hashes = [hashed(key_id) for key_id in held]
        log.info(
            "reserved",
            peer=peer,
            master=terms.master,
            slaves=list(terms.slaves),
            keys=hashes,
            missing=len(answer.missing),
        )
        body = peering.ReserveAnswer(
            missing=answer.missing, first_block=answer.first_block, next_block=answer.next_block
        )
        response = web.Response(body=to_json(body), content_type="application/json")
        await response.prepare(request)
        await response.write_eof()
        crashpoints.at("reserve.answered")
        return response

    async def _withdraw(self, request: web.Request) -> web.Response:
        peer = self._caller(request)
        try:
            asked = peering.request_untrusted(peering.WithdrawRequest, await request.read())
        except ValueError as error:
            raise Refused(400, str(error)) from None
        gone = await self._site.withdrawn(peer, asked.tokens)
        self._audit.write("withdrawn", peer=peer, number=gone)
        log.info("withdrawn by the other KME", peer=peer, keys=gone)
        return web.json_response({"gone": gone})

    def _caller(self, request: web.Request) -> str:
        certificate = certificate_of(request)
        peer = self.name_of(certificate)
        if not peer:
            stranger = (common_name(certificate) or "")[:64]
            now = time.monotonic()
            event = "a stranger was refused at the KMEs' listener"
            self._site.told.warning(event, stranger, now, common_name=stranger)
            self._audit.refused("stranger at the KMEs' listener", now, kme=stranger)
            raise Refused(401, "")
        return peer

    def name_of(self, certificate: Certificate) -> str:
        """The other KME that a certificate names; empty for a stranger."""
        peer = common_name(certificate)
        known = peer is not None and self._site.config.peer(peer) is not None
        return peer if peer and known and not self._is_an_sae(certificate) else ""

    def _is_an_sae(self, certificate: Certificate) -> bool:
        """Where SAEs are named by URIs nobody watches their common names: one may read like a KME's."""
        config = self._site.config
        if config.kme.sae_id_from != "san-uri":
            return False
        prefix = config.kme.sae_id_prefix
        names = uri_names(certificate, prefix)
        return any(prefix or config.local_sae(name) or config.peer_of(name) for name in names)

    def _check(self, peer: str, terms: Terms, link: str) -> str:
        """The stock of the link that is meant."""
        config = self._site.config
        served = config.peer_of(terms.master)
        for slave in terms.slaves:
            local = config.local_sae(slave)
            if served is None or served.id != peer or local is None or terms.master not in local.may_share_with:
                facts, now = {"master": terms.master[:_LONGEST], "slave": slave[:_LONGEST]}, time.monotonic()
                self._site.told.warning("these SAEs may not share keys", peer, now, peer=peer, **facts)
                self._audit.refused("may not share", now, kme=peer, sae=facts["master"], slave=facts["slave"])
                raise Refused(403, f"{slave!r} shares no keys with {terms.master!r} here")
        if len(set(terms.slaves)) != len(terms.slaves):
            raise Refused(400, "slave_SAE_IDs: each may stand once")
        meant = self._site.link_meant(peer, link)
        if meant is None:
            here = ", ".join(repr(known.row.name) for known in self._site.links_to(peer) if known.row)
            facts, now = {"here": here, "there": link[:64]}, time.monotonic()
            self._site.told.error("the devices are not of one link", peer, now, peer=peer, **facts)
            raise Refused(409, f"the device here belongs to link {here}, not {link[:64]!r}")
        return meant.stock
