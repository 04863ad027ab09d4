"""Path MTU by asking the peer: packetization layer path MTU discovery, in the spirit of RFC 8899, without I/O.

A *probe* is a datagram of a chosen size that the peer answers in a few bytes.  Sizes are bytes of UDP payload; what
the path carries in our direction lies between ``low``, which is believed to pass, and ``high``, which is not.  A
search goes in rounds: a few sizes at once, and beside them a tiny probe.  Only where something of a round was
answered can another size of it have been too big - else it is the peer that is silent, and nothing is learned.  How
many such rounds condemn a size depends on how many tiny probes got lost lately: a lossy path is not a narrow one.

Nothing that an outsider sends takes part.  Who can drop datagrams on the way can make the search end lower (as he
can drop the packets themselves), but not below ``floor``.

Phases of RFC 8899, 5.2: *base* and *search* are one here (``not settled``), *search complete* is ``settled``, and
*error* is a search that had to go below the base.  Times are seconds, given as arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BASE = 1200
"""Payload that every path of today is expected to carry (RFC 8899, 5.1.2): where a broken path falls to first."""

FLOOR = 618
"""Payload with which an inner packet of 576 bytes passes, the least that IPv4 hosts must take."""

TINY = 64
"""Payload of the probe that tells a silent peer from a narrow path."""

COMMON_MTUS = (1280, 1400, 1420, 1450, 1480, 1492, 1500, 4470, 9000)
"""Of links and tunnels in use; where a search looks first."""

WIDTH = 9
"""Sizes in one round."""

CONFIRM = 1.0
"""Seconds between two proofs that the size still passes, while packets are sent."""

RAISE_FIRST, RAISE_LAST = 30.0, 600.0
"""Seconds after which a search below the link's size is tried again; doubled after each in vain (RFC 8899, 5.1.1)."""

FIRST_WAIT, LEAST_WAIT, MOST_WAIT = 0.5, 0.2, 3.0
"""Seconds until a round is over: before anything was answered, and the bounds once round trips are known."""

SILENT_WAIT, DEAF_WAIT = 5.0, 60.0
"""Longest wait between rounds to a peer that is silent now, and to one that never answered (an older version)."""

LATE = 5.0
"""Seconds in which an answer still counts."""

MAX_ROUNDS = 150
"""Rounds of one search: then it ends with what it has, and the next one may do better."""

FALSE_ALARM = 1e-3
"""How likely a size that passes may be condemned, under independent loss."""

FALSE_FALL = 1e-5
"""The same for the size in use, which is asked once a second."""

LEAST_MISSES, MOST_MISSES = 3, 20


@dataclass(frozen=True, slots=True)
class Probe:
    """A datagram to send now: its number, and its size in bytes of UDP payload."""

    number: int
    size: int


class _Loss:
    """How many datagrams that surely fit were not answered."""

    def __init__(self) -> None:
        self._sent, self._lost = 0.0, 0.0

    def count(self, lost: int, passed: int = 0) -> None:
        self._sent, self._lost = self._sent + lost + passed, self._lost + lost
        if self._sent >= 64:
            self._sent, self._lost = self._sent / 2, self._lost / 2

    def misses(self, chance: float) -> int:
        """How many misses in a row chance explains with less than this probability."""
        share = (self._lost + 0.1) / (self._sent + 1)
        return min(MOST_MISSES, max(LEAST_MISSES, math.ceil(math.log(chance) / math.log(share))))


class _RoundTrip:
    """How long an answer takes (RFC 6298, without its clock granularity)."""

    def __init__(self) -> None:
        self._mean: float | None = None
        self._deviation = 0.0

    def measure(self, seconds: float) -> None:
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
            return
        self._deviation += (abs(seconds - self._mean) - self._deviation) / 4
        self._mean += (seconds - self._mean) / 8

    def wait(self) -> float:
        if self._mean is None:
            return FIRST_WAIT
        return min(MOST_WAIT, max(LEAST_WAIT, 1.25 * self._mean + 4 * self._deviation))


