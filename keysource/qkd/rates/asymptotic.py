"""Key per pulse for infinitely many pulses: decoy BB84, no decoys, entangled pairs, and what no protocol passes.

Curves only; keys are made under ``rates.finite``.  A *channel* gives gain and error gain of any intensity; the
yields of photon numbers follow from it.  Sources: Ma, Qi, Zhao, Lo, PRA 72 012326 (quant-ph/0503005) for decoys;
GLLP for none; Ma, Fung, Lo, PRA 76 012307 for pairs; Pirandola et al., Nat. Commun. 8 15043 for the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from keysource.qkd.optics.model import Optics
from keysource.qkd.rates.entropy import binary_entropy


class Channel(Protocol):
    """Probabilities per pulse.  ``y1``, ``e1``: yield and error ratio of one photon; ``y0``: of none."""

    def gain(self, mu: float) -> float: ...
    def error_gain(self, mu: float) -> float: ...
    @property
    def y0(self) -> float: ...
    @property
    def y1(self) -> float: ...
    @property
    def e1(self) -> float: ...


@dataclass(frozen=True, slots=True)
class MaChannel:
    """The form of Ma et al. 2005: Q = Y0 + 1 - e^(-eta mu), E Q = Y0 / 2 + e_d (1 - e^(-eta mu))."""

    eta: float
    y0: float
    e_d: float

    def gain(self, mu: float) -> float:
        return self.y0 - math.expm1(-self.eta * mu)

    def error_gain(self, mu: float) -> float:
        return self.y0 / 2.0 - self.e_d * math.expm1(-self.eta * mu)

    @property
    def y1(self) -> float:
        return self.y0 + self.eta

    @property
    def e1(self) -> float:
        return (self.y0 / 2.0 + self.e_d * self.eta) / self.y1


@dataclass(frozen=True, slots=True)
class ThresholdChannel:
    """Two threshold detectors with random double clicks: :class:`~keysource.qkd.optics.model.Optics`, always
    ready."""

    optics: Optics

    def gain(self, mu: float) -> float:
        return self.optics.light_gain(mu)

    def error_gain(self, mu: float) -> float:
        return self.optics.light_error(mu)

    @property
    def y0(self) -> float:
        return 1.0 - (1.0 - self.optics.dark) ** 2

    @property
    def y1(self) -> float:
        return 1.0 - (1.0 - self.y0) * (1.0 - self.optics.eta)

    @property
    def e1(self) -> float:
        cos2 = 1.0 - 2.0 * self.optics.misalignment
        return (self.y1 - (1.0 - self.optics.dark) * self.optics.eta * cos2) / (2.0 * self.y1)


def gys(km: float) -> MaChannel:
    """Gobby, Yuan, Shields, APL 84 3762 (2004), as Ma et al. 2005 take it."""
    return MaChannel(10.0 ** (-0.21 * km / 10.0) * 0.045, 1.7e-6, 0.033)


def decoy_rate(channel: Channel, mu: float, y1: float, e1: float, *, f: float, q: float = 0.5) -> float:
    """q { Q_1 [1 - h(e_1)] - f Q_mu h(E_mu) } for bounds ``y1``, ``e1``; never negative."""
    gain = channel.gain(mu)
    single = mu * math.exp(-mu) * max(0.0, y1)
    cost = f * gain * binary_entropy(channel.error_gain(mu) / gain)
    return max(0.0, q * (single * (1.0 - binary_entropy(min(0.5, max(0.0, e1)))) - cost))


def infinite_decoys(channel: Channel, mu: float, *, f: float, q: float = 0.5, vacuum: bool = False) -> float:
    """All yields known.  ``vacuum``: detections without a photon are secret too, Q_0 = e^-mu Y_0 more bits."""
    y1 = channel.y1
    if not vacuum:
        return decoy_rate(channel, mu, y1, channel.e1, f=f, q=q)
    gain = channel.gain(mu)
    cost = f * gain * binary_entropy(channel.error_gain(mu) / gain)
    single = mu * math.exp(-mu) * y1 * (1.0 - binary_entropy(channel.e1))
    return max(0.0, q * (single + math.exp(-mu) * channel.y0 - cost))


def vacuum_and_weak(channel: Channel, mu: float, nu: float, *, f: float, q: float = 0.5) -> float:
    """Decoys of intensity ``nu`` and of none at all."""
    return two_decoys(channel, (mu, nu, 0.0), f=f, q=q)


def two_decoys(channel: Channel, mus: tuple[float, float, float], *, f: float, q: float = 0.5) -> float:
    """Signal mu, decoys nu1 > nu2 >= 0 with nu1 + nu2 < mu (else nothing is bounded and the rate is 0)."""
    mu, nu1, nu2 = mus
    if not (mu > nu1 + nu2 and nu1 > nu2 >= 0.0):
        return 0.0
    weighted = [channel.gain(k) * math.exp(k) for k in mus]
    errors = [channel.error_gain(k) * math.exp(k) for k in mus]
    y0 = max(0.0, (nu1 * weighted[2] - nu2 * weighted[1]) / (nu1 - nu2))
    scale = mu / (mu * (nu1 - nu2) - nu1**2 + nu2**2)
    y1 = scale * (weighted[1] - weighted[2] - (nu1**2 - nu2**2) / mu**2 * (weighted[0] - y0))
    if y1 <= 0.0:
        return 0.0
    return decoy_rate(channel, mu, y1, (errors[1] - errors[2]) / ((nu1 - nu2) * y1), f=f, q=q)


def one_decoy(channel: Channel, mu: float, nu: float, *, f: float, q: float = 0.5) -> float:
    """Vacuum is bounded from above by the errors it would make: Y_0 <= E_mu Q_mu e^mu / e_0, the same of nu."""
    if not mu > nu > 0.0:
        return 0.0
    q_mu, q_nu = (channel.gain(k) * math.exp(k) for k in (mu, nu))
    eq_mu, eq_nu = (channel.error_gain(k) * math.exp(k) for k in (mu, nu))
    y0 = 2.0 * min(eq_mu, eq_nu)
    y1 = mu / (mu * nu - nu**2) * (q_nu - q_mu * nu**2 / mu**2 - (mu**2 - nu**2) / mu**2 * y0)
    if y1 <= 0.0:
        return 0.0
    return decoy_rate(channel, mu, y1, min(eq_mu / (mu * y1), eq_nu / (nu * y1)), f=f, q=q)


def no_decoys(channel: Channel, mu: float, *, f: float, q: float = 0.5) -> float:
    """GLLP: every multi-photon pulse is Eve's, and all of them are detected."""
    gain, multi = channel.gain(mu), 1.0 - (1.0 + mu) * math.exp(-mu)
    error, tagged = channel.error_gain(mu) / gain, 1.0 - multi / gain
    if tagged <= 0.0 or error / tagged >= 0.5:
        return 0.0
    return max(0.0, q * gain * (tagged * (1.0 - binary_entropy(error / tagged)) - f * binary_entropy(error)))


