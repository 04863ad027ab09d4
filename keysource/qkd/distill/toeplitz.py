"""Universal hashing by a Toeplitz matrix over GF(2): error verification and privacy amplification.

Row i, column j of the matrix is ``seed[i - j + n - 1]``.  A random Toeplitz matrix with m rows is exactly
2-universal: two different inputs collide with 2^-m.

A few rows are worked out one by one, as the bits that row and key have in common.  Many are the middle of a linear
convolution, whose counts a Fourier transform finds in floating point, and only their parity is wanted.  The counts
go up to n, which is 24 bits of the 53 that float64 has; so the key is *folded*: with its halves x, x' and the parts
K, K' of the seed that meet them (K the one that meets x),

    (x + X x') * (K' + X K)  =  x * K'  +  X (x * K + x' * K')  +  X^2 (x' * K)

has what is wanted in the middle, in two thirds of the length.  X is a power of two and at least four times the number
of ones in x: divided by X the first term is a fraction from 0 to 1/4, whatever the key and the seed are, the last one
an even number.  How far a fraction lies outside of that range is the rounding residual, 1e-4 for a key of 10^6 bits;
one of :data:`MAX_RESIDUAL` raises, and so does any of some rows that are worked out alone and come out otherwise.

With FFTW (``distill.fftw``) the same is done in float32 and two threads, about zero: the counts of x - 1/2 and
s - 1/2 are small, and sums of the seed's windows are integers.  Should that not be exact, float64 is.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from keysource.qkd.distill import fftw
from keysource.qkd.distill.bits import Bits

MAX_RESIDUAL = 0.1
_FEW = 64
"""Rows that are quicker one by one."""
_PROBES = 8
"""Rows of a convolution that are worked out alone, too."""
LONGEST_FOLDED = 1 << 24
"""Bits of a key beyond which folding would leave too little room for rounding."""


def seed_bits(n: int, m: int) -> int:
    """Length of the seed for n input and m output bits."""
    return n + m - 1


def toeplitz_hash(bits: Bits, seed: Bits, m: int, *, with_fftw: bool | None = None) -> Bits:
    """The m-bit hash of ``bits``.  ``with_fftw``: None, where it is installed.

    Raises:
        ValueError: a seed of the wrong length, or nothing to do.
        ArithmeticError: the convolution is not exact.
    """
    n = len(bits)
    if n < 1 or m < 1 or len(seed) != seed_bits(n, m):
        raise ValueError(f"{len(seed)} seed bits for a Toeplitz matrix of {m} rows and {n} columns")
    if m <= _FEW:
        return rows_alone(bits, seed, range(m))
    wanted = fftw.HERE if with_fftw is None else with_fftw
    found = fftw.centred(bits, seed, m, MAX_RESIDUAL) if wanted else None
    if found is None:
        found = folded(bits, seed, m) if n <= LONGEST_FOLDED else plain(bits, seed, m)
    probes = sorted({(m - 1) * number // (_PROBES - 1) & ~7 for number in range(_PROBES)})
    if (rows_alone(bits, seed, probes) != found[probes]).any():
        raise ArithmeticError(f"Toeplitz hash of {n} bits: the convolution and single rows differ")
    return found


def rows_alone(bits: Bits, seed: Bits, rows: Iterable[int]) -> Bits:
    """These rows of the hash, exactly, each from the bits that it has in common with the key."""
    key = _octets(bits[::-1])
    shifted: dict[int, Bits] = {}
    found = []
    for row in rows:
        octet, bit = divmod(row, 8)
        if bit not in shifted:
            shifted[bit] = np.concatenate([np.packbits(seed[bit:]), np.zeros(8, dtype=np.uint8)])
        common = shifted[bit][octet : octet + len(key)] & key
        found.append(int(np.bitwise_xor.reduce(common.view(np.uint64))).bit_count() & 1)
    return np.array(found, dtype=np.uint8)


def _octets(bits: Bits) -> Bits:
    """Packed, filled up with zeros to whole words of 64 bits."""
    packed = np.packbits(bits)
    return np.concatenate([packed, np.zeros(-len(packed) % 8, dtype=np.uint8)])


def folded(bits: Bits, seed: Bits, m: int) -> Bits:
    """By one convolution of half the key, as said above.  Raises :class:`ArithmeticError`."""
    n = len(bits)
    if n % 2:  # one more column, which meets a zero
        bits, seed = np.append(bits, np.uint8(0)), np.concatenate([np.zeros(1, dtype=np.uint8), seed])
    half = (n + 1) // 2
    length = smooth_length(m + half - 1)  # what wraps around ends up below index half - 1, which is not used
    exponent = max(1, (4 * int(np.count_nonzero(bits[:half])) - 1).bit_length())
    key = _two(bits[:half], bits[half:], exponent, length)
    rows = _two(seed[: m + half - 1], seed[half:], exponent, length)
    counts = _convolved(key, rows, length)[half - 1 : half - 1 + m]
    counts *= 2.0**-exponent
    counts += 0.375
    whole = np.floor(counts)
    counts -= whole
    counts -= 0.5
    residual = max(float(counts.max()), -float(counts.min())) - 0.125  # negative: as far as can be told, none
    _check(n, residual)
    return (whole.astype(np.int64) & 1).astype(np.uint8)


def plain(bits: Bits, seed: Bits, m: int) -> Bits:
    """By one convolution of all the key.  Raises :class:`ArithmeticError`."""
    n = len(bits)
    length = smooth_length(n + m - 1)
    counts = _convolved(bits.astype(np.float64), seed.astype(np.float64), length)[n - 1 : n - 1 + m]
    whole = np.rint(counts)
    _check(n, float(np.abs(counts - whole).max()))
    return (whole.astype(np.int64) & 1).astype(np.uint8)


def _two(low: Bits, high: Bits, exponent: int, length: int) -> fftw.Reals:
    """``low`` + 2^exponent ``high``, with zeros up to ``length``."""
    found = np.zeros(length)
    part = found[: len(low)]
    part[:] = high
    part *= 2.0**exponent
    part += low
    return found


def _convolved(one: fftw.Reals, other: fftw.Reals, length: int) -> fftw.Reals:
    """Cyclically."""
    spectrum = np.fft.rfft(one, length)
    spectrum *= np.fft.rfft(other, length)
    return np.fft.irfft(spectrum, length)


def _check(n: int, residual: float) -> None:
    if not residual < MAX_RESIDUAL:
        raise ArithmeticError(f"Toeplitz hash of {n} bits: rounding residual {residual:.3g}")


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
