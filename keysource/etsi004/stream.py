"""Which chunks of one key stream this end has used: never two keys of one index, also over kill -9.

Index ``i`` belongs to ``owner.of(i)``: that end draws it, the other fetches it.  Both are written down (and fsynced)
before the key is given out.  An index whose draw the server refused without delivering is offered again.
"""

from __future__ import annotations

import asyncio
import heapq
import struct
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from keysource.base import End, Owner
from keysource.errors import BadAnswer, Exhausted, NotOwner, RolledBack, Unavailable, UnknownKeyID
from keysource.etsi004.messages import MOST_INDEX
from keysource.file.position import Position, PositionFile

_T = TypeVar("_T")
_CLAIM = struct.Struct(">B16s1sII")
_CLAIM_VERSION = 4


class StreamPosition:
    """One end of the stream called ``name`` (32 hexadecimal digits)."""

    def __init__(self, folder: Path, name: str, end: End, owner: Owner) -> None:
        self._name, self._end, self._owner = name, end, owner
        self._file = PositionFile(folder, name, end, prefix="etsi004", what="key stream", key="stream")
        self._position = Position()
        self._next_own = 0
        self._again: list[int] = []
        self._fetching: set[int] = set()
        self._worker: ThreadPoolExecutor | None = None
        self.refused: RolledBack | None = None

    async def open(self) -> None:
        """Lock and read.  Raises :class:`BadSettings`."""
        if self._worker is not None:
            return
        worker = ThreadPoolExecutor(1, thread_name_prefix="etsi004")
        try:
            self._position = await asyncio.get_running_loop().run_in_executor(worker, self._file.open)
        except BaseException:
            worker.shutdown(wait=False)
            raise
        self._worker = worker
        self._next_own = self._position.next

    async def aclose(self) -> None:
        """Give up the lock, after what is under way.  May be called twice."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.submit(self._file.close)
            await asyncio.to_thread(worker.shutdown)

    def take_own(self) -> int:
        """The next index of this end, for one draw.  Raises :class:`NotOwner`, :class:`Exhausted`."""
        self._check()
        if self._again:
            return heapq.heappop(self._again)
        owned = self._owned(self._end)
        if not owned:
            raise NotOwner(f"stream {self._name}: all keys are issued by end {self._end.other}")
        step = owned.step
        index = self._next_own + (owned.start - self._next_own) % step
        if index > MOST_INDEX:
            raise Exhausted(f"stream {self._name}: all indexes are used; agree upon a new stream")
        self._next_own = index + 1
        return index

    def give_back(self, index: int) -> None:
        """The server refused the draw and delivered nothing."""
        heapq.heappush(self._again, index)

    async def drawn(self, index: int) -> None:
        """On the disk when this returns.  Raises :class:`Unavailable`: the key must not be used."""
        await self._write(lambda position: position.draw(max(index, position.next - 1)))

    @asynccontextmanager
    async def fetching(self, index: int) -> AsyncIterator[None]:
        """One fetch of this index at a time.  Raises :class:`UnknownKeyID`: ours to draw, or used before."""
        self._check()
        if index not in self._owned(self._end.other) or self._position.was_fetched(index) or index in self._fetching:
            raise UnknownKeyID(f"stream {self._name}: index {index} is not one to fetch, or no longer")
        self._fetching.add(index)
        try:
            yield
        finally:
            self._fetching.discard(index)

    async def fetched(self, index: int) -> None:
        """As :meth:`drawn`."""
        others = self._owned(self._end.other)
        await self._write(lambda position: position.fetched(index, others))

    def claim(self) -> bytes:
        """Stream, end, how far this end used its indexes, how far it saw the other: 26 bytes."""
        position = self._position
        return _CLAIM.pack(
            _CLAIM_VERSION, bytes.fromhex(self._name), self._end.encode(), position.next, position.seen
        )

    def check_claim(self, claim: bytes) -> None:
        """See :class:`keysource.base.Claiming`.  After ``RolledBack`` nothing is given any more."""
        if len(claim) != _CLAIM.size or claim[0] != _CLAIM_VERSION:
            raise BadAnswer(f"stream {self._name}: the peer's claim about its position has another form")
        _version, stream, end, _used, seen = _CLAIM.unpack(claim)
        if stream != bytes.fromhex(self._name):
            raise BadAnswer(f"stream {self._name}: the peer uses another stream, {stream.hex()}")
        if end != self._end.other.encode():
            raise BadAnswer(f'stream {self._name}: both sites say end = "{self._end}"')
        if seen > self._position.next:
            self.refused = RolledBack(
                f"{self._file.path}: says that indexes below {self._position.next} are used, the peer has seen "
                f"{seen}; a backup was restored: agree upon a new stream"
            )
            raise self.refused

    def _owned(self, end: End) -> range:
        match self._owner:
            case Owner.ALTERNATE:
                return range(0 if end is End.A else 1, MOST_INDEX + 1, 2)
            case owner:
                return range(MOST_INDEX + 1 if owner.of(0) is end else 0)

    def _check(self) -> None:
        if self.refused is not None:
            raise self.refused
        if self._worker is None:
            raise Unavailable(f"stream {self._name}: the key source is closed", answered=True)

    async def _write(self, change: Callable[[Position], Position]) -> None:
        worker = self._worker
        if worker is None:
            raise Unavailable(f"stream {self._name}: the key source is closed", answered=True)
        try:
            await asyncio.get_running_loop().run_in_executor(worker, self._write_in_turn, change)
        except OSError as error:
            raise Unavailable(f"{self._file.path}: cannot be written ({error.strerror})", answered=True) from None

    def _write_in_turn(self, change: Callable[[Position], Position]) -> None:
        """In the one worker thread, so in order, and to its end also where the caller is cancelled."""
        position = change(self._position)
        if position != self._position:
            self._file.write(position)
            self._position = position
