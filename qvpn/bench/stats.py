"""Medians, spreads and ratios of figures that were taken in interleaved rounds.

Rounds are compared with themselves: a ratio is taken within each round and then the median of the ratios, so that a
machine that was slow for a minute slows both sides of a ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Series = Sequence[float | None]
"""One figure, round by round; None where it could not be taken."""


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of ``count`` values."""

    median: float
    low: float
    high: float
    count: int


def spread(series: Series) -> Spread | None:
    """None where no round has a value."""
    values = [value for value in series if value is not None]
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(ours: Series, theirs: Series) -> list[float]:
    """Ours divided by theirs in each round that has both."""
    return [a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b]


def ratio(ours: Series, theirs: Series) -> Spread | None:
    """The spread of the rounds' ratios."""
    return spread(ratios(ours, theirs))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (0..1) of all values do not exceed; raises ValueError if empty."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]
