"""When to tell senders that packets wait too long: CoDel (RFC 8289), packet by packet.

A queue that stands longer than :data:`TARGET` for a whole :data:`INTERVAL` serves nobody: one packet is marked or
dropped, and then another each time that the control law says, until the wait falls below the target.  A burst that
drains within the interval is left alone.
"""

from __future__ import annotations

from math import sqrt

TARGET = 0.005
"""Seconds that packets may wait for good (RFC 8289, 4.4: 5 to 10 % of the interval)."""

INTERVAL = 0.1
"""Seconds of one longer wait after which senders are told: about the longest common round trip (RFC 8289, 4.3)."""

_RECENT = 16
"""Intervals within which a new episode goes on at the rate of the last one (RFC 8289, 5.6)."""


class CoDel:
    """The state of one queue.  Ask :meth:`judge` once for each packet that leaves it, in order."""

    __slots__ = (
        "_chosen",
        "_count",
        "_dropping",
        "_entered",
        "_first_above",
        "_interval",
        "_last_count",
        "_next",
        "_target",
    )

    def __init__(self, target: float = TARGET, interval: float = INTERVAL) -> None:
        """Both in seconds."""
        self._target = target
        self._interval = interval
        self._first_above: float | None = None
        """When the wait will have been above the target for an interval."""
        self._dropping = self._entered = self._chosen = False
        """In an episode; its first packet, or another of it, was the one before this."""
        self._next = 0.0
        self._count = self._last_count = 0

    def judge(self, waited: float, last: bool, now: float) -> bool:
        """True: mark or drop this packet.

        ``waited`` is what it spent in the queue, in seconds; ``last``: too little is left behind it to be a queue.
        """
        above = self._above(waited, last, now)
        if self._dropping:
            return self._go_on(above, now)
        if above:
            self._enter(now)
        return above

    def emptied(self) -> None:
        """Nothing is left in the queue."""
        self._first_above = None
        self._dropping = self._entered = self._chosen = False

    def _above(self, waited: float, last: bool, now: float) -> bool:
        """``ok_to_drop`` of the RFC."""
        if waited < self._target or last:
            self._first_above = None
            return False
        if self._first_above is None:
            self._first_above = now + self._interval
            return False
        return now >= self._first_above

    def _enter(self, now: float) -> None:
        recently = self._count - self._last_count
        again = recently > 1 and now - self._next < _RECENT * self._interval
        self._count = self._last_count = recently if again else 1
        self._dropping = self._entered = True
        self._next = now + self._interval / sqrt(self._count)

    def _go_on(self, above: bool, now: float) -> bool:
        if self._entered:  # the RFC hands out the packet after the first dropped one whatever it waited
            self._entered = False
            return False
        if not above:
            self._dropping = self._chosen = False
            return False
        if self._chosen:
            self._chosen = False
            self._next += self._interval / sqrt(self._count)
        if now < self._next:
            return False
        self._count += 1
        self._chosen = True
        return True
