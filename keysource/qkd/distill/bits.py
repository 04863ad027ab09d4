"""Bit strings as numpy arrays of 0/1 (uint8), and packed for the wire (first bit = highest bit of byte 0)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from keysource.qkd.errors import BadFrame
from keysource.qkd.randomness import draw

Bits = npt.NDArray[np.uint8]
"""Values 0 and 1, one per element."""


def pack(bits: Bits) -> bytes:
    """ceil(n / 8) bytes, zero padded at the end."""
    return np.packbits(bits).tobytes()


def unpack_untrusted(data: bytes | memoryview, count: int) -> Bits:
    """``count`` bits.  Raises :class:`BadFrame` where the length is wrong or the padding is not zero."""
    if len(data) != (count + 7) // 8:
        raise BadFrame(f"{len(data)} bytes where {count} bits are expected")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    if bits[count:].any():
        raise BadFrame("bits are padded with something else than zeros")
    return bits[:count]


def random_bits(count: int) -> Bits:
    """See :mod:`keysource.qkd.randomness`."""
    return np.unpackbits(np.frombuffer(draw((count + 7) // 8), dtype=np.uint8))[:count]
