"""Finite-key bounds of one-decoy BB84: key in Z, check in X, intensities mu1 > mu2 > 0, no vacuum.

Two proofs by name:

* ``wiesemann2024``: arXiv:2405.16578, the repaired fixed-length analysis.  It delivers keys.
* ``rusca2018``: arXiv:1801.03443.  For rate curves and comparison only (:data:`DELIVERING` does not name it).

A *count pair* is (events with mu1, events with mu2).  The decoy bounds are those of Rusca 2018 appendix A, with the
factor e^k/p_k in every term, Hoeffding's deviation delta(n, e) = sqrt(n ln(1/e) / 2), and one e for every term.

The error budget.  ``wiesemann2024`` cuts it into 15 parts: 5 for smoothing and hashing (their reasons stand in
:mod:`~.twodecoy`) and 10 for deviations, which are four of each basis (n of mu2 not too many, n of mu1 not too few,
errors of one intensity not too few, half of the vacuum wrong) and two of the errors that bound the phase.  Vacuum
events have two bounds, one of each intensity; the lower one is taken, and both must hold unless it is fixed
beforehand which that is.  It is not, neither here nor in the program that belongs to the paper, so here the parts are
counted again, and they are enough.  Where there are but two intensities, both a count and its expectation, given the
photon numbers, add up over them to the same total.  What mu1 has too few of, mu2 has too many of: one event, not two.
That leaves, of each basis, one deviation of n, two of the errors and one of the vacuum's half; those of the errors in
X are the very ones that bound the phase.  :data:`COUNTED` names them: 8, and 13 with the 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from keysource.qkd.rates.entropy import binary_entropy

PROOFS = ("wiesemann2024", "rusca2018")
DELIVERING = "wiesemann2024"
TERMS = {"wiesemann2024": 15.0, "rusca2018": 19.0}
"""Parts that the error budget is cut into, by proof."""
COUNTED = {
    "2 a: phase errors of the key's singles, sampled by the check's": 2,
    "2 b: the chain rule that takes off the bits that are no singles": 2,
    "v: leftover hashing": 1,
    "s_z1: mu2 in Z not more than expected, so mu1 not fewer": 1,
    "s_z1: its vacuum events, half of them errors": 1,
    "s_z1: its vacuum events by mu1, errors of mu1 in Z not fewer than expected": 1,
    "s_z1: its vacuum events by mu2, errors of mu2 in Z not fewer than expected": 1,
    "s_x1: mu2 in X not more than expected, so mu1 not fewer": 1,
    "s_x1: its vacuum events, half of them errors": 1,
    "s_x1: its vacuum events by mu1, and v_x1: errors of mu1 in X not fewer than expected, so of mu2 not more": 1,
    "s_x1: its vacuum events by mu2, errors of mu2 in X not fewer than expected": 1,
}
"""How many parts each statement of ``wiesemann2024`` takes: 13, and 15 for who prefers the chain rule's other order,
in which a counts twice."""


class Pair(NamedTuple):
    """One count per intensity: (mu1, mu2)."""

    signal: float
    decoy: float

    @property
    def total(self) -> float:
        return self.signal + self.decoy


@dataclass(frozen=True, slots=True)
class Decoy:
    """The two intensities (mean photon numbers) and how often each is sent."""

    mu1: float
    mu2: float
    p1: float

    def __post_init__(self) -> None:
        if not (self.mu1 > self.mu2 > 0.0 and 0.0 < self.p1 < 1.0):
            raise ValueError("one decoy needs mu1 > mu2 > 0 and 0 < p1 < 1")

    @property
    def intensities(self) -> tuple[float, ...]:
        return self.mu1, self.mu2

    @property
    def probabilities(self) -> tuple[float, ...]:
        return self.p1, 1.0 - self.p1

    @property
    def weights(self) -> Pair:
        """e^k / p_k for both intensities."""
        return Pair(math.exp(self.mu1) / self.p1, math.exp(self.mu2) / (1.0 - self.p1))

    def tau(self, photons: int) -> float:
        """Probability that a pulse has 0 or 1 photons, averaged over the intensities."""
        if photons not in (0, 1):
            raise ValueError("tau is needed for 0 and 1 photons only")
        signal = self.p1 * math.exp(-self.mu1) * self.mu1**photons
        return signal + (1.0 - self.p1) * math.exp(-self.mu2) * self.mu2**photons


@dataclass(frozen=True, slots=True)
class Security:
    """Error budget of one block."""

    secrecy: float = 1e-9
    correctness: float = 1e-15


Tally = tuple[float, ...]
"""One count per intensity, brightest first."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a block has shown: detections ``n`` and errors ``m`` in each basis, per intensity."""

    n_z: Tally
    m_z: Tally
    n_x: Tally
    m_x: Tally


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a block: ``s_z1`` single-photon events in the key basis at least, ``phi`` phase error ratio at most."""

    s_z1: float
    s_x1: float
    v_x1: float
    phi: float
    s_z0: float = 0.0


def deviation(total: float, epsilon: float) -> float:
    """Hoeffding: sqrt(n ln(1/e) / 2) events."""
    return math.sqrt(max(total, 0.0) * math.log(1.0 / epsilon) / 2.0)


def vacuum_upper(decoy: Decoy, n: Pair, m: Pair, epsilon: float) -> float:
    """Vacuum events at most: half of them are errors, and errors are counted.  Both intensities bound them, and the
    lower bound is taken; both are paid for (see above)."""
    tau0, spread = decoy.tau(0), deviation(m.total, epsilon)
    candidates = (tau0 * w * (errors + spread) for w, errors in zip(decoy.weights, m, strict=True))
    return min(n.total, 2.0 * (min(candidates) + deviation(n.total, epsilon)))


def vacuum_lower(decoy: Decoy, n: Pair, epsilon: float) -> float:
    """Vacuum events at least (Rusca 2018; ``wiesemann2024`` claims none)."""
    spread = deviation(n.total, epsilon)
    w = decoy.weights
    difference = decoy.mu1 * w.decoy * (n.decoy - spread) - decoy.mu2 * w.signal * (n.signal + spread)
    return max(0.0, decoy.tau(0) / (decoy.mu1 - decoy.mu2) * difference)


def single_lower(decoy: Decoy, n: Pair, m: Pair, epsilon: float) -> float:
    """Single-photon events at least; 0 where the statistics show none."""
    mu1, mu2, w = decoy.mu1, decoy.mu2, decoy.weights
    spread = deviation(n.total, epsilon)
    inner = w.decoy * (n.decoy - spread)
    inner -= (mu2 / mu1) ** 2 * w.signal * (n.signal + spread)
    inner -= (mu1**2 - mu2**2) / mu1**2 * vacuum_upper(decoy, n, m, epsilon) / decoy.tau(0)
    return min(n.total, max(0.0, decoy.tau(1) * mu1 / (mu2 * (mu1 - mu2)) * inner))


def single_errors_upper(decoy: Decoy, m: Pair, epsilon: float) -> float:
    """Errors of single-photon events at most."""
    spread, w = deviation(m.total, epsilon), decoy.weights
    difference = w.signal * (m.signal + spread) - w.decoy * max(0.0, m.decoy - spread)
    return max(0.0, decoy.tau(1) / (decoy.mu1 - decoy.mu2) * difference)


def gamma_serfling(key: float, check: float, epsilon: float) -> float:
    """Random sampling without replacement (Serfling), the wider, original form used by ``wiesemann2024``."""
    return math.sqrt((check + key) / (check * key) * (check + 1.0) / check * math.log(1.0 / epsilon))


def gamma_fung(ratio: float, key: float, check: float, epsilon: float) -> float:
    """The form of Lim 2014 and Rusca 2018, with e = eps_sec / 19."""
    b = max(ratio, 1e-12)
    both = (key + check) / (key * check)
    inside = both / ((1.0 - b) * b) / epsilon**2
    return math.sqrt(both * (1.0 - b) * b / math.log(2.0) * max(0.0, math.log2(inside)))


def bounds(decoy: Decoy, counts: Counts, security: Security, proof: str = DELIVERING) -> Bounds:
    """Decoy and sampling bounds of one block.

    Raises:
        ValueError: an unknown proof.
    """
    if proof not in PROOFS:
        raise ValueError(f"proof {proof!r} is none of {', '.join(PROOFS)}")
    epsilon = security.secrecy / TERMS[proof]
    n_z, m_z, n_x, m_x = (Pair(*each) for each in (counts.n_z, counts.m_z, counts.n_x, counts.m_x))
    s_z1 = single_lower(decoy, n_z, m_z, epsilon)
    s_x1 = single_lower(decoy, n_x, m_x, epsilon)
    v_x1 = single_errors_upper(decoy, m_x, epsilon)
    if s_z1 <= 0.0 or s_x1 <= 0.0 or v_x1 >= s_x1 / 2.0:
        return Bounds(s_z1, s_x1, v_x1, 0.5)
    ratio = v_x1 / s_x1
    if proof == "wiesemann2024":
        return Bounds(s_z1, s_x1, v_x1, min(0.5, ratio + gamma_serfling(s_z1, s_x1, epsilon)))
    phi = min(0.5, ratio + gamma_fung(ratio, s_z1, s_x1, epsilon))
    return Bounds(s_z1, s_x1, v_x1, phi, vacuum_lower(decoy, n_z, epsilon))


def constant_cost(security: Security, proof: str = DELIVERING) -> float:
    """Bits that every block pays, whatever its size: smoothing, hashing, error verification."""
    verification = math.log2(2.0 / security.correctness)
    if proof == "wiesemann2024":
        return verification + 4.0 * math.log2(TERMS[proof] / (security.secrecy * 2.0**0.25))
    if proof == "rusca2018":
        return verification + 6.0 * math.log2(TERMS[proof] / security.secrecy)
    raise ValueError(f"proof {proof!r} is none of {', '.join(PROOFS)}")


def secret_bits(found: Bounds, leak: float, security: Security, proof: str = DELIVERING) -> int:
    """Length of the key in bits, 0 where there is none.  ``leak``: bits disclosed by error correction."""
    if found.phi >= 0.5:
        return 0
    length = found.s_z0 + found.s_z1 * (1.0 - binary_entropy(found.phi)) - leak - constant_cost(security, proof)
    return max(0, math.floor(length))
