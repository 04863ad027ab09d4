"""Entropy of one bit."""

from __future__ import annotations

import math


def binary_entropy(x: float) -> float:
    """h(x) = -x log2 x - (1-x) log2(1-x) in bits; 0 outside of 0 < x < 1."""
    if not 0.0 < x < 1.0:
        return 0.0
    return -x * math.log2(x) - (1.0 - x) * math.log2(1.0 - x)
