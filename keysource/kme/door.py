"""Who may wait at a listener's door without having shown a certificate, and who goes first when too many do.

A connection costs a descriptor before TLS has said anything about its other end, so those without a certificate are
bounded, in all and for each source.  Nobody is kept waiting outside, for then a flood would hold the queue: a new
one always gets in, and the one that has waited longest goes, of the same source where that has its fill, otherwise
of the source that has most.  An SAE needs milliseconds for its handshake; idle connections wait for nothing.
"""

from __future__ import annotations

import ipaddress
from typing import Generic, TypeVar

_IPV6_SITE = 64  # bits: who has one address of IPv6 has all of the network
_V = TypeVar("_V")


def source_of(host: str) -> str:
    """An address of IPv4, or a network of IPv6: what one sender can be thought to have."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, _IPV6_SITE), strict=False)) if address.version == 6 else str(address)


class Door(Generic[_V]):
    """Visitors that wait, oldest first."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[_V, None]] = {}
        self._sources: dict[_V, str] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def enter(self, visitor: _V, source: str, most: int, most_of_a_source: int) -> _V | None:
        """Let one in; the one that is returned has to go and is here no more.  Both bounds are at least 1."""
        self._sources[visitor] = source
        mine = self._waiting.setdefault(source, {})
        mine[visitor] = None
        if len(mine) > most_of_a_source:
            return self._oldest(source)
        return self._oldest(max(self._waiting, key=self._count)) if len(self) > most else None

    def leave(self, visitor: _V) -> None:
        """Its handshake is over, or it was sent away already."""
        source = self._sources.pop(visitor, None)
        if source is not None:
            del self._waiting[source][visitor]
            if not self._waiting[source]:
                del self._waiting[source]

    def shed(self) -> list[_V]:
        """Half of all, those that have waited longest; they are here no more."""
        gone = list(self._sources)[: -(-len(self) // 2)]
        for visitor in gone:
            self.leave(visitor)
        return gone

    def _count(self, source: str) -> int:
        return len(self._waiting[source])

    def _oldest(self, source: str) -> _V:
        visitor = next(iter(self._waiting[source]))
        self.leave(visitor)
        return visitor
