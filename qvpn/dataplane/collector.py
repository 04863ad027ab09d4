"""Python's garbage collector in a process that moves packets."""

from __future__ import annotations

import gc

THRESHOLDS = 50_000, 20, 100
"""Packets make no cycles, so only what control leaves behind waits for the collector."""


def settle() -> None:
    """What is alive now stays: the collector need not look at it again, and pauses packets more rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
