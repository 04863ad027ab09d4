"""FFTW for privacy amplification, where the extra ``fast`` (pyfftw) is installed; without it nothing here is used.

FFTW is under the GPL, pyfftw's wheels contain it: that is why it is an extra and never required.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill.bits import Bits

try:
    import pyfftw
except ImportError:
    pyfftw = None

Reals = npt.NDArray[np.float64]
HERE = pyfftw is not None
THREADS = os.cpu_count() or 1
_AT_WORK = threading.Lock()


class _Plan:
    """Two transforms of one length and back, with their arrays."""

    def __init__(self, length: int) -> None:
        half = length // 2 + 1
        self.real = [pyfftw.zeros_aligned(length, dtype="float32") for _ in range(2)]
        self.spectra = [pyfftw.zeros_aligned(half, dtype="complex64") for _ in range(2)]
        how: dict[str, Any] = {"threads": THREADS, "flags": ("FFTW_ESTIMATE",)}
        pairs = zip(self.real, self.spectra, strict=True)
        self._there = [pyfftw.FFTW(real, spectrum, **how) for real, spectrum in pairs]
        self._back = pyfftw.FFTW(self.spectra[0], self.real[0], direction="FFTW_BACKWARD", **how)

    def convolve(self, one: Bits, other: Bits) -> npt.NDArray[np.float32]:
        """Of ``one`` - 1/2 and ``other`` - 1/2, with zeros behind; the result is overwritten by the next."""
        for real, bits in zip(self.real, (one, other), strict=True):
            np.subtract(bits, np.float32(0.5), out=real[: len(bits)], dtype=np.float32)
            real[len(bits) :] = 0.0
        for transform in self._there:
            transform.execute()
        self.spectra[0] *= self.spectra[1]
        self._back.execute()
        found: npt.NDArray[np.float32] = self.real[0]
        found *= np.float32(1.0 / len(found))
        return found


@lru_cache(maxsize=4)
def _plan(length: int) -> _Plan:
    return _Plan(length)


def length_of(least: int) -> int:
    """One that FFTW is quick at, and even."""
    return int(pyfftw.next_fast_len((least + 1) // 2)) * 2


def centred(bits: Bits, seed: Bits, m: int, most: float) -> Bits | None:
    """The Toeplitz hash in float32: sums of (x - 1/2)(s - 1/2), and from them the counts of x s, which are integers.
    None where any is ``most`` or more away from one."""
    n = len(bits)
    sums = np.zeros(len(seed) + 1, dtype=np.int32)
    np.cumsum(seed, out=sums[1:])
    with _AT_WORK:
        small = _plan(length_of(n + m - 1)).convolve(bits, seed)[n - 1 : n - 1 + m]
        counts = (sums[n : n + m] - sums[:m]) * 0.5
        counts += 0.5 * int(np.count_nonzero(bits)) - 0.25 * n
        counts += small
    whole = np.rint(counts)
    if not float(np.abs(counts - whole).max()) < most:
        return None
    found: Bits = (whole.astype(np.int64) & 1).astype(np.uint8)
    return found
