"""What a site chooses for each pulse: bit, basis, intensity, from its own OS randomness.

A block seed from ``os.urandom`` is expanded by AES-256 in counter mode: pulse ``i`` has keystream block ``i``.  So
the settings of any pulse can be worked out alone, and a block of 10^9 pulses costs nothing for pulses that nobody
detects.  To give the seed to the fibre is to tell it the settings, as the site's modulators would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from keysource.qkd.randomness import draw

SEED_BYTES = 32
Positions = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
_PIECE = 1 << 13


def fresh_seed() -> bytes:
    """A block seed.  Never from a statistical generator."""
    return draw(SEED_BYTES)


def keystream(seed: bytes, positions: Positions) -> Words:
    """For each pulse number one 128-bit keystream block, as two unsigned 64-bit words: shape (n, 2)."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a block seed has {SEED_BYTES} bytes")
    cipher = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()  # of distinct counters: CTR
    words = np.empty((len(positions), 2), dtype=np.uint64)
    counters = np.zeros((min(len(positions), _PIECE), 2), dtype=">u8")  # pieces stay in the cache, fresh pages cost
    stream = np.empty(counters.nbytes + 16, dtype=np.uint8)
    for at in range(0, len(positions), _PIECE):
        some = positions[at : at + _PIECE]
        counters[: len(some), 1] = some
        size = cipher.update_into(counters[: len(some)].view(np.uint8).data, stream.data)
        words[at : at + len(some)] = stream[:size].view("<u8").reshape(-1, 2)
    return words


def _happens(words: Words, probability: float) -> Bits:
    """1 with the given probability, from 32 bits of each word (rounded to 2^-32)."""
    return (words < np.uint64(round(probability * 2.0**32))).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class AliceSettings:
    """``bit`` 0 or 1, ``check`` 1 for the X basis, ``decoy`` 1 for mu2 and 2 for mu3; arrays of equal length."""

    bit: Bits
    check: Bits
    decoy: Bits
    heard: Bits | None = None
    """With pairs she measures too: 1 where her own detectors have clicked.  None: everywhere."""


@dataclass(frozen=True, slots=True)
class SourceSeed:
    """Alice's seed of one block with the probabilities that belong to it."""

    seed: bytes = field(repr=False)
    p_z: float
    p1: float
    p2: float | None = None
    """None: all that is not mu1 is mu2."""

    @classmethod
    def of(cls, seed: bytes, p_z: float, probabilities: Sequence[float]) -> SourceSeed:
        """``probabilities`` of two or three intensities."""
        return cls(seed, p_z, probabilities[0], probabilities[1] if len(probabilities) > 2 else None)

    def at(self, positions: Positions) -> AliceSettings:
        words = keystream(self.seed, positions)
        low, high = words[:, 0] & np.uint64(0xFFFFFFFF), words[:, 0] >> np.uint64(32)
        bit = (words[:, 1] & np.uint64(1)).astype(np.uint8)
        decoy = np.uint8(1) - _happens(high, self.p1)
        if self.p2 is not None:
            decoy += np.uint8(1) - _happens(high, self.p1 + self.p2)
        return AliceSettings(bit, np.uint8(1) - _happens(low, self.p_z), decoy)


@dataclass(frozen=True, slots=True)
class ReceiverSeed:
    """A receiver's seed of one block: its basis for each pulse, and whether its attenuator is in (an efficiency
    test).  ``chsh``: with pairs, the share of the gates that turn to one of two more angles, for E91."""

    seed: bytes = field(repr=False)
    p_z: float
    test_share: float = 0.0
    chsh: float = 0.0

    def at(self, positions: Positions) -> Bits:
        """1 for the X basis."""
        return self.both(positions)[0]

    def both(self, positions: Positions) -> tuple[Bits, Bits]:
        """(1 for the X basis, 1 for a test gate)."""
        words = keystream(self.seed, positions)[:, 0]
        bases = np.uint8(1) - _happens(words & np.uint64(0xFFFFFFFF), self.p_z)
        return bases, _happens(words >> np.uint64(32), self.test_share)

    def angles(self, positions: Positions) -> Bits:
        """What is measured: 0 Z, 1 X, 2 and 3 the angles of the CHSH test."""
        words = keystream(self.seed, positions)
        bases = np.uint8(1) - _happens(words[:, 0] & np.uint64(0xFFFFFFFF), self.p_z)
        if self.chsh <= 0.0:
            return bases
        turned = _happens(words[:, 1] >> np.uint64(32), self.chsh)
        which = (words[:, 1] & np.uint64(1)).astype(np.uint8)
        angles: Bits = np.where(turned == 1, which + np.uint8(2), bases).astype(np.uint8)
        return angles
