"""Eavesdroppers in the fibre.  They act on pulses; nobody downstream knows of them.

Each is told what nature tells her: the light of a pulse as far as she measures it, and how many photons it has.  She
knows what is public, the link's optics among it, but neither settings nor intensities of a pulse.  *Notes* are what
she has afterwards; nothing but the tests and ``qvpn-qkd attack`` ever looks into them.

===================  ============================================================================================
intercept-resend     measures in a random basis, sends on as many photons in the state she found: errors rise by a
                     quarter of her fraction, gains and decoys stay
photon-number        counts photons; keeps one of several and sends the rest over a line without loss, blocks single
                     photons so that the gain stays: no errors, but the decoys' gain is not what it was
beam-splitting       keeps what the fibre would have lost, sends the rest over a line without loss: no trace at all
blinding             ``optics.blinding``; of pairs ``optics.pairblinding``
===================  ============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.settings import Bits

Z, X, LATER, NOTHING = 0, 1, 2, 3
"""What a note says of a pulse: measured in Z, in X, stored until the bases are announced, or not held at all."""
MOST_PHOTONS = 24


@dataclass(frozen=True, slots=True)
class Light:
    """Pulses on the fibre: ``check`` 1 for the X basis, ``bit``; ``mean`` photon number as it left Alice, which
    nature needs and Eve must not read."""

    check: Bits
    bit: Bits
    mean: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Notes:
    """What Eve holds of each detection: ``how`` is Z, X, LATER or NOTHING; ``bit`` is what she read, or will read."""

    how: Bits
    bit: Bits

    def __getitem__(self, chosen: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Notes:
        return Notes(self.how[chosen], self.bit[chosen])

    def knows(self, bases: Bits) -> npt.NDArray[np.bool_]:
        """Of pulses prepared in these bases, announced: does she have the bit?"""
        known: npt.NDArray[np.bool_] = (self.how == LATER) | (self.how == bases)
        return known


def no_notes(count: int) -> Notes:
    return Notes(np.full(count, NOTHING, dtype=np.uint8), np.zeros(count, dtype=np.uint8))


class Sent(NamedTuple):
    """What becomes of a pulse: with ``weight``, of which ``held`` photons stay with Eve, a port that gets the
    fraction c of the light sees no photon with ``unseen(c)``."""

    weight: float
    held: int
    unseen: Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Eve:
    """Nobody there; base of the others.  ``fraction`` of the pulses is touched."""

    fraction: float = 0.0
    name: str = field(default="none", init=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError("a fraction is a number from 0 to 1")

    def sends(self, mu: float, optics: Optics, detector: float) -> list[Sent]:
        """What reaches Bob's detectors of a pulse with mean ``mu``; weights sum to 1.  ``detector``: Bob's
        transmission in this gate, which she cannot know."""
        return [Sent(1.0, 0, _coherent(mu * optics.line * detector))]

    def touch(self, light: Light, optics: Optics, nature: np.random.Generator) -> tuple[Light, Notes | None]:
        """What she does to the polarisation, and what she has of it."""
        return light, None

    def notes(self, held: Bits, light: Light, measured: Notes | None) -> Notes | None:
        """Of detected pulses: ``held`` is what :meth:`sends` said, ``light`` as it was before she touched it."""
        return measured


@dataclass(frozen=True, slots=True)
class InterceptResend(Eve):
    """Measures ``fraction`` of the pulses and sends on what she found."""

    name: str = field(default="intercept-resend", init=False)

    def sends(self, mu: float, optics: Optics, detector: float) -> list[Sent]:
        empty, eta = math.exp(-mu), optics.line * detector
        if self.fraction <= 0.0 or mu <= 0.0:
            return Eve.sends(self, mu, optics, detector)
        some = Sent(1.0 - empty, 1, lambda c: (math.exp(-mu * eta * c) - empty) / (1.0 - empty))
        return [Sent(empty, 0, lambda c: 1.0), some]

    def touch(self, light: Light, optics: Optics, nature: np.random.Generator) -> tuple[Light, Notes | None]:
        if self.fraction <= 0.0:
            return light, None
        count = len(light.bit)
        caught = nature.random(count) < self.fraction
        basis = nature.integers(0, 2, count, dtype=np.uint8)
        # in the wrong basis the photons split at random; one port or both, her bit is a coin
        seen = np.where(basis == light.check, light.bit, nature.integers(0, 2, count, dtype=np.uint8))
        after = Light(
            np.where(caught, basis, light.check).astype(np.uint8),
            np.where(caught, seen, light.bit).astype(np.uint8),
            light.mean,
        )
        return after, Notes(np.where(caught, basis, NOTHING).astype(np.uint8), seen.astype(np.uint8))

    def notes(self, held: Bits, light: Light, measured: Notes | None) -> Notes | None:
        """Where there was no photon, a dark count made the click and she has nothing."""
        return None if measured is None else Notes(np.where(held > 0, measured.how, NOTHING), measured.bit)


@dataclass(frozen=True, slots=True)
class PhotonNumber(Eve):
    """Splits multi-photon pulses.  She blocks single photons, and where that is not enough some others, so that a
    pulse of intensity ``target`` is detected as often as without her; None: so that all pulses together are."""

    target: float | None = None
    name: str = field(default="photon-number", init=False)

    def sends(self, mu: float, optics: Optics, detector: float) -> list[Sent]:
        block_one, block_more = self.blocks(optics)
        untouched = Sent(1.0 - self.fraction, 0, _coherent(mu * optics.line * detector))
        result = [untouched] if self.fraction < 1.0 else []
        for n in range(MOST_PHOTONS):
            weight = self.fraction * _poisson(n, mu)
            on, blocked = max(n - 1, min(n, 1)), block_one if n == 1 else block_more if n else 0.0
            held = 1 if n > 1 else 0
            result.append(Sent(weight * (1.0 - blocked), held, _counted(on, detector)))
            result.append(Sent(weight * blocked, 0, _counted(0, detector)))
        return result

    def blocks(self, optics: Optics) -> tuple[float, float]:
        """(share of single photons, share of the others) to block; the least that leaves the gain as it was."""
        pairs = list(zip(optics.probabilities, optics.intensities, strict=True))
        if self.target is not None:
            pairs = [(1.0, self.target)]
        wanted = sum(p * (1.0 - math.exp(-mu * optics.eta)) for p, mu in pairs)
        single = sum(p * _poisson(1, mu) for p, mu in pairs) * optics.detector
        others = sum(
            p * _poisson(n, mu) * (1.0 - (1.0 - optics.detector) ** (n - 1))
            for p, mu in pairs
            for n in range(2, MOST_PHOTONS)
        )
        if others >= wanted:
            return 1.0, 1.0 - wanted / others
        return max(0.0, 1.0 - (wanted - others) / single), 0.0

    def notes(self, held: Bits, light: Light, measured: Notes | None) -> Notes | None:
        return Notes(np.where(held > 0, LATER, NOTHING).astype(np.uint8), light.bit)


@dataclass(frozen=True, slots=True)
class BeamSplitting(Eve):
    """Takes the light that the fibre would have lost."""

    name: str = field(default="beam-splitting", init=False)

    def touch(self, light: Light, optics: Optics, nature: np.random.Generator) -> tuple[Light, Notes | None]:
        if self.fraction <= 0.0 or light.mean is None:
            return light, None
        caught = nature.random(len(light.bit)) < self.fraction
        photons = nature.poisson(light.mean * (1.0 - optics.line))  # independent of what goes on to Bob
        return light, Notes(np.where(caught & (photons > 0), LATER, NOTHING).astype(np.uint8), light.bit)


def _poisson(n: int, mu: float) -> float:
    return math.exp(-mu) * mu**n / math.factorial(n)


def _coherent(mean: float) -> Callable[[float], float]:
    return lambda c: math.exp(-mean * c)


def _counted(photons: int, transmission: float) -> Callable[[float], float]:
    return lambda c: float((1.0 - transmission * c) ** photons)
