"""One peer's tap at its key source: the machine's ``NeedKey`` becomes a call, bounded in time, and an answer.

The only module of ``qvpn.control`` that knows what a key source is.  Whatever a source does, the machine gets either
a key or one of the errors of :mod:`keysource.errors`.  A fetch is given up after 2 s, and a later key wiped.
The machine waits 2 s for a draw too, by its own timer; the draw itself goes on, for its key is gone from the source,
and comes late: the machine holds it for its next attempt.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, TypeGuard

from keysource.base import KEY_BYTES, Claiming, Key, KeySource, Origin, SaePair, SourceStatus, wipe
from keysource.errors import (
    BadAnswer,
    BadSettings,
    KeySourceError,
    NotOwner,
    RepeatedKey,
    RolledBack,
    Unauthorized,
    Unavailable,
    UnknownKeyID,
)
from qvpn.handshake.events import NeedKey
from qvpn.handshake.parameters import KeyFault, KeyMaterial
from qvpn.status import key_id_hash
from qvpn.wire.messages import WireOrigin

__all__ = ["BadSettings", "KeyFeed", "KeySource", "KeySourceError", "RolledBack", "SourceStatus"]

CALL_LIMIT = 2.0
"""Seconds that the machine waits for one call, retries of the source included."""
LATE_DRAW = 30.0
"""Seconds after which a draw that the machine no longer waits for is given up: the deadline of a handshake."""

Deliver = Callable[[int, KeyMaterial | KeyFault], None]
"""``deliver(request, answer)``."""


class KeyFeed:
    """Asks one source for one peer.  Answers come through ``deliver`` on the event loop, one for each request."""

    def __init__(
        self,
        name: str,
        source: KeySource,
        peer_sae: str,
        deliver: Deliver,
        log: Any,
        *,
        limit: float = CALL_LIMIT,
        late_limit: float = LATE_DRAW - CALL_LIMIT,
    ) -> None:
        self.name = name
        self.status = SourceStatus(False, "not asked yet")
        self.drawn = 0
        """Keys that this peer drew."""
        self._source = source
        self._peer_sae = peer_sae
        self._deliver = deliver
        self._log = log
        self._limit = limit
        self._late_limit = late_limit
        self._calls: set[asyncio.Task[None]] = set()

    def sae_pair(self) -> SaePair | None:
        """The names of both ends at the source; None while it does not know them."""
        try:
            return self._source.sae_pair(self._peer_sae)
        except KeySourceError:
            return None

    def claim(self) -> bytes | None:
        """What the source says about its position, for the handshake; None where it keeps none."""
        if not isinstance(self._source, Claiming):
            return None
        try:
            return self._source.claim()
        except KeySourceError:
            return None

    def ask(self, need: NeedKey) -> None:
        """Draw a new key as master SAE, or fetch the one that the peer drew as slave SAE."""
        task = asyncio.get_running_loop().create_task(self._answer(need))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def poll(self) -> SourceStatus:
        """Ask the source how it is; bounded like a call, never raises."""
        try:
            async with asyncio.timeout(self._limit):
                said = await self._source.status(self._peer_sae)
            strange = SourceStatus(False, f"{self.name}: the key source's status is none")
            self.status = said if isinstance(said, SourceStatus) else strange
        except TimeoutError:
            self.status = SourceStatus(False, f"{self.name}: no status within {self._limit:g} s")
        except KeySourceError as error:
            self.status = SourceStatus(False, str(error))
        except Exception as error:
            self._log.error("key source broke", source=self.name, error=type(error).__name__)
            self.status = SourceStatus(False, f"{self.name}: the key source broke ({type(error).__name__})")
        return self.status

    async def aclose(self) -> None:
        """Cancel what is under way; its keys are wiped."""
        for task in tuple(self._calls):
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _answer(self, need: NeedKey) -> None:
        answer: KeyMaterial | KeyFault
        key_id = None if need.key is None else need.key.key_id
        try:
            self._check_claim(need.claim)
            answer = self._take(await self._finish(self._call(key_id), draw=key_id is None), key_id)
            self.drawn += key_id is None
        except KeySourceError as error:
            self._log.warning("no key", source=self.name, error=type(error).__name__, reason=_said(error, key_id))
            answer = fault_of(error)
        except Exception as error:  # not even what it should look like: a stranger's program
            self._log.error("key source broke", source=self.name, error=type(error).__name__)
            answer = KeyFault.BROKEN
        self._deliver(need.request, answer)

    def _call(self, key_id: str | None) -> asyncio.Future[Key]:
        # A task of its own: at the time limit the machine gets its answer at once, even from a source that hangs on.
        return asyncio.ensure_future(
            self._source.get_key(self._peer_sae)
            if key_id is None
            else self._source.get_key_with_id(self._peer_sae, key_id)
        )

    async def _finish(self, call: asyncio.Future[Key], *, draw: bool) -> asyncio.Future[Key]:
        """Wait until the call is over.  Raises Unavailable where that takes too long; the call is abandoned then."""
        try:
            done, _ = await asyncio.wait((call,), timeout=self._limit)
            if draw and not done:
                self._log.warning("no key in time, the draw goes on", source=self.name, seconds=self._limit)
                done, _ = await asyncio.wait((call,), timeout=self._late_limit)
        except asyncio.CancelledError:
            _abandon(call)
            raise
        if not done:
            _abandon(call)
            raise Unavailable(f"{self.name}: no answer within {self._limit + self._late_limit * draw:g} s")
        return call

    def _take(self, call: asyncio.Future[Key], key_id: str | None) -> KeyMaterial:
        """What a call that is over gave.  Raises KeySourceError."""
        try:
            key = call.result()
        except KeySourceError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            self._log.error("key source broke", source=self.name, error=type(error).__name__)
            raise Unavailable(f"{self.name}: the key source broke ({type(error).__name__})") from error
        return self._material(key, key_id)

    def _check_claim(self, claim: bytes | None) -> None:
        if claim is None or not isinstance(self._source, Claiming):
            return
        try:
            self._source.check_claim(claim)
        except KeySourceError:
            raise
        except Exception as error:
            raise RolledBack(
                f"{self.name}: the peer's claim could not be checked ({type(error).__name__})"
            ) from error

    def _material(self, key: Key, wanted: str | None) -> KeyMaterial:
        """A source may be a stranger's program: its keys are looked at.  A refused one is wiped."""
        problem = _problem(key, wanted) if _is_key(key) else "something that is no key"
        if problem:
            _wipe(key)
            raise BadAnswer(f"{self.name}: the key source gave {problem}")
        return KeyMaterial(key.key_id, WireOrigin[key.origin.name], key.hops, key.material)


