"""Health tests of a noise source, as NIST SP 800-90B section 4.4 wants them on every raw sample.

Both look for a source that has broken, not for one that is a little worse than claimed: the *repetition count* for
one that is stuck, the *adaptive proportion* for one that prefers a value.  Their limits follow from the claimed
min-entropy of a sample and the probability :data:`FALSE_ALARM` of a sound source to fail.  What fails
once stays failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from keysource.qkd.errors import BadRandomness

FALSE_ALARM = 2.0**-30
"""Of each test at each sample or window; 90B recommends 2^-20 to 2^-40."""
WINDOW = 512
"""Samples of the adaptive proportion test where samples have more than two values."""
START_UP = 1024
"""Samples that are looked at, and thrown away, before the first is used."""


def repetition_cutoff(entropy: float, false_alarm: float = FALSE_ALARM) -> int:
    """So many equal samples in a row are a failure: 1 + ceil(-log2(a) / H) (90B 4.4.1)."""
    return 1 + math.ceil(-math.log2(false_alarm) / entropy)


def proportion_cutoff(entropy: float, false_alarm: float = FALSE_ALARM, window: int = WINDOW) -> int:
    """So many of a window equal to its first sample are a failure: 1 + the smallest c that a binomial number of
    ``window`` trials with probability 2^-H passes with ``false_alarm`` at most (90B 4.4.2)."""
    p, above = 2.0**-entropy, 0.0
    for count in range(window, 0, -1):
        above += _binomial(window, count, p)
        if above > false_alarm:
            return min(window, 1 + count)
    return 1


def _binomial(trials: int, count: int, p: float) -> float:
    if p >= 1.0:
        return 1.0 if count == trials else 0.0
    ways = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
    return math.exp(ways + count * math.log(p) + (trials - count) * math.log1p(-p))


class HealthTests:
    """Of one source, sample after sample."""

    def __init__(self, entropy: float) -> None:
        """``entropy``: claimed min-entropy of a sample of 8 bits, above 0 to 8."""
        if not 0.0 < entropy <= 8.0:
            raise ValueError("a byte has a min-entropy above 0 and of at most 8 bits")
        self._longest, self._most = repetition_cutoff(entropy), proportion_cutoff(entropy)
        self._last, self._run = -1, 0
        self._first, self._same, self._seen = -1, 0, WINDOW
        self._failed: str | None = None

    def start(self, raw: Callable[[int], bytes]) -> None:
        """The start-up test (90B 4.3).  Raises :class:`BadRandomness`."""
        self.look(raw(START_UP))

    def look(self, samples: bytes) -> None:
        """Raises :class:`BadRandomness` from the first failure on, for ever."""
        for sample in samples:
            if self._failed is None:
                self._failed = self._repetition(sample) or self._proportion(sample)
        if self._failed is not None:
            raise BadRandomness(f"the random number generator failed its health test: {self._failed}")

    def _repetition(self, sample: int) -> str | None:
        self._run = self._run + 1 if sample == self._last else 1
        self._last = sample
        return f"{self._run} equal samples in a row" if self._run >= self._longest else None

    def _proportion(self, sample: int) -> str | None:
        if self._seen == WINDOW:
            self._first, self._same, self._seen = sample, 1, 1
            return None
        self._seen += 1
        self._same += sample == self._first
        if self._same < self._most:
            return None
        return f"one value {self._same} times in {self._seen} samples"
