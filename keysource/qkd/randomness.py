"""Where a site's own choices come from: bits, bases, intensities, orders, seeds of hashes.

The operating system, always.  A site that has a quantum random number generator may mix it in (:class:`Mixed`): what
comes out is at least as good as the better of the two.  :class:`Repeatable` is for tests: the same seed, the same
choices; an end that draws from it delivers no key (``engine.end``).  Set once, when a process starts.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable

from keysource.qkd.health import HealthTests

Draw = Callable[[int], bytes]
_EXTRA_BITS = 64
"""More entropy into a conditioned block than comes out of it (SP 800-90C: then the output is as good as full)."""
_BLOCK = 32
WHOLE = 1024
"""Bytes up to which everything is drawn from the generator; longer draws are expanded from a seed of it."""


def system(size: int) -> bytes:
    """The operating system's generator."""
    return os.urandom(size)


class _Source:
    draw: Draw = staticmethod(system)


def use(source: Draw) -> None:
    """For the rest of this process."""
    _Source.draw = staticmethod(source)


def draw(size: int) -> bytes:
    """So many bytes for a choice that nobody else may know."""
    return _Source.draw(size)


class Repeatable:
    """SHAKE-256 of a seed and a count.  For tests alone."""

    def __init__(self, seed: str) -> None:
        self._seed, self._count = seed.encode(), 0

    def __call__(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(self._count.to_bytes(8, "big") + self._seed).digest(size)


class Mixed:
    """The system's bytes XOR those of another generator, conditioned by SHA-256 (SP 800-90B 3.1.5)."""

    def __init__(self, raw: Draw, entropy: float) -> None:
        """``raw``: samples of one byte each, as the generator gives them, unprocessed; ``entropy``: min-entropy in
        bits that its maker claims of each.

        Raises :class:`~keysource.qkd.errors.BadRandomness` where the start-up test fails.
        """
        self._raw, self._tests = raw, HealthTests(entropy)
        self._samples = math.ceil((8 * _BLOCK + _EXTRA_BITS) / entropy)
        self._tests.start(raw)

    def __call__(self, size: int) -> bytes:
        """Raises :class:`~keysource.qkd.errors.BadRandomness` where a health test fails: then nothing was drawn."""
        if size > WHOLE:
            other = hashlib.shake_256(self._conditioned(2 * _BLOCK)).digest(size)
        else:
            other = self._conditioned(size)
        return _xor(system(size), other)

    def _conditioned(self, size: int) -> bytes:
        blocks = []
        for _ in range(-(-size // _BLOCK)):
            samples = self._raw(self._samples)
            self._tests.look(samples)
            blocks.append(hashlib.sha256(samples).digest())
        return b"".join(blocks)[:size]


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")
