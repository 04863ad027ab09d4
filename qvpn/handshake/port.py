"""What the machines of one UDP port share: indexes that never collide, and quotas for half-open answers."""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable

from qvpn.wire.messages import INDEX_BYTES, NO_INDEX

HALF_OPEN_PER_SOURCE = 4
HALF_OPEN_TOTAL = 256
HALF_OPEN_RESERVED = 32
"""Places of the total that only configured endpoints get."""


def source_prefix(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Hashable:
    """What counts as one source: an IPv4 address or an IPv6 /64."""
    return ip if ip.version == 4 else ip.packed[:8]


ATTEMPT, ENTRY, EPOCH = "attempt", "entry", "epoch"
"""What an index belongs to: only an attempt waits for M2 and M4, only an entry for M3."""

ANSWERS_PER_SOURCE, ANSWERS_TOTAL = 4.0, 50.0
"""M1 a second that are worth a key exchange and two signatures (about 2 ms): per source, and from all strangers."""
REMEMBERED = 1024


class Rate:
    """A token bucket per source that holds one second's worth, and one for all."""

    def __init__(self, per_source: float, total: float) -> None:
        self._per_source, self._total = per_source, total
        self._sources: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()
        self._all = (total, 0.0)

    def take(self, source: Hashable, now: float) -> bool:
        own = self._refilled(self._sources.get(source, (self._per_source, now)), self._per_source, now)
        everyone = self._refilled(self._all, self._total, now)
        if own < 1 or everyone < 1:
            return False
        self._sources[source] = (own - 1, now)
        self._sources.move_to_end(source)
        if len(self._sources) > REMEMBERED:
            self._sources.popitem(last=False)
        self._all = (everyone - 1, now)
        return True

    @staticmethod
    def _refilled(state: tuple[float, float], rate: float, now: float) -> float:
        tokens, at = state
        return min(rate, tokens + max(0.0, now - at) * rate)


class Port:
    """Indexes by owner, and the count of half-open answers by source."""

    def __init__(self, token: Callable[[int], bytes]) -> None:
        self._token = token
        self._owners: dict[bytes, tuple[str, str]] = {}
        self._half_open: Counter[Hashable] = Counter()
        self._rate = Rate(ANSWERS_PER_SOURCE, ANSWERS_TOTAL)

    def allocate(self, owner: str, kind: str) -> bytes:
        """A fresh index of this host, random, with the lane's four bits zero."""
        while True:
            raw = self._token(INDEX_BYTES)
            index = raw[:3] + bytes([raw[3] & 0xF0])
            if index != NO_INDEX and index not in self._owners:
                self._owners[index] = owner, kind
                return index

    def becomes_epoch(self, index: bytes) -> None:
        """The attempt is over, its index lives on as that of its epoch."""
        self._owners[index] = self._owners[index][0], EPOCH

    def release(self, index: bytes) -> None:
        self._owners.pop(index, None)

    def owner(self, index: bytes, kind: str) -> str | None:
        """Name of the peer who has the index for this kind of thing."""
        owner, has = self._owners.get(index, (None, ""))
        return owner if has == kind else None

    def admit(self, source: Hashable, configured: bool, now: float) -> bool:
        """Take a place for a half-open answer; False: none is left for this source, or it asks too often.

        A known endpoint is outside the total and the rate: whoever reaches us from there has its cookie.
        """
        if self._half_open[source] >= HALF_OPEN_PER_SOURCE:
            return False
        full = self._half_open.total() >= HALF_OPEN_TOTAL - HALF_OPEN_RESERVED
        if not configured and (full or not self._rate.take(source, now)):
            return False
        self._half_open[source] += 1
        return True

    def leave(self, source: Hashable) -> None:
        """Give the place back."""
        self._half_open[source] -= 1
        if self._half_open[source] <= 0:
            del self._half_open[source]
