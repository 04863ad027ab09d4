"""Putting messages together again, within bounds (PROTOCOL.md, chapter 3, "Reassembly")."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from qvpn.errors import BadPacket
from qvpn.wire.datagram import MAX_MESSAGE

LIFETIME = 5.0
"""Seconds that a message in parts may wait for the rest."""


class PoolFull(BadPacket):
    """No room for another message in parts."""


@dataclass(slots=True)
class _Partial:
    count: int
    suite: int
    deadline: float
    groups: tuple[Hashable, ...]
    size: int = 0
    pieces: dict[int, bytes] = field(default_factory=dict)


class Reassembler:
    """One pool.  ``total`` messages in parts at most, and per group as many as :meth:`add` is told."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._partial: dict[Hashable, _Partial] = {}

    def __len__(self) -> int:
        return len(self._partial)

    def add(
        self,
        key: Hashable,
        limits: Sequence[tuple[Hashable, int]],
        suite: int,
        index: int,
        count: int,
        fragment: bytes,
        now: float,
        *,
        reserved: int = 0,
    ) -> bytes | None:
        """The message, once complete, else None.

        ``limits``: (group, most messages in parts of it); ``reserved`` places of the pool stay free for others.

        Raises:
            PoolFull: the fragment would begin a message that has no room.
            BadPacket: it disagrees with the fragments before, or is there already.
        """
        if count == 1:
            if key in self._partial:
                raise BadPacket("fragment disagrees with those before")
            return fragment
        self._expire(now)
        partial = self._partial.get(key)
        if partial is None:
            partial = self._begin(key, limits, suite, count, now, reserved)
        if partial.count != count or partial.suite != suite:
            raise BadPacket("fragment disagrees with those before")
        if index in partial.pieces:
            if partial.pieces[index] != fragment:
                raise BadPacket("fragment disagrees with the first one of its number")
            return None  # a retransmission: nothing new
        if partial.size + len(fragment) > MAX_MESSAGE:
            del self._partial[key]
            raise BadPacket(f"message of more than {MAX_MESSAGE} bytes")
        partial.pieces[index] = fragment
        partial.size += len(fragment)
        if len(partial.pieces) < count:
            return None
        del self._partial[key]
        return b"".join(partial.pieces[place] for place in range(count))

    def _begin(
        self, key: Hashable, limits: Sequence[tuple[Hashable, int]], suite: int, count: int, now: float, reserved: int
    ) -> _Partial:
        if len(self._partial) >= self._total - reserved:
            raise PoolFull("too many messages in parts")
        for group, most in limits:
            if sum(group in partial.groups for partial in self._partial.values()) >= most:
                raise PoolFull(f"too many messages in parts from {group}")
        partial = _Partial(count, suite, now + LIFETIME, tuple(group for group, _ in limits))
        self._partial[key] = partial
        return partial

    def _expire(self, now: float) -> None:
        for key in [key for key, partial in self._partial.items() if partial.deadline <= now]:
            del self._partial[key]
