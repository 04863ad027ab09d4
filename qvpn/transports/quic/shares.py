"""What strangers may cost, and that they use up nothing that belongs to others.

Two things are rationed: connections that are opened to us (a key exchange and a signature each), and datagrams of
connections that no peer has proved to be his.  Each source has a share of its own, and what strangers take comes out
of one pot besides.  Sources that are *expected*, which the configuration names or where a peer has been, need only
their own share: strangers cannot keep them out, however many there are.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from qvpn.netio.base import Address

REMEMBERED = 4096
"""Sources, and expected addresses; the one that was seen longest ago is forgotten first."""

LATELY = 60.0
"""Seconds for which a source that has taken something is no newcomer."""

Source = Hashable


class Sources:
    """What counts as one source, and who is expected."""

    def __init__(self) -> None:
        self._expected: OrderedDict[ipaddress.IPv4Address | ipaddress.IPv6Address, None] = OrderedDict()

    def expect(self, place: Address) -> None:
        """A peer is, or has been, at this IP address; his port may change."""
        self._expected[place.ip] = None
        self._expected.move_to_end(place.ip)
        if len(self._expected) > REMEMBERED:
            self._expected.popitem(last=False)

    def expects(self, place: Address) -> bool:
        return place.ip in self._expected

    def of(self, place: Address) -> Source:
        """An expected address, any IPv4 address, or an IPv6 /48, which anybody can have whole."""
        if place.ip.version == 4 or place.ip in self._expected:
            return place.ip
        return place.ip.packed[:6]


class Bucket:
    """Tokens that come back at a rate.  Times in seconds."""

    __slots__ = ("_at", "level")

    def __init__(self, level: float, now: float) -> None:
        self.level = level
        self._at = now

    def fill(self, rate: float, most: float, now: float) -> float:
        """What is in it now."""
        self.level = min(most, self.level + max(0.0, now - self._at) * rate)
        self._at = now
        return self.level


@dataclass(frozen=True, slots=True)
class Rates:
    """``each`` a second and ``burst`` at once for one source; ``together`` and ``together_burst`` for all strangers.

    Of the latter ``newcomers`` are kept for sources that had nothing in the last :data:`LATELY` seconds: who comes
    again and again, from however many places, leaves these to who comes once.
    """

    each: float
    burst: float
    together: float
    together_burst: float
    newcomers: float = 0.0


class Shares:
    """One thing that is rationed."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._sources: OrderedDict[Source, tuple[Bucket, float]] = OrderedDict()
        """Its tokens, and when it took one last."""
        self._together = Bucket(rates.together_burst, 0.0)

    def take(self, source: Source, now: float, *, expected: bool = False) -> bool:
        """Use one up; False, and nothing used, if this source has none left, or is a stranger and all have none."""
        rates = self._rates
        bucket, last = self._sources.get(source) or (Bucket(rates.burst, now), float("-inf"))
        if bucket.fill(rates.each, rates.burst, now) < 1:
            return False
        if not expected:
            kept = rates.newcomers if now - last < LATELY else 0.0
            if self._together.fill(rates.together, rates.together_burst, now) < 1 + kept:
                return False
            self._together.level -= 1
        bucket.level -= 1
        self._sources[source] = (bucket, now)
        self._sources.move_to_end(source)
        if len(self._sources) > REMEMBERED:
            self._sources.popitem(last=False)
        return True
