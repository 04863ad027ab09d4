"""Detections of N pulses without touching those that nobody detects: skipping and thinning.

No pulse clicks with more than p_max, the gain of the brighter intensity.  So candidates are found by geometric gaps
with p_max, their settings are worked out, and a candidate stays with probability gain / p_max.  The distribution is
exactly that of throwing dice for every pulse (the tests hold it against that).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.eve import InterceptResend, Light
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.settings import AliceSettings, Bits, Positions, ReceiverSeed, SourceSeed


@dataclass(frozen=True, slots=True)
class Detections:
    """What Bob's electronics report: pulse numbers, ascending, and the bit of each click."""

    positions: Positions
    bits: Bits


def candidates(first: int, count: int, p_max: float, nature: np.random.Generator) -> Positions:
    """Pulse numbers in first..first+count-1, each independently with probability ``p_max``."""
    found: list[npt.NDArray[np.int64]] = []
    reached = first - 1
    end = first + count
    while reached < end:
        expected = (end - reached) * p_max
        steps = nature.geometric(p_max, size=int(expected + 6.0 * expected**0.5) + 16)
        positions = reached + np.cumsum(steps, dtype=np.int64)
        reached = int(positions[-1])
        found.append(positions)
    everything = np.concatenate(found)
    return everything[everything < end].astype(np.uint64)


def port_probabilities(
    optics: Optics, alice: AliceSettings, light: Light, bob: Bits
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Click probabilities of detector 0 and detector 1 for each pulse, from the state that reaches Bob."""
    mean = np.where(alice.decoy == 1, optics.decoy.mu2, optics.decoy.mu1) * optics.eta
    e_d = optics.misalignment
    at_one = np.where(light.check != bob, 0.5, np.where(light.bit == 1, 1.0 - e_d, e_d))
    dark_free = 1.0 - optics.dark
    return 1.0 - dark_free * np.exp(-mean * (1.0 - at_one)), 1.0 - dark_free * np.exp(-mean * at_one)


def detect(
    optics: Optics,
    alice: SourceSeed,
    bob: ReceiverSeed,
    span: tuple[int, int],
    eve: InterceptResend,
    nature: np.random.Generator,
) -> Detections:
    """Fly the pulses ``span`` = (first, count) over the link."""
    p_max = max(optics.gain(mu) for mu in optics.intensities)
    positions = candidates(*span, p_max, nature)
    settings, bases = alice.at(positions), bob.at(positions)
    light = eve(Light(settings.check, settings.bit), nature)
    zero, one = port_probabilities(optics, settings, light, bases)
    clicks = 1.0 - (1.0 - zero) * (1.0 - one)
    kept = nature.random(len(positions)) * p_max < clicks
    zero, one, clicks = zero[kept], one[kept], clicks[kept]
    return Detections(positions[kept], _outcomes(zero, one, clicks, nature))


def _outcomes(
    zero: npt.NDArray[np.float64],
    one: npt.NDArray[np.float64],
    clicks: npt.NDArray[np.float64],
    nature: np.random.Generator,
) -> Bits:
    """The bit of each click: only detector 0, only detector 1, or both and then a coin."""
    dice = nature.random(len(clicks)) * clicks
    only_one = one * (1.0 - zero)
    both = one * zero
    coin = nature.integers(0, 2, len(clicks), dtype=np.uint8)
    return np.where(dice < only_one, 1, np.where(dice < only_one + both, coin, 0)).astype(np.uint8)
