"""Putting messages together again, within bounds (PROTOCOL.md, chapter 3, "Reassembly")."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qvpn.errors import BadPacket
from qvpn.wire.datagram import MAX_MESSAGE

LIFETIME = 5.0
"""Seconds that a message in parts may wait for the rest."""


class Part(Protocol):
    """What a datagram and an inner fragment have in common."""

    @property
    def suite(self) -> int: ...

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def fragment(self) -> bytes: ...


class PoolFull(BadPacket):
    """No room for another message in parts."""


@dataclass(slots=True)
class _Partial:
    count: int
    suite: int
    deadline: float
    groups: tuple[Hashable, ...]
    pieces: dict[int, bytes] = field(default_factory=dict)


class Reassembler:
    """One pool of ``total`` messages in parts."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._partial: dict[Hashable, _Partial] = {}

    def __len__(self) -> int:
        return len(self._partial)

    def add(
        self, key: Hashable, limits: Sequence[tuple[Hashable, int]], part: Part, now: float, *, reserved: int = 0
    ) -> bytes | None:
        """The message, once complete, else None.

        ``limits``: (group, most messages in parts of it); the oldest of a full group gives way.  ``reserved`` places
        of the pool stay free for others.

        Raises:
            PoolFull: the fragment would begin a message and the pool has no room.
            BadPacket: it disagrees with the fragments before.
        """
        if part.count == 1:
            if key in self._partial:
                raise BadPacket("fragment disagrees with those before")
            return part.fragment
        self._expire(now)
        partial = self._partial.get(key)
        if partial is None:
            partial = self._begin(key, limits, part, now, reserved)
        if partial.count != part.count or partial.suite != part.suite:
            raise BadPacket("fragment disagrees with those before")
        known = partial.pieces.setdefault(part.index, part.fragment)
        if known != part.fragment:
            raise BadPacket("fragment disagrees with the first one of its number")
        if sum(map(len, partial.pieces.values())) > MAX_MESSAGE:
            del self._partial[key]
            raise BadPacket(f"message of more than {MAX_MESSAGE} bytes")
        if len(partial.pieces) < part.count:
            return None
        del self._partial[key]
        return b"".join(partial.pieces[place] for place in range(part.count))

    def _begin(
        self, key: Hashable, limits: Sequence[tuple[Hashable, int]], part: Part, now: float, reserved: int
    ) -> _Partial:
        for group, most in limits:
            members = [other for other, partial in self._partial.items() if group in partial.groups]
            if len(members) >= most:
                del self._partial[members[0]]
        if len(self._partial) >= self._total - reserved:
            raise PoolFull("too many messages in parts")
        partial = _Partial(part.count, part.suite, now + LIFETIME, tuple(group for group, _ in limits))
        self._partial[key] = partial
        return partial

    def _expire(self, now: float) -> None:
        for key in [key for key, partial in self._partial.items() if partial.deadline <= now]:
            del self._partial[key]
