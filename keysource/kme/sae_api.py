"""What SAEs see: ETSI GS QKD 014 V1.1.1 clause 5, with the faults that were ordered.

Status codes are 200, 400 with an Error, 401 without body, 503 with an Error, as tables 4, 6 and 8 of the standard
have them; a path or method outside the interface gets HTTP's own 404 or 405.
"""

from __future__ import annotations

import asyncio
import base64
import math
import socket
import sqlite3
import struct
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import web

from keysource.base import wipe
from keysource.etsi014 import messages
from keysource.etsi014.messages import Error, Extension, KeyContainer, KeyEntry, KeyIDs, KeyRequest, Status
from keysource.kme import crashpoints, extensions, multicast
from keysource.kme.audit import Audit, AuditError
from keysource.kme.auth import Certificate, certificate_of, sae_reader
from keysource.kme.boundedlog import BoundedLog
from keysource.kme.config import KmeConfig, Limits, PeerKme, Sae
from keysource.kme.faults import CUTS, SLOW_SECONDS, Fault, FaultSwitch
from keysource.kme.ground import EXHAUSTED, NotNow
from keysource.kme.logs import hashed
from keysource.kme.ratelimit import RateLimits
from keysource.kme.records import ANY, KeysNotFound, NotTheSlave, StoredKey, StoreError, Terms, Wanted, weakest
from keysource.kme.site import Site
from keysource.kme.spellings import respelled

