"""Finite-key bounds of two-decoy BB84 that delivers keys: key in Z, check in X, intensities mu1 > mu2 > mu3 >= 0.

The proof is that of arXiv:2405.16578, as for one decoy: a fixed length, thresholds fixed before the block, no claim
on vacuum events, sampling by Serfling's original form.  The decoy bounds are those of Lim 2014 with Hoeffding's
deviation in every count; unlike one decoy they need no errors of the key basis.

The error budget.  Write e = eps_sec / :data:`TERMS`.  A key of l bits is 2 s + v secret (leftover hashing), where s
smooths the min-entropy of the corrected key and v <= e is what hashing to l <= H - 2 log2(1 / (2 e)) leaves.  The key
consists of the bits of single photons and the others; one chain rule takes the others off, of which nothing is
claimed, neither of several photons nor of none::

    H_s(key) >= H_a(singles) - log2(2 / b^2),   s = a + b,   a = b = e

The singles have s_z1 (1 - h(phi)) bits by the uncertainty relation, smoothed by a: their phase errors in Z lie above
phi with probability a^2 at most, and in Serfling's bound ln(1 / a^2) = 2 ln(1 / e) makes
:func:`~.finite.gamma_serfling`.  Both costs together are 4 log2(1 / e) - 1 = 4 log2(1 / (e 2^(1/4))):
:func:`constant_cost`.  All this holds where the decoy bounds do, and they fail where one of the deviations they are
built of does, each with probability e.
:data:`COUNTED` names every term: 17, and 19 for who prefers the chain rule's other order, in which a counts twice.
The budget is cut into 21, as Lim 2014 needs them for a second chain rule (a claim on vacuum events): the safe side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from keysource.qkd.rates.entropy import binary_entropy
from keysource.qkd.rates.finite import Bounds, Counts, Security, Tally, deviation, gamma_serfling

TERMS = 21.0
COUNTED = {
    "2 a: phase errors of the key's singles, sampled by the check's": 2,
    "2 b: the chain rule that takes off the bits that are no singles": 2,
    "v: leftover hashing": 1,
    "s_z1: mu2 in Z not fewer than expected, mu3 not more, mu1 not more": 3,
    "s_z1: its vacuum events, mu3 in Z not fewer, mu2 not more": 2,
    "s_x1: mu2 in X not fewer than expected, mu3 not more, mu1 not more": 3,
    "s_x1: its vacuum events, mu3 in X not fewer, mu2 not more": 2,
    "v_x1: errors of mu2 in X not more than expected, of mu3 not fewer": 2,
}
"""How many parts of the error budget each statement takes; the bounds below need no others."""
NAME = "wiesemann2024-2decoy"


class Triple(NamedTuple):
    """One number per intensity: (mu1, mu2, mu3)."""

    signal: float
    decoy: float
    vacuum: float


@dataclass(frozen=True, slots=True)
class TwoDecoy:
    """Three intensities (mean photon numbers) and how often the first two are sent."""

    mu1: float
    mu2: float
    mu3: float
    p1: float
    p2: float

    def __post_init__(self) -> None:
        ordered = self.mu1 > self.mu2 + self.mu3 and self.mu2 > self.mu3 >= 0.0
        if not (ordered and self.p1 > 0.0 and self.p2 > 0.0 and self.p1 + self.p2 < 1.0):
            raise ValueError("two decoys need mu1 > mu2 + mu3, mu2 > mu3 >= 0, p1 and p2 above 0, p1 + p2 < 1")

    @property
    def intensities(self) -> Triple:
        return Triple(self.mu1, self.mu2, self.mu3)

    @property
    def probabilities(self) -> Triple:
        return Triple(self.p1, self.p2, 1.0 - self.p1 - self.p2)

    @property
    def weights(self) -> Triple:
        """e^k / p_k of each intensity."""
        return Triple(*(math.exp(k) / p for k, p in zip(self.intensities, self.probabilities, strict=True)))

    def tau(self, photons: int) -> float:
        """Probability that a pulse has 0 or 1 photons, averaged over the intensities."""
        if photons not in (0, 1):
            raise ValueError("tau is needed for 0 and 1 photons only")
        return sum(p * math.exp(-k) * k**photons for k, p in zip(self.intensities, self.probabilities, strict=True))


def single_lower(decoy: TwoDecoy, counts: Tally, epsilon: float) -> float:
    """Single-photon events at least; 0 where the statistics show none."""
    n, w, spread = Triple(*counts), decoy.weights, deviation(sum(counts), epsilon)
    mu1, mu2, mu3 = decoy.intensities
    vacuum = mu2 * w.vacuum * (n.vacuum - spread) - mu3 * w.decoy * (n.decoy + spread)
    no_photon = max(0.0, vacuum / (mu2 - mu3))  # per tau_0
    inner = w.decoy * (n.decoy - spread) - w.vacuum * (n.vacuum + spread)
    inner -= (mu2**2 - mu3**2) / mu1**2 * (w.signal * (n.signal + spread) - no_photon)
    below = mu1 * (mu2 - mu3) - mu2**2 + mu3**2
    return min(sum(counts), max(0.0, decoy.tau(1) * mu1 * inner / below))


def single_errors_upper(decoy: TwoDecoy, errors: Tally, epsilon: float) -> float:
    """Errors of single-photon events at most."""
    m, w, spread = Triple(*errors), decoy.weights, deviation(sum(errors), epsilon)
    difference = w.decoy * (m.decoy + spread) - w.vacuum * max(0.0, m.vacuum - spread)
    return max(0.0, decoy.tau(1) / (decoy.mu2 - decoy.mu3) * difference)


def bounds(decoy: TwoDecoy, counts: Counts, security: Security) -> Bounds:
    """Decoy and sampling bounds of one block."""
    epsilon = security.secrecy / TERMS
    s_z1 = single_lower(decoy, counts.n_z, epsilon)
    s_x1 = single_lower(decoy, counts.n_x, epsilon)
    v_x1 = single_errors_upper(decoy, counts.m_x, epsilon)
    if s_z1 <= 0.0 or s_x1 <= 0.0 or v_x1 >= s_x1 / 2.0:
        return Bounds(s_z1, s_x1, v_x1, 0.5)
    return Bounds(s_z1, s_x1, v_x1, min(0.5, v_x1 / s_x1 + gamma_serfling(s_z1, s_x1, epsilon)))


def constant_cost(security: Security) -> float:
    """Bits that every block pays: one split of the smooth entropy, hashing, error verification."""
    return math.log2(2.0 / security.correctness) + 4.0 * math.log2(TERMS / (security.secrecy * 2.0**0.25))


def secret_bits(found: Bounds, leak: float, security: Security) -> int:
    """Length of the key in bits, 0 where there is none.  ``leak``: bits disclosed by error correction."""
    if found.phi >= 0.5:
        return 0
    length = found.s_z1 * (1.0 - binary_entropy(found.phi)) - leak - constant_cost(security)
    return max(0, math.floor(length))
