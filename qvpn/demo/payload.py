"""The plaintext that must never be seen outside: a 16-byte marker at every 32nd byte of every test payload.

So dense that any piece of 48 bytes, wherever a segment is cut, holds the marker once.  One run uses one random
marker, so a hit cannot be chance and a capture cannot find another run's traffic.
"""

from __future__ import annotations

import hashlib
import os

MARKER_BYTES = 16
STRIDE = 32


def new_marker() -> bytes:
    return os.urandom(MARKER_BYTES)


def filled(size: int, marker: bytes) -> bytes:
    """``size`` bytes with ``marker`` at offsets 16, 48, 80, ... and bytes that follow from it in between.

    The same for everyone who knows the marker, so a receiver checks every byte.
    """
    if len(marker) != MARKER_BYTES:
        raise ValueError(f"a marker has {MARKER_BYTES} bytes, not {len(marker)}")
    data = bytearray(hashlib.shake_128(marker).digest(size))
    for start in range(STRIDE - MARKER_BYTES, size - MARKER_BYTES + 1, STRIDE):
        data[start : start + MARKER_BYTES] = marker
    return bytes(data)
