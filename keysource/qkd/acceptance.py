"""How much of its formula's key a link delivers: blocks of 10^6 key bits through the whole post-processing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from keysource.qkd.distill.party import Terms
from keysource.qkd.duet import play
from keysource.qkd.optics.model import Optics
from keysource.qkd.plan import make_plan
from keysource.qkd.rates.entropy import binary_entropy
from keysource.qkd.rates.finite import Decoy, Security
from keysource.qkd.rates.proofs import judge, secret_bits

GOOD = Optics(Decoy(0.4, 0.15, 0.5), 0.75, 50.0, 0.2, 0.2, 1e-8, 0.01, 1e9)
"""Settings that are good for blocks of this size."""
BLOCK = 1_000_000
FORMULA_F = 1.027
"""Efficiency of error correction that the formula is given, as Cascade has it at this size."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """``share``: length x acceptance over the length of the formula at the plan's sizes.  The detections that no plan
    counts on (5 % kept for efficiency tests, five standard deviations) are in neither: of the formula for everything
    that N pulses sift, it is 6 to 7 % less."""

    km: float
    key_bits: int
    length: int
    accepted: int
    blocks: int
    formula: int

    @property
    def share(self) -> float:
        return self.length * self.accepted / self.blocks / self.formula


def acceptance(km: float, blocks: int) -> Accepted:
    """Both ends of each block, in this process.  The formula has the same block size and the expected statistics, no
    margins, and error correction at :data:`FORMULA_F`, with Bob's parities counted as Alice's are."""
    optics, security = replace(GOOD, distance_km=km), Security()
    pulses = round(1.06 * BLOCK / optics.sifted()[0])
    plan = make_plan(optics, pulses, security, "optimised")
    terms = Terms(plan, optics.source, optics.p_z, security)
    reasons = [play(terms, optics, np.random.default_rng())[0].reason for _ in range(blocks)]
    leak = 2.0 * FORMULA_F * plan.n_z * binary_entropy(plan.expected_qber)
    expected = judge(optics.source, optics.expected(plan.n_z, plan.n_x), security)
    formula = secret_bits(optics.source, expected, leak, security)
    return Accepted(km, plan.n_z, plan.length, sum(reason is None for reason in reasons), blocks, formula)
