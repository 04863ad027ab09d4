"""What the other KMEs see: ``peering``'s one method, on a listener of its own."""

from __future__ import annotations

import structlog
from aiohttp import web

from keysource.etsi014.messages import to_json
from keysource.kme import peering
from keysource.kme.auth import caller
from keysource.kme.logs import hashed
from keysource.kme.sae_api import MAX_BODY, Handler, Refused, bounded_errors
from keysource.kme.site import Site

log = structlog.get_logger("kme")


class PeerApi:
    """Serves ``POST /kmapi/v1/reserve`` to the KMEs of the configuration."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._config = site.config

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY, middlewares=[self._middleware])
        application.router.add_post(peering.PATH, self._reserve)
        return application

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        return await bounded_errors(handler)(request)

    async def _reserve(self, request: web.Request) -> web.Response:
        peer = caller(request)
        if peer is None or self._config.peer(peer) is None:
            log.warning("a stranger was refused at the KMEs' listener", common_name=(peer or "")[:64])
            raise Refused(401, "")
        try:
            asked = peering.request_untrusted(await request.read())
        except ValueError as error:
            raise Refused(400, str(error)) from None
        master, slave = asked.master_SAE_ID, asked.slave_SAE_IDs[0]
        self._check(peer, master, slave, asked.link)
        answer = await self._site.reserve(peer, master, slave, asked.offers())
        missing = set(answer.missing)
        held = [hashed(key.key_ID) for key in asked.keys if key.key_ID not in missing]
        log.info("reserved", peer=peer, master=master, slave=slave, keys=held, missing=len(missing))
        body = peering.ReserveAnswer(
            missing=answer.missing, first_block=answer.first_block, next_block=answer.next_block
        )
        return web.Response(body=to_json(body), content_type="application/json")

    def _check(self, peer: str, master: str, slave: str, link: str) -> None:
        served = self._config.peer_of(master)
        local = self._config.local_sae(slave)
        if served is None or served.id != peer or local is None or master not in local.may_share_with:
            log.warning("these SAEs may not share keys", peer=peer, master=master, slave=slave)
            raise Refused(403, f"{slave!r} shares no keys with {master!r} here")
        row = self._site.links[peer].row
        if row is not None and row.name != link:
            log.error("the devices are not of one link", peer=peer, here=row.name, there=link[:64])
            raise Refused(409, f"the device here belongs to link {row.name!r}, not {link[:64]!r}")
