"""What the machines of one UDP port share: indexes that never collide, and quotas for half-open answers."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Hashable

from qvpn.wire.messages import INDEX_BYTES, NO_INDEX

HALF_OPEN_PER_SOURCE = 4
HALF_OPEN_TOTAL = 256
HALF_OPEN_RESERVED = 32
"""Places of the total that only configured endpoints get."""


def source_prefix(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Hashable:
    """What counts as one source: an IPv4 address or an IPv6 /64."""
    return ip if ip.version == 4 else ip.packed[:8]


class Port:
    """Indexes by owner, and the count of half-open answers by source."""

    def __init__(self, token: Callable[[int], bytes]) -> None:
        self._token = token
        self._owners: dict[bytes, str] = {}
        self._half_open: Counter[Hashable] = Counter()

    def allocate(self, owner: str) -> bytes:
        """A fresh index of this host, random, with the lane's four bits zero."""
        while True:
            raw = self._token(INDEX_BYTES)
            index = raw[:3] + bytes([raw[3] & 0xF0])
            if index != NO_INDEX and index not in self._owners:
                self._owners[index] = owner
                return index

    def release(self, index: bytes) -> None:
        self._owners.pop(index, None)

    def owner(self, index: bytes) -> str | None:
        """Name of the peer whose attempt, entry or epoch has the index."""
        return self._owners.get(index)

    def admit(self, source: Hashable, configured: bool) -> bool:
        """Take a place for a half-open answer; False: none is left for this source."""
        room = HALF_OPEN_TOTAL - (0 if configured else HALF_OPEN_RESERVED)
        if self._half_open[source] >= HALF_OPEN_PER_SOURCE or self._half_open.total() >= room:
            return False
        self._half_open[source] += 1
        return True

    def leave(self, source: Hashable) -> None:
        """Give the place back."""
        self._half_open[source] -= 1
        if self._half_open[source] <= 0:
            del self._half_open[source]
