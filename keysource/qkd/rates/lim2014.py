"""Finite key of BB84 with two decoys: Lim, Curty, Walenta, Xu, Zbinden, PRA 89 022307 (arXiv:1311.7129).

For rate curves and reproduction; it delivers no keys (its analysis stops a block on a quota, which is not what a link
of fixed blocks does, and later work repaired the acceptance test).  Key in X, check in Z, all three intensities used.

The paper prints the fibre's transmission alone in its error model; only with the total transmission do its own
figures come out (R(1e9) / R(1e7) = 1.79 at 100 km, "about 1.75" in its text), so that is what stands here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from keysource.qkd.rates.entropy import binary_entropy


class Three(NamedTuple):
    """One number per intensity, brightest first."""

    one: float
    two: float
    three: float


@dataclass(frozen=True, slots=True)
class Settings:
    mu: Three
    p: Three
    q_x: float

    @property
    def sound(self) -> bool:
        mu, p = self.mu, self.p
        return mu.one > mu.two + mu.three and mu.two > mu.three >= 0.0 and min(p) > 0.0 and 0.0 < self.q_x < 1.0

    def tau(self, n: int) -> float:
        pairs = zip(self.p, self.mu, strict=True)
        return sum(p * math.exp(-k) * k**n / math.factorial(n) for p, k in pairs)


@dataclass(frozen=True, slots=True)
class Line:
    """The paper's channel: detector 0.1, 6e-7 dark counts, 4 % after-pulses, 0.5 % misalignment, 0.2 dB/km."""

    km: float
    detector: float = 0.1
    dark: float = 6e-7
    after_pulse: float = 0.04
    misalignment: float = 5e-3
    attenuation: float = 0.2
    f: float = 1.16

    def observed(self, k: float) -> tuple[float, float]:
        """(detections, errors) per pulse of intensity ``k``."""
        eta = 10.0 ** (-self.attenuation * self.km / 10.0) * self.detector
        plain = 1.0 - (1.0 - 2.0 * self.dark) * math.exp(-eta * k)
        error = self.dark - self.misalignment * math.expm1(-eta * k) + self.after_pulse * plain / 2.0
        return plain * (1.0 + self.after_pulse), error


@dataclass(frozen=True, slots=True)
class Result:
    """``length`` is 0 where there is no key; ``raw_length`` may be negative; ``rate`` is per pulse."""

    length: float
    raw_length: float
    rate: float
    s_x1: float
    s_z1: float
    v_z1: float
    phi: float
    leak: float
    e_obs: float


def evaluate(line: Line, settings: Settings, n_x: float, eps_sec: float, eps_cor: float) -> Result:
    """The key of a block with ``n_x`` bits in X whose statistics are what the channel says.  ``n_x`` infinite: per
    sifted bit, no fluctuations, no constants."""
    seen = [line.observed(k) for k in settings.mu]
    gain = sum(p * d for p, (d, _e) in zip(settings.p, seen, strict=True))
    limit = math.isinf(n_x)
    size = 1.0 if limit else n_x
    ratio = 1.0 if limit else ((1.0 - settings.q_x) / settings.q_x) ** 2
    n = Three(*(size * p * d / gain for p, (d, _e) in zip(settings.p, seen, strict=True)))
    m_z = Three(*(ratio * size * p * e / gain for p, (_d, e) in zip(settings.p, seen, strict=True)))
    noise = 0.0 if limit else math.log(21.0 / eps_sec) / 2.0
    n_z = Three(*(ratio * k for k in n))
    s_x0, s_x1 = _photons(settings, n, noise)
    _s_z0, s_z1 = _photons(settings, n_z, noise)
    v_z1 = _errors(settings, m_z, noise)
    e_obs = sum(p * e for p, (_d, e) in zip(settings.p, seen, strict=True)) / gain
    leak = line.f * size * binary_entropy(e_obs)
    phi = _phi(v_z1, s_z1, s_x1, 0.0 if limit else eps_sec)
    constant = 0.0 if limit else 6.0 * math.log2(21.0 / eps_sec) + math.log2(2.0 / eps_cor)
    raw = s_x0 + s_x1 * (1.0 - binary_entropy(phi)) - leak - constant if phi < 0.5 else -leak - constant
    length = max(0.0, raw) if limit else float(max(0, math.floor(raw)))
    pulses = size / (settings.q_x**2 * gain)
    return Result(length, raw, length / pulses, s_x1, s_z1, v_z1, phi, leak, e_obs)


def relative(line: Line, settings: Settings, n_x: float, kappa: float = 1e-15, eps_cor: float = 1e-15) -> Result:
    """With the error per bit fixed, eps_sec = kappa x length: a fixed point."""
    length = n_x
    result = evaluate(line, settings, n_x, kappa * length, eps_cor)
    for _ in range(40):
        if math.isinf(n_x) or result.length <= 0.0 or abs(result.length - length) <= 1e-9 * length:
            break
        length = result.length
        result = evaluate(line, settings, n_x, kappa * length, eps_cor)
    return result


def _photons(s: Settings, n: Three, noise: float) -> tuple[float, float]:
    """(vacuum events, single-photon events), at least."""
    spread, mu = math.sqrt(sum(n) * noise), s.mu
    low = [math.exp(k) / p * (c - spread) for k, p, c in zip(mu, s.p, n, strict=True)]
    high = [math.exp(k) / p * (c + spread) for k, p, c in zip(mu, s.p, n, strict=True)]
    s_0 = max(0.0, s.tau(0) * (mu.two * low[2] - mu.three * high[1]) / (mu.two - mu.three))
    inner = low[1] - high[2] - (mu.two**2 - mu.three**2) / mu.one**2 * (high[0] - s_0 / s.tau(0))
    bottom = mu.one * (mu.two - mu.three) - mu.two**2 + mu.three**2
    return s_0, max(0.0, s.tau(1) * mu.one * inner / bottom)


def _errors(s: Settings, m: Three, noise: float) -> float:
    spread = math.sqrt(sum(m) * noise)
    high = math.exp(s.mu.two) / s.p.two * (m.two + spread)
    low = math.exp(s.mu.three) / s.p.three * (m.three - spread)
    return max(0.0, s.tau(1) * (high - low) / (s.mu.two - s.mu.three))


def _phi(v: float, s_check: float, s_key: float, eps: float) -> float:
    if s_check <= 0.0 or s_key <= 0.0 or v >= s_check / 2.0:
        return 0.5
    b = max(v / s_check, 1e-12)
    if eps <= 0.0:
        return min(0.5, b)
    both = (s_check + s_key) / (s_check * s_key)
    inside = both / ((1.0 - b) * b) * 441.0 / eps**2
    return min(0.5, b + math.sqrt(both * (1.0 - b) * b / math.log(2.0) * math.log2(inside)))
