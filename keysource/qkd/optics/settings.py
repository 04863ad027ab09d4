"""What a site chooses for each pulse: bit, basis, intensity, from its own OS randomness.

A block seed from ``os.urandom`` is expanded by AES-256 in counter mode: pulse ``i`` has keystream block ``i``.  So
the settings of any pulse can be worked out alone, and a block of 10^9 pulses costs nothing for pulses that nobody
detects.  To give the seed to the fibre is to tell it the settings, as the site's modulators would.
"""

from __future__ import annotations

import sys
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
    words = np.empty((len(positions) + 1, 2), dtype="<u8")  # the cipher wants room for a block more
    room, block = words.view(np.uint8).reshape(-1).data, words.itemsize * 2
    counters = np.zeros((min(len(positions), _PIECE), 2), dtype=">u8")  # pieces stay in the cache, fresh pages cost
    for at in range(0, len(positions), _PIECE):
        some = positions[at : at + _PIECE]
        counters[: len(some), 1] = some
        cipher.update_into(counters[: len(some)].view(np.uint8).data, room[block * at : block * (at + len(some) + 1)])
    return words[:-1].astype(np.uint64, copy=False)


def _halves(words: Words) -> npt.NDArray[np.uint32]:
    """The words in halves, the low one first: shape (n, 4)."""
    halves = words.view(np.uint32)
    return halves if sys.byteorder == "little" else halves[:, [1, 0, 3, 2]]


def _happens(lots: npt.NDArray[np.uint32], probability: float) -> Bits:
    """1 with the given probability (rounded to 2^-32)."""
    edge = round(probability * 2.0**32)
    if edge >= 1 << 32:
        return np.ones(len(lots), dtype=np.uint8)
    return (lots < np.uint32(edge)).view(np.uint8)


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
        return self.read(keystream(self.seed, positions))

    def read(self, words: Words) -> AliceSettings:
        """From the keystream of the pulses."""
        halves = _halves(words)
        bit = (halves[:, 2] & np.uint32(1)).astype(np.uint8)
        return AliceSettings(bit, np.uint8(1) - _happens(halves[:, 0], self.p_z), self.decoys(words))

    def decoys(self, words: Words) -> Bits:
        """The same, of the intensities only."""
        lots = _halves(words)[:, 1]
        decoy: Bits = np.uint8(1) - _happens(lots, self.p1)
        if self.p2 is not None:
            decoy += np.uint8(1) - _happens(lots, self.p1 + self.p2)
        return decoy


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
        return np.uint8(1) - _happens(_halves(keystream(self.seed, positions))[:, 0], self.p_z)

    def both(self, positions: Positions) -> tuple[Bits, Bits]:
        """(1 for the X basis, 1 for a test gate)."""
        halves = _halves(keystream(self.seed, positions))
        bases: Bits = np.uint8(1) - _happens(halves[:, 0], self.p_z)
        return bases, _happens(halves[:, 1], self.test_share)

    def angles(self, positions: Positions) -> Bits:
        """What is measured: 0 Z, 1 X, 2 and 3 the angles of the CHSH test."""
        halves = _halves(keystream(self.seed, positions))
        bases: Bits = np.uint8(1) - _happens(halves[:, 0], self.p_z)
        if self.chsh <= 0.0:
            return bases
        turned = _happens(halves[:, 3], self.chsh)
        which = (halves[:, 2] & np.uint32(1)).astype(np.uint8)
        angles: Bits = np.where(turned == 1, which + np.uint8(2), bases).astype(np.uint8)
        return angles
