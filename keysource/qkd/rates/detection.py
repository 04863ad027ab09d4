"""How many published bits it takes to notice Eve: a sequential test of the error ratio (Wald 1945).

With errors at ``baseline`` without her and ``baseline + p / 4`` with her on the fraction p, no test with false-alarm
rate alpha needs fewer bits on average than about ln(1 / alpha) / D, D the relative entropy of the two in nats.
"""

from __future__ import annotations

import math

import numpy as np

from keysource.qkd.distill.bits import Bits


def divergence(p: float, q: float) -> float:
    """Relative entropy of two coins in nats."""
    return p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q))


def expected_bits(fraction: float, baseline: float = 0.02, false_alarm: float = 1e-9) -> float:
    """Published check bits until the alarm, on average."""
    return math.log(1.0 / false_alarm) / divergence(baseline + fraction / 4.0, baseline)


def bits_until_alarm(errors: Bits, fraction: float, baseline: float = 0.02, false_alarm: float = 1e-9) -> int | None:
    """Run the test over check bits in order (1 = error): how many it took, None where there is no alarm."""
    there = baseline + fraction / 4.0
    wrong, right = math.log(there / baseline), math.log((1.0 - there) / (1.0 - baseline))
    score = np.cumsum(np.where(errors == 1, wrong, right))
    over = np.flatnonzero(score >= math.log(1.0 / false_alarm))
    return int(over[0]) + 1 if len(over) else None
