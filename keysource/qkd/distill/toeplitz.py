"""Universal hashing by a Toeplitz matrix over GF(2): error verification and privacy amplification.

Row i, column j of the matrix is ``seed[i - j + n - 1]``; the product is the middle of a linear convolution and is
worked out by a float64 FFT.  Convolution counts go up to n; the rounding residual of float64 stays below 1e-8 for
any size used here, and is checked every time: a residual of :data:`MAX_RESIDUAL` raises.
A random Toeplitz matrix with m rows is exactly 2-universal: two different inputs collide with 2^-m.
"""

from __future__ import annotations

import numpy as np

from keysource.qkd.distill.bits import Bits

MAX_RESIDUAL = 0.1


def seed_bits(n: int, m: int) -> int:
    """Length of the seed for n input and m output bits."""
    return n + m - 1


def toeplitz_hash(bits: Bits, seed: Bits, m: int) -> Bits:
    """The m-bit hash of ``bits``.

    Raises:
        ValueError: a seed of the wrong length, or nothing to do.
        ArithmeticError: the FFT is not exact.
    """
    n = len(bits)
    if n < 1 or m < 1 or len(seed) != seed_bits(n, m):
        raise ValueError(f"{len(seed)} seed bits for a Toeplitz matrix of {m} rows and {n} columns")
    length = smooth_length(n + m - 1)  # what wraps around ends up below index n - 1, which is not used
    spectrum = np.fft.rfft(seed.astype(np.float64), length)
    spectrum *= np.fft.rfft(bits.astype(np.float64), length)
    counts = np.fft.irfft(spectrum, length)[n - 1 : n - 1 + m]
    whole = np.rint(counts)
    residual = float(np.abs(counts - whole).max())
    if not residual < MAX_RESIDUAL:
        raise ArithmeticError(f"Toeplitz hash of {n} bits: rounding residual {residual:.3g}")
    return (whole.astype(np.int64) & 1).astype(np.uint8)


def smooth_length(least: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least ``least``: FFT lengths that are quick."""
    best = 1 << (least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            missing = -(-least // three)
            best = min(best, three << (missing - 1).bit_length())
            three *= 3
        five *= 5
    return best