@dataclass(frozen=True, slots=True)
class Pairs:
    """A parametric source between two receivers, ``pairs`` per pulse on average; probabilities per gate."""

    pairs: float
    eta_a: float
    eta_b: float
    y0_a: float
    y0_b: float
    e_d: float

    def gain(self) -> float:
        """Coincidences.  1 - (1-Y0)/(1+eta l)^2 is written so that nothing cancels at high loss."""
        a, b = self.eta_a * self.pairs / 2.0, self.eta_b * self.pairs / 2.0
        both = a + b - self.eta_a * self.eta_b * self.pairs / 2.0
        click_a, click_b = _click(a, self.y0_a), _click(b, self.y0_b)
        either = _click(both, self.y0_a + self.y0_b - self.y0_a * self.y0_b)
        return click_a + click_b - either

    def error_gain(self) -> float:
        mean, ab = self.pairs / 2.0, self.eta_a * self.eta_b
        a, b = 1.0 + self.eta_a * mean, 1.0 + self.eta_b * mean
        signal = 2.0 * (0.5 - self.e_d) * ab * mean * (1.0 + mean) / (a * b * (a + b - 1.0 - ab * mean))
        return 0.5 * self.gain() - signal

    def rate(self, *, f: float, q: float = 0.5) -> float:
        """q Q [1 - f h(E) - h(E)]; the source may be Eve's (Koashi, Preskill)."""
        gain = self.gain()
        h = binary_entropy(min(0.5, max(0.0, self.error_gain() / gain)))
        return max(0.0, q * gain * (1.0 - (1.0 + f) * h))


def _click(mean: float, dark: float) -> float:
    return (2.0 * mean + mean**2 + dark) / (1.0 + mean) ** 2


def plob(eta: float) -> float:
    """Secret bits per use of a channel without repeater, at most: -log2(1 - eta)."""
    return math.inf if eta >= 1.0 else -math.log1p(-eta) / math.log(2.0)


def one_node(eta: float) -> float:
    """With one ideal repeater in the middle: -log2(1 - sqrt(eta))."""
    return plob(math.sqrt(eta))
