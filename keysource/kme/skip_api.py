"""What an encryptor sees that speaks Cisco's SKIP: the same keys, SAEs, limits and audit log as over ETSI 014.

A system of SKIP is an SAE: its certificate names it, ``may_share_with`` is its ``remoteSystemID[]``.  A keyId is the
key_ID's UUID as 32 hexadecimal digits, so a key drawn over one interface can be fetched over the other.
"""

from __future__ import annotations

import math
import sqlite3
import time
import uuid
from collections.abc import Callable

import structlog
from aiohttp import web

from keysource.base import KEY_BYTES, wipe
from keysource.kme.audit import Audit, AuditError
from keysource.kme.auth import certificate_of, sae_reader
from keysource.kme.config import KmeConfig, Sae
from keysource.kme.faults import Fault, FaultSwitch
from keysource.kme.ground import NotNow
from keysource.kme.logs import hashed
from keysource.kme.ratelimit import RateLimits
from keysource.kme.records import KeysNotFound, NotTheSlave, StoredKey, StoreError, Terms
from keysource.kme.site import Site
from keysource.skip.messages import Capabilities, SkipKey
from keysource.skip.server import Issued, Refused, skip_application

log = structlog.get_logger("kme")


class SkipApi:
    """A :class:`~keysource.skip.server.KeyProvider` over one KME; ``rates`` gives the limits of all interfaces."""

    def __init__(self, site: Site, faults: FaultSwitch, audit: Audit, rates: Callable[[], RateLimits]) -> None:
        self._site, self._faults, self._audit, self._rates = site, faults, audit, rates

    def application(self) -> web.Application:
        return skip_application(self, self._identify)

    def capabilities(self, caller: str) -> Capabilities:
        return Capabilities(caller, tuple(self._sae(caller).may_share_with), entropy=True, algorithm="QKD")

    async def new_key(self, caller: str, remote_system: str) -> Issued:
        sae, peer = self._sae(caller), self._config.peer_of(remote_system)
        # The server has matched globs, as SKIP's capabilities may have; a name of ours is never one.
        if peer is None or remote_system not in sae.may_share_with:
            raise Refused(400, "remoteSystemID: no system that shares keys with this one")
        self._wait(sae, "keys", self._rates().keys(sae, 1, time.monotonic()))
        try:
            self._audit.open()
            [key] = await self._site.issue(peer.id, Terms(sae.id, (remote_system,), 8 * KEY_BYTES), 1)
            self._record("issued", key, master=sae.id, slaves=[remote_system], size=8 * KEY_BYTES)
        except NotNow as error:
            raise Refused(503, str(error)) from None
        except (AuditError, StoreError, sqlite3.Error) as error:
            raise self._failed(error) from None
        return self._issued(key)

    async def key(self, caller: str, remote_system: str, key_id: str) -> Issued:
        if len(key_id) != 32:
            raise Refused(400, "the keyId is unknown")
        wanted = str(uuid.UUID(key_id))
        try:
            self._audit.open()
            [key] = await self._site.fetch(remote_system, caller, [wanted])
            self._record("fetched", key, master=remote_system, slave=caller)
        except KeysNotFound:
            raise Refused(400, "the keyId is unknown") from None
        except NotTheSlave:
            now = time.monotonic()
            self._site.told.warning("not the slave of this key", caller, now, sae=caller, keys=[hashed(wanted)])
            self._audit.refused("not the slave of these keys", now, sae=caller, master=remote_system[:200])
            raise Refused(400, "the keyId is unknown") from None
        except (AuditError, StoreError, sqlite3.Error) as error:
            raise self._failed(error) from None
        return self._issued(key)

    def _issued(self, key: StoredKey) -> Issued:
        digits = uuid.UUID(key.key_id).hex
        return Issued(SkipKey(digits, self._faults.spoil(key.material)), key.origin, key.hops)

    def _record(self, event: str, key: StoredKey, **facts: object) -> None:
        try:
            self._audit.write(event, [key.key_id], **facts, origin=key.origin.value, hops=key.hops, interface="skip")
        except AuditError:  # gone from the store and not handed out: burnt
            wipe(key.material)
            raise
        log.info(event, interface="skip", keys=[hashed(key.key_id)])

    def _failed(self, error: Exception) -> Refused:
        self._site.told.error("nothing is handed out", "", time.monotonic(), error=str(error))
        return Refused(500, "the key store or its audit log fails")

    # Who may

    @property
    def _config(self) -> KmeConfig:
        return self._site.config

    def _sae(self, name: str) -> Sae:
        sae = self._config.local_sae(name)
        if sae is None:
            raise Refused(401, "the certificate names no system that is known here")
        return sae

    def _identify(self, request: web.Request) -> str | None:
        fault = self._faults.fault
        if fault is Fault.UNAUTHORISED:
            return None
        if fault in (Fault.SERVICE_UNAVAILABLE, Fault.EMPTY) and request.path != "/capabilities":
            raise Refused(503, "no key now")
        kme = self._config.kme
        name = sae_reader(kme.sae_id_from, kme.sae_id_prefix)(certificate_of(request))
        sae = None if name is None else self._config.local_sae(name)
        if sae is None:
            stranger = (name or "")[:64]
            self._site.told.warning("a stranger was refused", stranger, time.monotonic(), sae=stranger)
            self._audit.refused("stranger", time.monotonic(), sae=stranger)
            return None
        self._wait(sae, "requests", self._rates().request(sae, time.monotonic()))
        return sae.id

    def _wait(self, sae: Sae, what: str, seconds: float) -> None:
        if seconds:
            self._audit.refused(f"too many {what}", time.monotonic(), sae=sae.id)
            raise Refused(503, f"{sae.id!r} asks for too many {what}; again in {math.ceil(seconds)} s")
