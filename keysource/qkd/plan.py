"""Everything about a block that is fixed before its first pulse: sizes, thresholds, leak budget, key length.

The delivering proof is a fixed-length one: the length must not depend on what the block shows.  So the thresholds
come from the link's closed form with a margin for chance, the length from the thresholds, and a block that misses
one of them gives nothing.  Both ends work the plan out by themselves and compare its digest.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from keysource.qkd.distill.cascade import block_sizes
from keysource.qkd.optics.model import Optics
from keysource.qkd.rates.entropy import binary_entropy
from keysource.qkd.rates.finite import (
    DELIVERING,
    Bounds,
    Counts,
    Pair,
    Security,
    bounds,
    constant_cost,
    secret_bits,
)

SIZE_MARGIN = 5.0
"""Standard deviations between the expected sifted bits and the fixed block sizes."""
TEST_MARGIN = 3.5
"""Standard deviations, in each count at once, between the expected statistics and the thresholds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One block.  Bits unless said otherwise."""

    pulses: int
    n_z: int
    n_x: int
    check_errors: int
    """At most so many errors among the ``n_x`` check bits: beyond, error correction is not even begun."""
    s_z1: float
    """Single-photon events in the key basis: at least."""
    phi: float
    """Phase error ratio: at most."""
    leak_budget: int
    """Alice's parities; Bob's mirror of them has a budget of its own, of the same size."""
    verify_bits: int
    length: int
    """Secret bits that a passed block gives, always."""
    sizes: tuple[int, ...]
    """Block length of each Cascade pass."""
    expected_qber: float

    def __post_init__(self) -> None:
        if self.length <= 0 or self.n_z < 1 or self.n_x < 1:
            raise ValueError("blocks of this size give no key over this link: longer blocks or a shorter link")
        if self.length > self.n_z - 2 * self.leak_budget - self.verify_bits:
            raise ValueError("a plan that gives more key than it has bits")

    def digest(self, optics: Optics, security: Security) -> str:
        """Both ends must have the same plan, optics, error budget and proof."""
        parts = [asdict(self), asdict(optics), asdict(security), DELIVERING]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def accepts(self, found: Bounds) -> bool:
        """The statistical test of a corrected block."""
        return found.s_z1 >= self.s_z1 and found.phi <= self.phi


def make_plan(optics: Optics, pulses: int, security: Security, schedule: str) -> Plan:
    """Work out a plan for blocks of ``pulses`` pulses.

    Raises:
        ValueError: no key at this size and loss.
    """
    gain = optics.mean_gain()
    n_z = _sure_size(pulses * gain * optics.p_z**2)
    n_x = _sure_size(pulses * gain * (1.0 - optics.p_z) ** 2)
    worst = bounds(optics.decoy, worst_counts(optics, n_z, n_x), security)
    qber = optics.mean_qber()
    budget = leak_budget(n_z, qber, schedule)
    verify = math.ceil(math.log2(1.0 / security.correctness))
    return Plan(
        pulses=pulses,
        n_z=n_z,
        n_x=n_x,
        check_errors=math.floor(n_x * qber + 6.0 * math.sqrt(n_x * qber) + 6.0),
        s_z1=worst.s_z1,
        phi=worst.phi,
        leak_budget=budget,
        verify_bits=verify,
        length=secret_bits(worst, 2.0 * budget, security),
        sizes=tuple(block_sizes(n_z, qber, schedule)),
        expected_qber=qber,
    )


def leak_budget(n_z: int, qber: float, schedule: str) -> int:
    """Parities for a block with more errors than nearly all, at an efficiency that Cascade nearly always reaches."""
    unlucky = qber + 4.5 * math.sqrt(qber * (1.0 - qber) / n_z)
    efficiency = 1.16 if schedule == "original" else 1.08
    return math.ceil(efficiency * n_z * binary_entropy(unlucky)) + 64


def worst_counts(optics: Optics, n_z: int, n_x: int) -> Counts:
    """Expected statistics of a block, each moved :data:`TEST_MARGIN` standard deviations to the bad side."""
    n_zd, m_z = _shifted(optics, n_z, 1.0)
    n_xd, m_x = _shifted(optics, n_x, 0.0)
    return Counts(Pair(n_z - n_zd, n_zd), m_z, Pair(n_x - n_xd, n_xd), m_x)


def _shifted(optics: Optics, total: int, decoy_errors: float) -> tuple[float, Pair]:
    """(detections of the decoy, errors): fewer decoys, more errors; in X fewer errors of the decoy."""
    gain = optics.mean_gain()
    shares = [p * optics.gain(mu) / gain for p, mu in zip(optics.probabilities, optics.intensities, strict=True)]
    errors = [total * s * optics.qber(mu) for s, mu in zip(shares, optics.intensities, strict=True)]
    decoys = total * shares[1] - TEST_MARGIN * math.sqrt(total * shares[0] * shares[1])
    sign = 1.0 if decoy_errors else -1.0
    moved = [e + direction * TEST_MARGIN * math.sqrt(e) for e, direction in zip(errors, (1.0, sign), strict=True)]
    return max(0.0, decoys), Pair(moved[0], max(0.0, moved[1]))


def _sure_size(expected: float) -> int:
    return max(0, math.floor(expected - SIZE_MARGIN * math.sqrt(expected)))


__all__ = ["Plan", "constant_cost", "leak_budget", "make_plan", "worst_counts"]