MAX_BODY = 256 * 1024
RETRY_AFTER = 2
_LONGEST = 200  # of a name that a caller made up, where it is written down
log = structlog.get_logger("kme")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """An answer other than 200: ``status`` 400, 401 or 503."""

    def __init__(self, status: int, message: str, details: list[Extension] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.details = details or []


class TooOften(Exception):
    """An SAE asks faster than it may; ``seconds`` is when it may come again."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


def error_response(
    status: int, message: str, details: list[Extension] | None = None, *, retry_after: int | None = RETRY_AFTER
) -> web.Response:
    """401 goes without body; everything else with an Error."""
    if status == 401:
        return web.Response(status=401)
    error = Error(message=message, details=details) if details else Error(message=message)
    headers = {"Retry-After": str(retry_after)} if status == 503 and retry_after else None
    return web.Response(status=status, body=messages.to_json(error), content_type="application/json", headers=headers)


def bounded_errors(handler: Handler, told: BoundedLog) -> Handler:
    """Every failure becomes an Error; what nobody expected is logged by its type and answered 503."""

    def tell(event: str, **facts: object) -> None:
        told.error(event, "", time.monotonic(), **facts)

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except Refused as error:
            return error_response(error.status, str(error), error.details)
        except NotNow as error:
            reason: list[Extension] = [{"qvpn_reason": error.reason}] if error.reason else []
            return error_response(503, str(error), reason)
        except web.HTTPRequestEntityTooLarge:
            return error_response(400, f"the body is longer than {MAX_BODY} bytes")
        except web.HTTPException as error:
            answer = error_response(error.status, error.reason)
            if "Allow" in error.headers:  # a 405 must say what there is (RFC 9110, 15.5.6)
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        except TooOften as error:
            return error_response(503, str(error), [{"qvpn_reason": "rate"}], retry_after=error.seconds)
        except AuditError as error:
            tell("nothing is handed out without an audit log", error=str(error))
            return error_response(503, "the audit log cannot be written")
        except (sqlite3.Error, StoreError) as error:
            tell("the store fails", error=str(error))
            return error_response(503, "the key store fails")
        except Exception as error:
            tell("a request failed", error=type(error).__name__, path_length=len(request.path))
            return error_response(503, "error on server side")

    return handle


@dataclass(slots=True)
class Traffic:
    """Of one SAE since this process began."""

    requests: int = 0
    issued: int = 0
    fetched: int = 0
    refused: int = 0


class SaeApi:
    """The three methods for the SAEs of one KME."""

    def __init__(self, site: Site, faults: FaultSwitch, audit: Audit) -> None:
        self._site = site
        self._faults = faults
        self._audit = audit
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self.reconfigure()

    def reconfigure(self) -> None:
        """The site has another configuration; everybody's buckets are full again."""
        kme = self._site.config.kme
        self._sae_id = sae_reader(kme.sae_id_from, kme.sae_id_prefix)
        self._rates = RateLimits(self._site.config)

    @property
    def rates(self) -> RateLimits:
        """Shared with every other interface to the same SAEs."""
        return self._rates

    @property
    def _config(self) -> KmeConfig:
        return self._site.config

    @property
    def _limits(self) -> Limits:
        return self._config.limits

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY, middlewares=[self._middleware])
        keys = "/api/v1/keys/{sae}"
        application.router.add_get(keys + "/status", self._status, allow_head=False)
        application.router.add_get(keys + "/enc_keys", self._enc_keys, allow_head=False)
        application.router.add_post(keys + "/enc_keys", self._enc_keys)
        application.router.add_get(keys + "/dec_keys", self._dec_keys, allow_head=False)
        application.router.add_post(keys + "/dec_keys", self._dec_keys)
        return application

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        fault = self._faults.fault
        if fault is Fault.UNAUTHORISED:
            return error_response(401, "")
        if fault is Fault.SERVICE_UNAVAILABLE:
            return error_response(503, "error on server side", retry_after=None)
        answer = await bounded_errors(handler, self._site.told)(request)
        if fault is Fault.SLOW:
            await asyncio.sleep(SLOW_SECONDS)
        if isinstance(answer, web.Response):
            answer = respelled(fault, answer)
            if fault in CUTS and answer.status == 200 and not request.path.endswith("/status"):
                return _cut(request, answer, fault)
        if answer.status == 200:
            await answer.prepare(request)
            await answer.write_eof()
            crashpoints.at(request.path.rpartition("/")[2][:3] + ".answered")
        return answer

    async def _status(self, request: web.Request) -> web.Response:
        sae, slave = self._caller(request), request.match_info["sae"]
        peer = self._peer_of(sae, slave)
        link, counts = await self._site.summary(peer.id)
        empty = self._faults.fault is Fault.EMPTY
        extension: Extension = {
            "qvpn_held_keys": 0 if empty else counts.own_free + counts.peer_free + counts.reserved
        }
        if link.row:
            extension |= {"qvpn_origin": link.row.origin.value, "qvpn_hops": link.row.hops}
        measured = {"qvpn_alarm": link.alarm or None, "qvpn_qber": link.qber, "qvpn_key_rate": link.key_rate}
        extension |= {name: value for name, value in measured.items() if value is not None}
        per_key = Terms(sae.id, (slave,), self._limits.key_size).units
        status = Status(
            source_KME_ID=self._config.kme.id,
            target_KME_ID=peer.id,
            master_SAE_ID=sae.id,
            slave_SAE_ID=slave,
            key_size=self._limits.key_size,
            stored_key_count=0 if empty else counts.own_free // per_key,
            max_key_count=self._limits.max_key_count // per_key,
            max_key_per_request=self._limits.max_key_per_request,
            max_key_size=self._limits.max_key_size,
            min_key_size=self._limits.min_key_size,
            max_SAE_ID_count=self._limits.max_SAE_ID_count,
            status_extension=extension,
        )
        return web.Response(body=messages.to_json(status), content_type="application/json")

    async def _enc_keys(self, request: web.Request) -> web.Response:
        sae, slave = self._caller(request), request.match_info["sae"]
        self._peer_of(sae, slave)
        crashpoints.at("enc.asked")
        asked = self._key_request_of_get(request) if request.method == "GET" else await self._key_request(request)
        size = self._limits.key_size if asked.size is None else asked.size
        self._check(asked, size)
        shares = self._shares(sae, [slave, *asked.additional_slave_SAE_IDs], size)
        wanted = self._wanted(asked)
        if self._faults.fault is Fault.EMPTY:
            raise NotNow(f"no keys are left for {slave!r}", reason=EXHAUSTED)
        units = asked.number * multicast.units_of_a_key(shares)
        self._wait(sae, "keys", self._rates.keys(sae, units, time.monotonic()))
        self._audit.open()
        keys = await self._issue(shares, asked.number, wanted)
        self.traffic[sae.id].issued += len(keys)
        slaves = [slave for terms in shares.values() for slave in terms.slaves]
        self._record("issued", keys, master=sae.id, slaves=slaves, size=size)
        log.info("issued", master=sae.id, slave=slave, keys=[hashed(key.key_id) for key in keys])
        return self._container(keys)

    async def _issue(self, shares: multicast.Shares, number: int, wanted: Wanted) -> list[StoredKey]:
        try:
            if len(shares) > 1:
                return await multicast.issue(self._site, shares, number, wanted)
            [(peer, terms)] = shares.items()
            return await self._site.issue(peer, terms, number, wanted)
        except NotNow as error:
            if error.reason == EXHAUSTED and wanted != ANY and await self._enough(shares, number):
                raise Refused(400, messages.MANDATORY_UNMET) from None
            raise

    async def _enough(self, shares: multicast.Shares, number: int) -> bool:
        """Are there keys for this, if only of another kind?"""
        return all([(await self._site.counts(p)).own_free >= number * terms.units for p, terms in shares.items()])

    async def _dec_keys(self, request: web.Request) -> web.Response:
        sae, master = self._caller(request), request.match_info["sae"]
        crashpoints.at("dec.asked")
        key_ids = self._key_ids_of_get(request) if request.method == "GET" else await self._key_ids(request)
        if self._faults.fault is Fault.EMPTY:
            raise Refused(400, messages.KEYS_NOT_FOUND)
        self._audit.open()
        try:
            keys = await self._site.fetch(master, sae.id, key_ids)
        except NotTheSlave:
            hashes = [hashed(key_id) for key_id in key_ids[:8]]
            self._site.told.warning("not the slave of these keys", sae.id, time.monotonic(), sae=sae.id, keys=hashes)
            self.traffic[sae.id].refused += 1
            self._audit.refused("not the slave of these keys", time.monotonic(), sae=sae.id, master=master[:_LONGEST])
            raise Refused(401, "") from None
        except KeysNotFound:
            raise Refused(400, messages.KEYS_NOT_FOUND) from None
        self.traffic[sae.id].fetched += len(keys)
        self._record("fetched", keys, master=master, slave=sae.id)
        log.info("fetched", master=master, slave=sae.id, keys=[hashed(key.key_id) for key in keys])
        return self._container(keys)

    def _record(self, event: str, keys: list[StoredKey], **facts: Any) -> None:
        origin, hops = weakest(key.origin for key in keys), max(key.hops for key in keys)
        try:
            self._audit.write(event, [key.key_id for key in keys], **facts, origin=origin.value, hops=hops)
        except AuditError:  # gone from the store and not handed out: burnt
            for key in keys:
                wipe(key.material)
            raise

    def _container(self, keys: list[StoredKey]) -> web.Response:
        entries = []
        for key in keys:
            material = self._faults.spoil(key.material)
            entries.append(
                KeyEntry(
                    key_ID=key.key_id,
                    key=base64.b64encode(material).decode(),
                    key_extension={"qvpn_origin": key.origin.value, "qvpn_hops": key.hops},
                )
            )
            wipe(key.material)
        body = messages.to_json(KeyContainer(keys=entries))
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})

    # Who may

    def name_of(self, certificate: Certificate) -> str:
        """The SAE that a certificate names; empty for a stranger."""
        name = self._sae_id(certificate)
        return name if name is not None and self._config.local_sae(name) is not None else ""

    def _caller(self, request: web.Request) -> Sae:
        name = self._sae_id(certificate_of(request))
        sae = self._config.local_sae(name) if name is not None else None
        if sae is None:
            stranger = (name or "")[:64]
            self._site.told.warning("a stranger was refused", stranger, time.monotonic(), sae=stranger)
            self._audit.refused("stranger", time.monotonic(), sae=stranger)
            raise Refused(401, "")
        self.traffic[sae.id].requests += 1
        self._wait(sae, "requests", self._rates.request(sae, time.monotonic()))
        return sae

    def _wait(self, sae: Sae, what: str, seconds: float) -> None:
        if seconds:
            self.traffic[sae.id].refused += 1
            self._audit.refused(f"too many {what}", time.monotonic(), sae=sae.id)
            raise TooOften(f"{sae.id!r} asks for too many {what}; again in {seconds:.1f} s", math.ceil(seconds))

    def _peer_of(self, sae: Sae, slave: str) -> PeerKme:
        peer = self._config.peer_of(slave)
        if peer is None:
            raise Refused(400, f"no KME is known that serves the slave SAE {slave[:64]!r}")
        if slave not in sae.may_share_with:
            now = time.monotonic()
            self._site.told.warning("these SAEs may not share keys", sae.id, now, master=sae.id, slave=slave)
            self.traffic[sae.id].refused += 1
            self._audit.refused("may not share", now, sae=sae.id, slave=slave)
            raise Refused(401, "")
        return peer

    def _shares(self, sae: Sae, slaves: list[str], size: int) -> multicast.Shares:
        """Which KME serves which of the slaves; that of the first slave comes first."""
        if len(slaves) - 1 > self._limits.max_SAE_ID_count:
            most = self._limits.max_SAE_ID_count
            raise Refused(400, f"additional_slave_SAE_IDs: max_SAE_ID_count of this KME is {most}")
        if len(set(slaves)) != len(slaves):
            raise Refused(400, "additional_slave_SAE_IDs: an SAE stands twice")
        places: dict[str, list[str]] = {}
        for slave in slaves:
            places.setdefault(self._peer_of(sae, slave).id, []).append(slave)
        return {peer: Terms(sae.id, tuple(some), size) for peer, some in places.items()}

    # What was asked

    def _wanted(self, asked: KeyRequest) -> Wanted:
        """What the extensions ask for.  Raises :class:`Refused` in the words of the standard."""
        if names := extensions.unknown(asked.extension_mandatory):
            details: list[Extension] = [
                {"extension_mandatory_unsupported": f"{name} is not supported"} for name in names
            ]
            raise Refused(400, messages.MANDATORY_UNSUPPORTED, details)
        if self._limits.refuse_unhandled_optional and (names := extensions.unknown(asked.extension_optional)):
            details = [{"extension_optional_unhandled": f"{name} is not handled"} for name in names]
            raise Refused(400, messages.OPTIONAL_UNHANDLED, details)
        try:
            return extensions.wanted(asked.extension_mandatory)
        except extensions.BadExtension as error:
            raise Refused(400, messages.MANDATORY_UNMET, [{"extension_mandatory_unmet": str(error)}]) from None

    def _key_request_of_get(self, request: web.Request) -> KeyRequest:
        values: dict[str, Any] = {}
        for name in request.query:
            given = request.query.getall(name)
            if name not in ("number", "size") or len(given) != 1:
                raise Refused(400, "a GET may carry number and size, once each; all else needs a POST")
            if not given[0].isascii() or not given[0].isdigit() or len(given[0]) > 9:
                raise Refused(400, f"{name}: an integer is expected")
            values[name] = int(given[0])
        return KeyRequest(**values)

    async def _key_request(self, request: web.Request) -> KeyRequest:
        try:
            return messages.request_untrusted(await request.read())
        except ValueError as error:
            raise Refused(400, str(error)) from None

    def _check(self, asked: KeyRequest, size: int) -> None:
        """Raises :class:`Refused` for what this KME does not do, in the words of the standard where it has some."""
        limits = self._limits
        if size % 8:
            raise Refused(400, messages.SIZE_NOT_MULTIPLE)
        if not limits.min_key_size <= size <= limits.max_key_size:
            raise Refused(400, f"size: keys of {limits.min_key_size} to {limits.max_key_size} bits are served")
        if not 1 <= asked.number <= limits.max_key_per_request:
            raise Refused(400, f"number: 1 to {limits.max_key_per_request} keys may be asked for")

    def _key_ids_of_get(self, request: web.Request) -> list[str]:
        given = request.query.getall("key_ID", [])
        if len(given) != 1 or set(request.query) != {"key_ID"}:
            raise Refused(400, "a GET carries exactly one key_ID; all else needs a POST")
        return [_uuid(given[0])]

    async def _key_ids(self, request: web.Request) -> list[str]:
        try:
            asked: KeyIDs = messages.key_ids_untrusted(await request.read())
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if not 1 <= len(asked.key_IDs) <= self._limits.max_key_per_request:
            raise Refused(400, f"key_IDs: 1 to {self._limits.max_key_per_request} may be asked for")
        key_ids = [_uuid(entry.key_ID) for entry in asked.key_IDs]
        if len(set(key_ids)) != len(key_ids):
            raise Refused(400, "key_IDs: each may stand once")
        return key_ids


def _cut(request: web.Request, answer: web.Response, fault: Fault) -> web.Response:
    """The keys are gone from the store by now; the connection goes before they are told, or in the middle of it."""
    transport = request.transport
    if transport is None:
        return answer
    if fault is Fault.TORN:
        body = answer.body
        assert isinstance(body, bytes)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body[: len(body) // 2])
    else:  # a close that throws away what was not sent is a reset
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()
    return answer  # there is nobody to write it to


def _uuid(text: str) -> str:
    """In lower case with hyphens; what is no UUID is certainly not found."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise Refused(400, messages.KEYS_NOT_FOUND) from None
