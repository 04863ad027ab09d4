"""What SAEs see: ETSI GS QKD 014 V1.1.1 clause 5, with the faults that were ordered.

Status codes are 200, 400 with an Error, 401 without body, 503 with an Error, as tables 4, 6 and 8 of the standard
have them; a path or method outside the interface gets HTTP's own 404 or 405.
"""

from __future__ import annotations

import asyncio
import base64
import sqlite3
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

from keysource.base import KEY_BYTES, wipe
from keysource.etsi014 import messages
from keysource.etsi014.messages import Error, Extension, KeyContainer, KeyEntry, KeyIDs, KeyRequest, Status
from keysource.kme.auth import caller
from keysource.kme.config import Limits, PeerKme
from keysource.kme.faults import SLOW_SECONDS, Fault, FaultSwitch
from keysource.kme.logs import hashed
from keysource.kme.site import EXHAUSTED, NotNow, Site
from keysource.kme.store import KeysNotFound, NotTheSlave, StoredKey

MAX_BODY = 256 * 1024
RETRY_AFTER = 2
KEY_BITS = 8 * KEY_BYTES
log = structlog.get_logger("kme")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """An answer other than 200: ``status`` 400, 401 or 503."""

    def __init__(self, status: int, message: str, details: list[Extension] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.details = details or []


def error_response(
    status: int, message: str, details: list[Extension] | None = None, *, retry_after: int | None = RETRY_AFTER
) -> web.Response:
    """401 goes without body; everything else with an Error."""
    if status == 401:
        return web.Response(status=401)
    error = Error(message=message, details=details) if details else Error(message=message)
    headers = {"Retry-After": str(retry_after)} if status == 503 and retry_after else None
    return web.Response(status=status, body=messages.to_json(error), content_type="application/json", headers=headers)


def bounded_errors(handler: Handler) -> Handler:
    """Every failure becomes an Error; what nobody expected is logged by its type and answered 503."""

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
            return error_response(error.status, error.reason)
        except sqlite3.Error as error:
            log.error("the store fails", error=str(error))
            return error_response(503, "the key store fails")
        except Exception as error:
            log.error("a request failed", error=type(error).__name__, path_length=len(request.path))
            return error_response(503, "error on server side")

    return handle


class SaeApi:
    """The three methods for the SAEs of one KME."""

    def __init__(self, site: Site, faults: FaultSwitch) -> None:
        self._site = site
        self._config = site.config
        self._faults = faults

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
        answer = await bounded_errors(handler)(request)
        if fault is Fault.SLOW:
            await asyncio.sleep(SLOW_SECONDS)
        return answer

    async def _status(self, request: web.Request) -> web.Response:
        master, slave = self._caller(request), request.match_info["sae"]
        peer = self._peer_of(master, slave)
        link, counts = self._site.links[peer.id], await self._site.counts(peer.id)
        empty = self._faults.fault is Fault.EMPTY
        extension: Extension = {
            "qvpn_held_keys": 0 if empty else counts.own_free + counts.peer_free + counts.reserved
        }
        if link.row:
            extension |= {"qvpn_origin": link.row.origin.value, "qvpn_hops": link.row.hops}
        measured = {"qvpn_alarm": link.alarm or None, "qvpn_qber": link.qber, "qvpn_key_rate": link.key_rate}
        extension |= {name: value for name, value in measured.items() if value is not None}
        status = Status(
            source_KME_ID=self._config.kme.id,
            target_KME_ID=peer.id,
            master_SAE_ID=master,
            slave_SAE_ID=slave,
            key_size=KEY_BITS,
            stored_key_count=0 if empty else counts.own_free,
            max_key_count=self._limits.max_key_count,
            max_key_per_request=self._limits.max_key_per_request,
            max_key_size=KEY_BITS,
            min_key_size=KEY_BITS,
            max_SAE_ID_count=0,
            status_extension=extension,
        )
        return web.Response(body=messages.to_json(status), content_type="application/json")

    async def _enc_keys(self, request: web.Request) -> web.Response:
        master, slave = self._caller(request), request.match_info["sae"]
        peer = self._peer_of(master, slave)
        asked = self._key_request_of_get(request) if request.method == "GET" else await self._key_request(request)
        self._check(asked)
        if self._faults.fault is Fault.EMPTY:
            raise NotNow(f"no keys are left for {slave!r}", reason=EXHAUSTED)
        keys = await self._site.issue(peer.id, master, slave, asked.number)
        log.info("issued", master=master, slave=slave, keys=[hashed(key.key_id) for key in keys])
        return self._container(keys)

    async def _dec_keys(self, request: web.Request) -> web.Response:
        slave, master = self._caller(request), request.match_info["sae"]
        key_ids = self._key_ids_of_get(request) if request.method == "GET" else await self._key_ids(request)
        if self._faults.fault is Fault.EMPTY:
            raise Refused(400, messages.KEYS_NOT_FOUND)
        try:
            keys = await self._site.fetch(master, slave, key_ids)
        except NotTheSlave:
            log.warning("not the slave of these keys", sae=slave, keys=[hashed(key_id) for key_id in key_ids[:8]])
            raise Refused(401, "") from None
        except KeysNotFound:
            raise Refused(400, messages.KEYS_NOT_FOUND) from None
        log.info("fetched", master=master, slave=slave, keys=[hashed(key.key_id) for key in keys])
        return self._container(keys)

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

    def _caller(self, request: web.Request) -> str:
        sae = caller(request)
        if sae is None or self._config.local_sae(sae) is None:
            log.warning("a stranger was refused", common_name=(sae or "")[:64])
            raise Refused(401, "")
        return sae

    def _peer_of(self, master: str, slave: str) -> PeerKme:
        peer = self._config.peer_of(slave)
        if peer is None:
            raise Refused(400, "no KME is known that serves this slave SAE")
        local = self._config.local_sae(master)
        if local is None or slave not in local.may_share_with:
            log.warning("these SAEs may not share keys", master=master, slave=slave)
            raise Refused(401, "")
        return peer

    # What was asked

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

    def _check(self, asked: KeyRequest) -> None:
        """Raises :class:`Refused` for what this KME does not do, in the words of the standard where it has some."""
        if asked.size is not None and asked.size % 8:
            raise Refused(400, messages.SIZE_NOT_MULTIPLE)
        if asked.size not in (None, KEY_BITS):
            raise Refused(400, f"size: only keys of {KEY_BITS} bits are served")
        if not 1 <= asked.number <= self._limits.max_key_per_request:
            raise Refused(400, f"number: 1 to {self._limits.max_key_per_request} keys may be asked for")
        if asked.additional_slave_SAE_IDs:
            raise Refused(400, "additional_slave_SAE_IDs: max_SAE_ID_count of this KME is 0")
        mandatory = [name for extension in asked.extension_mandatory for name in extension]
        if mandatory:
            details: list[Extension] = [
                {"extension_mandatory_unsupported": f"{name[:64]} is not supported"} for name in mandatory[:16]
            ]
            raise Refused(400, messages.MANDATORY_UNSUPPORTED, details)

    def _key_ids_of_get(self, request: web.Request) -> list[str]:
        if list(request.query) != ["key_ID"]:
            raise Refused(400, "a GET carries exactly one key_ID; all else needs a POST")
        return [_uuid(request.query["key_ID"])]

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


def _uuid(text: str) -> str:
    """In lower case with hyphens; what is no UUID is certainly not found."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise Refused(400, messages.KEYS_NOT_FOUND) from None
