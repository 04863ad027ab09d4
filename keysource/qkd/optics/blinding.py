"""Detector blinding: Bob's avalanche diodes under bright light are no photon counters any more.

Eve measures every pulse herself, before the fibre loses light, and dictates the result with a bright pulse: its power
lies between one and two thresholds, so it clicks where Bob chose her basis and the whole pulse meets one detector,
and is silent where he did not and it splits (Lydersen et al., Nature Photonics 4, 686, 2010).  She detects about
twice as often as Bob would, half of that he repeats, and every number of his statistics is as it was.

Two ways to blind.  Continuous light drives a current that an average monitor sees.  Short blinding pulses before the
gates keep the average small.

Against Bob's efficiency test, gates with an attenuator of transmission T at random: under continuous light the
thresholds are steady, so with T > 1/2 she can choose her power so that the click survives the attenuator with
probability T, as an honest one does.  After blinding pulses the thresholds move within the gate; she cannot choose,
and her clicks survive always.  That is the behaviour reported in EPJ Quantum Technology 10:22 (2023) and
arXiv:2505.12974; the powers are a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.settings import Bits

Mode = Literal["cw", "pulsed"]
BLINDING_CURRENT = 20e-6
"""Amperes through a blinded diode while the light is on."""
PULSED_DUTY = 0.01
"""Share of the time that blinding pulses are on."""


@dataclass(frozen=True, slots=True)
class Blinding(Eve):
    """All pulses of a slice or none."""

    mode: Mode = "cw"
    name: str = field(default="blinding", init=False)

    def current(self) -> float:
        """Average photocurrent in amperes that her light causes."""
        if self.fraction <= 0.0:
            return 0.0
        return BLINDING_CURRENT * (1.0 if self.mode == "cw" else PULSED_DUTY)

    def receiver(self, optics: Optics) -> Optics:
        """Her own detectors: the link's, behind a line that makes her detect twice what Bob would."""
        wanted = [2.0 * optics.light_gain(mu) for mu in optics.intensities]
        mean = sum(p * g for p, g in zip(optics.probabilities, wanted, strict=True))
        low, high = 0.0, 40.0
        for _ in range(80):
            middle = (low + high) / 2.0
            low, high = (middle, high) if _mean(optics, middle) < mean else (low, middle)
        bright = replace(optics, distance_km=0.0, detector=min(1.0, low), course=())
        return replace(bright, dark=min(0.5, 2.0 * optics.dark))

    def clicks(
        self, basis: Bits, bob: Bits, tested: Bits, transmission: float, nature: np.random.Generator
    ) -> npt.NDArray[np.bool_]:
        """Which faked states click: her ``basis`` against Bob's, and in attenuated gates as her mode allows."""
        same: npt.NDArray[np.bool_] = basis == bob
        if self.mode == "pulsed" or not tested.any():
            return same
        # power above threshold / T with probability T; impossible below half, where 2 thresholds are too few
        share = transmission if transmission > 0.5 else 0.0
        same &= (tested == 0) | (nature.random(len(basis)) < share)
        return same


def _mean(optics: Optics, eta: float) -> float:
    dark = (1.0 - min(0.5, 2.0 * optics.dark)) ** 2
    pairs = zip(optics.probabilities, optics.intensities, strict=True)
    return sum(p * (1.0 - dark * math.exp(-mu * eta)) for p, mu in pairs)
