"""A receiver's guards against bright light: an average photocurrent, and gates with an attenuator at random.  On a
link of pairs both sites have them.

Neither is part of any proof; each is a patch against attacks that are known.  A monitor says only what its physics
says (``optics.blinding`` lists which attack it misses).

*photocurrent*: the mean current through both diodes over a block; an avalanche moves about 10^6 electrons.
*efficiency*: in 5 % of the gates, from the site's own seed, an attenuator takes the efficiency down to 70 %.
An honest link then clicks there in the share :func:`expected_share`; the count over a block is binomial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from keysource.qkd.optics.model import Optics

Monitor = Literal["none", "photocurrent", "efficiency", "both"]
MONITORS: tuple[Monitor, ...] = ("none", "photocurrent", "efficiency", "both")
TEST_SHARE = 0.05
ATTENUATOR = 0.7
AVALANCHE_CHARGE = 1.6e-13
"""Coulomb of a click."""
CURRENT_LIMIT = 5e-6
"""Amperes.  Above 10^7 clicks/s (1.6 uA), below the current of continuous blinding."""
DEVIATIONS = 6.2
"""False alarms: two-sided normal tail below 1e-9 a block."""


@dataclass(frozen=True, slots=True)
class Readings:
    """Of a slice or block: clicks in all, those in test gates, mean photocurrent in amperes, seconds."""

    clicks: int
    tested: int
    current: float
    seconds: float

    def plus(self, other: Readings) -> Readings:
        seconds = self.seconds + other.seconds
        charge = self.current * self.seconds + other.current * other.seconds
        return Readings(self.clicks + other.clicks, self.tested + other.tested, charge / seconds, seconds)


def read(clicks: int, tested: int, seconds: float, light: float) -> Readings:
    """``light``: current that somebody's bright light causes."""
    return Readings(clicks, tested, clicks * AVALANCHE_CHARGE / seconds + light, seconds)


def expected_share(optics: Optics) -> float:
    """Share of all clicks that an honest link has in test gates."""
    plain, weak = 0.0, 0.0
    for share, part in optics.stretches():
        dim = part.changed(-10.0 * math.log10(ATTENUATOR))
        plain += share * _mean_light(part)
        weak += share * _mean_light(dim)
    return TEST_SHARE * weak / (TEST_SHARE * weak + (1.0 - TEST_SHARE) * plain)


class Watched(Protocol):
    """A receiver whose honest clicks are known."""

    def expected_share(self) -> float: ...


def alarm(monitor: Monitor, readings: Readings, optics: Optics | Watched) -> str | None:
    """A sentence where the monitor fires.  ``optics``: the link of weak pulses, or one site of a link of pairs."""
    if monitor in ("photocurrent", "both") and readings.current > CURRENT_LIMIT:
        return f"mean photocurrent {1e6 * readings.current:.2g} uA, limit {1e6 * CURRENT_LIMIT:.2g} uA"
    if monitor in ("efficiency", "both"):
        share = expected_share(optics) if isinstance(optics, Optics) else optics.expected_share()
        mean, spread = readings.clicks * share, math.sqrt(readings.clicks * share * (1.0 - share))
        if abs(readings.tested - mean) > DEVIATIONS * spread + 1.0:
            return f"{readings.tested} clicks in attenuated gates, expected {mean:.0f}, deviation {spread:.0f}"
    return None


def _mean_light(optics: Optics) -> float:
    pairs = zip(optics.probabilities, optics.intensities, strict=True)
    return sum(p * optics.light_gain(mu) for p, mu in pairs)
