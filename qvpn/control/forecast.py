"""How long a key source's stock lasts at the rekey intervals of the peers that draw from it, and what to do about it.

Nothing is drawn ahead of its need: a key is asked for when the peer has said that its source is ready too, so an
outage at one end costs the keys of one attempt.  What can be done about a stock that runs dry is to use less of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

WARN_REKEYS, WARN_SECONDS = 10, 600.0
"""A stock that lasts for less than so many rekeys of the quickest peer, or seconds, is about to run dry."""
WINDOW, LEAST = 600.0, 60.0
"""Seconds over which arrivals are measured, and after which the measurement is believed."""


class Supply:
    """How quickly keys come that this end may draw, from what a source says of its stock time and again.  Sans-IO.

    What others draw from the same stock between two looks hides keys that came: by that the rate is never too high.
    """

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None
        self._since = math.inf
        self._arrivals: deque[tuple[float, int]] = deque()

    def note(self, stored: int | None, drawn: int, now: float) -> None:
        """The source was asked.  ``drawn``: keys that were drawn from it so far; ``now`` in seconds of any clock."""
        if stored is None:
            self._last = None
            return
        self._since = min(self._since, now)
        if self._last is not None and (came := stored - self._last[0] + drawn - self._last[1]) > 0:
            self._arrivals.append((now, came))
        self._last = stored, drawn
        while self._arrivals and self._arrivals[0][0] <= now - WINDOW:
            self._arrivals.popleft()

    def rate(self, now: float) -> float | None:
        """Keys per second; None until that can be said."""
        elapsed = min(WINDOW, now - self._since)
        return sum(count for _at, count in self._arrivals) / elapsed if elapsed >= LEAST else None


def lasts(stored: int | None, rekeys: Sequence[float]) -> float | None:
    """Seconds that ``stored`` keys last when each peer draws one per its rekey interval (seconds), and none arrives.

    An upper bound of what is used: the other end starts some of the epochs.  None where nothing can be said.
    """
    use = sum(1 / rekey for rekey in rekeys)
    return None if stored is None or use == 0 else stored / use


def runs_dry(stored: int | None, key_rate: float | None, rekeys: Sequence[float]) -> bool:
    """Is it time to warn?  Not while as many keys arrive as are used."""
    left = lasts(stored, rekeys)
    if left is None or (key_rate is not None and key_rate >= sum(1 / rekey for rekey in rekeys)):
        return False
    return left < max(WARN_SECONDS, WARN_REKEYS * min(rekeys))


def best_rate(measured: float | None, said: float | None) -> float | None:
    """Keys per second for this end.  What a source says counts both ends' keys, where owners alternate; half of it is
    sure to be ours."""
    if measured is None:
        return said
    return measured if said is None else max(measured, said / 2)


def stretch(stored: int | None, key_rate: float | None, rekeys: Sequence[float]) -> float:
    """How many times further apart the epochs should begin so that no more keys are used than arrive; 1 while the
    stock is good, infinite where none arrives."""
    if not runs_dry(stored, key_rate, rekeys):
        return 1.0
    return sum(1 / rekey for rekey in rekeys) / key_rate if key_rate else math.inf