def fault_of(error: KeySourceError) -> KeyFault:
    """What an error means to the protocol.  In doubt the key may be gone: BROKEN."""
    if isinstance(error, RepeatedKey):
        return KeyFault.REPEATED
    if isinstance(error, UnknownKeyID):
        return KeyFault.UNKNOWN
    if isinstance(error, Unauthorized):
        return KeyFault.UNAUTHORISED
    if isinstance(error, RolledBack):
        return KeyFault.ROLLED_BACK
    if isinstance(error, NotOwner) or (isinstance(error, Unavailable) and error.answered):
        return KeyFault.UNAVAILABLE
    return KeyFault.BROKEN


def _said(error: KeySourceError, key_id: str | None) -> str:
    """For the log.  A key manager may repeat the key_ID in its answer; only its hash is shown."""
    if key_id is None:
        return str(error)
    return re.sub(re.escape(key_id), f"(key_ID with hash {key_id_hash(key_id)})", str(error), flags=re.IGNORECASE)


def _is_key(given: object) -> TypeGuard[Key]:
    """Is it a key, with fields of the kinds that the interface says?"""
    return (
        isinstance(given, Key)
        and isinstance(given.key_id, str)
        and isinstance(given.material, bytearray)
        and isinstance(given.origin, Origin)
        and isinstance(given.hops, int)
    )


def _wipe(given: object) -> None:
    """What can be overwritten of an answer that nobody takes."""
    material = getattr(given, "material", None)
    if isinstance(material, bytearray):
        wipe(material)


def _problem(key: Key, wanted: str | None) -> str:
    if len(key.material) != KEY_BYTES:
        return f"a key of {len(key.material)} bytes instead of {KEY_BYTES}"
    if not any(key.material):
        return "a key of zeros"
    if wanted is not None and key.key_id != wanted:
        return "another key than was asked for"
    if not 1 <= len(key.key_id) <= 64 or not all("!" <= letter <= "~" for letter in key.key_id):
        return "a key_ID that is not 1 to 64 ASCII characters between 0x21 and 0x7E (no space)"
    if not 0 <= key.hops <= 255:
        return "an impossible number of hops"
    return ""


def _abandon(call: asyncio.Future[Key]) -> None:
    """Nobody waits any more: cancel, and wipe the key if it comes all the same."""

    def forget(done: asyncio.Future[Key]) -> None:
        if not done.cancelled() and done.exception() is None:
            _wipe(done.result())

    call.add_done_callback(forget)
    call.cancel()