class PathSearch:
    """What one direction of one path carries.

    The driver sends what :meth:`probes` gives, reports answers with :meth:`answered`, and comes again at
    :meth:`next_timer`.  :attr:`size` is what datagrams may have at any time.
    """

    def __init__(self, ceiling: int, headers: int, now: float) -> None:
        """``ceiling``: what the first link carries; ``headers``: of IP and UDP outside (28 or 48)."""
        self._headers = headers
        self._loss = _Loss()
        self._round_trip = _RoundTrip()
        self._number = 0
        self._outstanding: dict[int, tuple[int, float]] = {}
        """Size and time of what may still be answered, by number."""
        self._round: dict[int, int] = {}
        """Sizes of this round that are not answered yet, by number."""
        self._round_ends: float | None = None
        self._round_alive = False
        self._misses: dict[int, int] = {}
        self._rounds = self._silent = 0
        self._searching, self._starts = True, now
        self._traffic = False
        self._confirm_at = self._raise_at = math.inf
        self._raise_after = RAISE_FIRST
        self.ceiling = max(1, ceiling)
        self.low, self.high = self.base, self.ceiling + 1
        self._low_known = False
        self.assumed = True
        """Nothing is known yet: the link's own size is used until it turns out not to pass."""
        self.settled = False
        """``size`` is the result of a finished search."""
        self.changed_at = now
        self.sent = self.replies = self.falls = 0
        """Probes sent, probes answered, and how often a size that used to pass passed no more."""

    @property
    def base(self) -> int:
        return min(BASE, self.ceiling)

    @property
    def floor(self) -> int:
        return min(FLOOR, self.ceiling)

    @property
    def size(self) -> int:
        """Bytes of UDP payload that a datagram may have now."""
        return self.ceiling if self.assumed else self.low

    # what the driver reports

    def set_ceiling(self, ceiling: int, now: float) -> None:
        """The first link carries so much now."""
        ceiling = max(1, ceiling)
        if ceiling == self.ceiling:
            return
        self.ceiling, self.low = ceiling, min(self.low, ceiling)
        self._restart(now)
        self.changed_at = now

    def moved(self, headers: int, now: float) -> None:
        """The peer is elsewhere: what passed before is tried first, and the link's own size beside it."""
        self._headers = headers
        self._restart(now)

    def woken(self, now: float) -> None:
        """An epoch is there: a peer that was silent may answer now; one that never did is asked once."""
        if self.replies:
            self._silent = 0
        if self._round_ends is not None:
            self._round_ends = min(self._round_ends, now + self._round_trip.wait())
        elif self._searching:
            self._starts = min(self._starts, now)

    def traffic(self, now: float) -> None:
        """Packets are being sent: a path that breaks must be noticed."""
        if not self._traffic:
            self._traffic, self._confirm_at = True, max(self._confirm_at, now)

    def answered(self, number: int, size: int, now: float) -> bool:
        """The peer got probe ``number`` in a datagram of ``size`` bytes; False if that is no probe of ours."""
        probe = self._outstanding.get(number)
        if probe is None or probe[0] != size:
            return False
        del self._outstanding[number]
        self.replies += 1
        self._silent = 0
        self._round_trip.measure(now - probe[1])
        if self._round.pop(number, None) is not None:
            self._round_alive = True
        if size <= TINY:
            self._loss.count(0, passed=1)
        if size >= self.low:
            self._passed(size, now)
        if not self._round and self._round_ends is not None:
            self._round_ends = min(self._round_ends, now)
        return True

    # the rounds

    def next_timer(self) -> float:
        """When :meth:`probes` is to be called; infinite: not before something is reported."""
        if self._round_ends is not None:
            return self._round_ends
        if self._searching:
            return self._starts
        return min(self._confirm_at if self._traffic else math.inf, self._raise_at)

    def probes(self, now: float) -> list[Probe]:
        """What to send now; nothing if nothing is due."""
        if now < self.next_timer():
            return []
        if self._round_ends is not None:
            self._end_round(now)
            if not self._searching:
                return []
        if not self._searching:
            self._search_again(now)
        return self._begin_round(now)

    def _search_again(self, now: float) -> None:
        """It is time to prove the size in use again, or to try more."""
        if now >= self._raise_at:
            self.high = self.ceiling + 1
            self._raise_after = min(RAISE_LAST, 2 * self._raise_after)
        self._searching, self._low_known = True, False
        self._rounds = 0
        self._misses.clear()

    def _begin_round(self, now: float) -> list[Probe]:
        self._outstanding = {n: probe for n, probe in self._outstanding.items() if now - probe[1] < LATE}
        probes = []
        for size in dict.fromkeys([min(TINY, self.low), *self._sizes()]):
            self._number = (self._number + 1) & 0xFFFFFFFF
            probes.append(Probe(self._number, size))
            self._outstanding[self._number] = (size, now)
            self._round[self._number] = size
        self.sent += len(probes)
        self._rounds += 1
        self._round_alive = False
        self._round_ends = now + max(self._round_trip.wait(), self._patience())
        return probes

    def _patience(self) -> float:
        """Silence makes rounds rarer: the peer, or the whole path, is away."""
        longest = SILENT_WAIT if self.replies else DEAF_WAIT
        return min(longest, FIRST_WAIT * 2.0 ** min(self._silent, 10)) if self._silent else 0.0

    def _sizes(self) -> list[int]:
        """What is worth asking: the size in use if that is not proved, and where the limit may lie."""
        sizes = [] if self._low_known else [self.low]
        if self.high > self.ceiling > self.low:
            return [*sizes, self.ceiling] if self.low == self.base else [*sizes, self.low + 1, self.ceiling]
        return sizes + self._between()

    def _between(self) -> list[int]:
        usual = [mtu - self._headers for mtu in COMMON_MTUS if self.low < mtu - self._headers < self.high]
        if usual:
            return usual[:WIDTH]
        first, gap = self.low + 1, self.high - self.low - 1
        count = min(WIDTH, gap)
        return [first + gap * step // count for step in range(count)]

    def _end_round(self, now: float) -> None:
        missed = list(self._round.values())
        self._round.clear()
        self._round_ends, self._starts = None, now
        if not self._round_alive:
            self._silent += 1
            return
        for size in missed:
            if size <= TINY:
                self._loss.count(1)
            elif self.low <= size < self.high:
                self._misses[size] = self._misses.get(size, 0) + 1
        self._condemn(now)
        if (self._low_known and self.high == self.low + 1) or self._rounds >= MAX_ROUNDS:
            self._settle(now)

    def _condemn(self, now: float) -> None:
        """Sizes that were missed too often do not pass."""
        if not self._low_known and self._misses.get(self.low, 0) >= self._loss.misses(FALSE_FALL):
            self._fall(now)
            return
        wanted = self._loss.misses(FALSE_ALARM)
        failed = [size for size, misses in self._misses.items() if misses >= wanted and size > self.low]
        if not failed:
            return
        self.high = min(failed)
        self._misses = {size: misses for size, misses in self._misses.items() if size < self.high}
        if self.assumed and self.high <= self.ceiling:
            self.assumed, self.changed_at = False, now

    def _fall(self, now: float) -> None:
        """The size in use passes no more."""
        lower = next((size for size in (self.base, self.floor) if size < self.low), None)
        if lower is None:  # not even the floor: there is nothing less to send
            self._low_known, self.high = True, self.low + 1
            return
        self.high, self.low = self.low, lower
        self.falls += 1
        self._low_known = self.assumed = self.settled = False
        self._misses.clear()
        self._outstanding.clear()  # sent while the path was another one
        self._rounds, self._raise_at, self._raise_after = 0, math.inf, RAISE_FIRST
        self.changed_at = now

    def _passed(self, size: int, now: float) -> None:
        """A size that is at least the one in use got through."""
        if missed := self._misses.get(size, 0):
            self._loss.count(missed, passed=1)  # what was missed of it, loss had taken
        if size > self.low:
            self.changed_at = now
        self.low, self._low_known = size, True
        self.high = max(self.high, size + 1)
        self._misses = {other: misses for other, misses in self._misses.items() if other > size}
        if size >= self.ceiling:
            self.assumed = False

    def _settle(self, now: float) -> None:
        """The search is over, until traffic wants a proof or it is time to try more."""
        self._searching, self.settled, self.assumed = False, True, False
        self._traffic, self._confirm_at = False, now + CONFIRM
        if self.low >= self.ceiling:
            self._raise_at, self._raise_after = math.inf, RAISE_FIRST
        elif self._raise_at == math.inf or self._raise_at <= now:
            self._raise_at = now + self._raise_after

    def _restart(self, now: float) -> None:
        self._outstanding.clear()
        self._round.clear()
        self._misses.clear()
        self._round_ends = None
        self.high = self.ceiling + 1
        self._low_known = self.settled = False
        self._searching, self._starts = True, now
        self._rounds = self._silent = 0
        self._raise_at, self._raise_after = math.inf, RAISE_FIRST
