"""One peer's tap at its key source: the machine's ``NeedKey`` becomes a call, bounded to 2 s, and an answer.

The only module of ``qvpn.control`` that knows what a key source is.  Whatever a source does, the machine gets either
a key or one of the errors of :mod:`keysource.errors`; a key that comes too late is wiped, never offered again (it is
gone from the source, and nobody knows whether the other end may still fetch it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from keysource.base import KEY_BYTES, Claiming, Key, KeySource, SaePair, SourceStatus
from keysource.errors import BadAnswer, KeySourceError, RolledBack, Unavailable

CALL_LIMIT = 2.0
"""Seconds that one call may take, retries of the source included."""

Deliver = Callable[[int, Key | KeySourceError], None]


class KeyFeed:
    """Asks one source for one peer.  Answers come through ``deliver`` on the event loop, one for each request."""

    def __init__(
        self, name: str, source: KeySource, peer_sae: str, deliver: Deliver, log: Any, *, limit: float = CALL_LIMIT
    ) -> None:
        self.name = name
        self.status = SourceStatus(False, "not asked yet")
        self._source = source
        self._peer_sae = peer_sae
        self._deliver = deliver
        self._log = log
        self._limit = limit
        self._calls: set[asyncio.Task[None]] = set()

    def sae_pair(self) -> SaePair:
        """The SAE names that the key schedule binds.  Raises KeySourceError while the source is not open."""
        return self._source.sae_pair(self._peer_sae)

    def claim(self) -> bytes | None:
        """What the source says about its position, for the handshake; None where it keeps none."""
        if not isinstance(self._source, Claiming):
            return None
        try:
            return self._source.claim()
        except KeySourceError:
            return None

    def draw(self, request: int, claim: bytes | None) -> None:
        """Ask for a new key, as master SAE."""
        self._start(request, None, claim)

    def fetch(self, request: int, key_id: str, claim: bytes | None) -> None:
        """Ask for the key that the peer drew, as slave SAE."""
        self._start(request, key_id, claim)

    async def poll(self) -> SourceStatus:
        """Ask the source how it is; bounded like a call, never raises."""
        try:
            async with asyncio.timeout(self._limit):
                self.status = await self._source.status(self._peer_sae)
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

    def _start(self, request: int, key_id: str | None, claim: bytes | None) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(request, key_id, claim))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(self, request: int, key_id: str | None, claim: bytes | None) -> None:
        try:
            self._check_claim(claim)
            self._deliver(request, self._checked(await self._call(key_id), key_id))
        except KeySourceError as error:
            self._log.warning("no key", source=self.name, error=type(error).__name__, reason=str(error))
            self._deliver(request, error)

    async def _call(self, key_id: str | None) -> Key:
        # A task of its own: at the time limit the machine gets its answer at once, even from a source that hangs on.
        call = asyncio.ensure_future(
            self._source.get_key(self._peer_sae)
            if key_id is None
            else self._source.get_key_with_id(self._peer_sae, key_id)
        )
        try:
            done, _ = await asyncio.wait((call,), timeout=self._limit)
        except asyncio.CancelledError:
            _abandon(call)
            raise
        if not done:
            _abandon(call)
            raise Unavailable(f"{self.name}: no answer within {self._limit:g} s")
        try:
            return call.result()
        except KeySourceError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            self._log.error("key source broke", source=self.name, error=type(error).__name__)
            raise Unavailable(f"{self.name}: the key source broke ({type(error).__name__})") from error

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

    def _checked(self, key: Key, key_id: str | None) -> Key:
        """A source may be a stranger's program: its keys are looked at."""
        if len(key.material) != KEY_BYTES:
            problem = f"gave a key of {len(key.material)} bytes instead of {KEY_BYTES}"
        elif not any(key.material):
            problem = "gave a key of zeros"
        elif key_id is not None and key.key_id != key_id:
            problem = "gave another key than was asked for"
        elif not 1 <= len(key.key_id) <= 64 or not key.key_id.isascii() or not key.key_id.isprintable():
            problem = "gave a key_ID that is not 1 to 64 printable ASCII characters"
        elif not 0 <= key.hops <= 255:
            problem = "gave an impossible number of hops"
        else:
            return key
        key.wipe()
        raise BadAnswer(f"{self.name}: the key source {problem}")


def _abandon(call: asyncio.Future[Key]) -> None:
    """Nobody waits any more: cancel, and wipe the key if it comes all the same."""

    def wipe(done: asyncio.Future[Key]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().wipe()

    call.add_done_callback(wipe)
    call.cancel()
