"""When blocks that gave nothing are an alarm, and when they may still be chance.

An honest link, one that is as its preset says, loses a block now and then.  How often at most is in :data:`CHANCES`;
each such block gives no key, whatever is said of it.  It is an alarm only where chance would raise it less than
about once a year: the chances of all blocks lost in a row are multiplied, and the product times a year's blocks must
be less than :data:`LIMIT`.  A link of five blocks a second has 158 million a year: single blocks beyond their leak
budget, four standard deviations, are fourteen a day there, and two in a row that miss a test of 3.5 are nine a year.
So the number that it takes follows from the link's rate and is in no setting.  Eve in every third block never has two
in a row: for her, blocks are also counted over a window.

:func:`false_alarms` adds up what all this comes to; a test holds it below one a year for every preset.  A year is one
of the link's own time, of its pulses; pauses after lost blocks are not counted, and only lower it.
"""

from __future__ import annotations

import math
from collections import deque

from keysource.qkd.distill.wire import Reason

YEAR = 365.25 * 86400.0
"""Seconds."""
CHANCES = {
    Reason.STATISTICS: 1.0 / 3000.0,  # plan.TEST_MARGIN: once in about 4,300 was measured
    Reason.LEAK: 1e-4,  # plan.LEAK_MARGIN: 3e-5, and twice that where errors are few
    Reason.SHORT: 1e-6,  # plan.SIZE_MARGIN in two bases: 6e-7
    Reason.VERIFY: 1e-3,  # what Cascade leaves wrong; fewer were seen
}
"""Probability, at most, that an honest block gives nothing for this reason."""
CERTAIN = 1.1e-9
"""And for too many check errors, which are an alarm at once."""
LIMIT = 0.05
"""A year, of each way in which lost blocks can follow one another up to an alarm."""
WATCHED, MOST = 32, 3
"""Of so many blocks, so many may be lost by :data:`WINDOWED` reasons without an alarm."""
WINDOWED = (Reason.STATISTICS, Reason.LEAK, Reason.SHORT)


class Doubt:
    """What may still be chance, of the blocks of one end."""

    def __init__(self, block_seconds: float) -> None:
        self._blocks = YEAR / block_seconds
        self._likely = 1.0
        self._lost: deque[bool] = deque(maxlen=WATCHED)

    def passed(self) -> None:
        self._likely = 1.0
        self._lost.append(False)

    def lost(self, reason: Reason) -> bool:
        """Count a block that gave nothing.  Is it more than chance?"""
        self._likely *= CHANCES.get(reason, 0.0)
        self._lost.append(reason in WINDOWED)
        return self._likely * self._blocks < LIMIT or sum(self._lost) > MOST


def false_alarms(block_seconds: float) -> float:
    """How many an honest link raises in a year, at most: all ways in which blocks lost in a row end in an alarm,
    those spread over a window, and check errors."""
    blocks, any_reason = YEAR / block_seconds, sum(CHANCES[reason] for reason in WINDOWED)
    others = sum(
        math.comb(WATCHED - 1, k) * any_reason**k * (1.0 - any_reason) ** (WATCHED - 1 - k)
        for k in range(MOST, WATCHED)
    )
    return _in_a_row(blocks) + blocks * any_reason * others + blocks * CERTAIN


def _in_a_row(expected: float) -> float:
    """Alarms a year, given that sequences so far are ``expected`` a year."""
    following = [expected * chance for chance in CHANCES.values()]
    return sum(each if each < LIMIT else _in_a_row(each) for each in following)
