"""How much of its formula's key a link delivers: blocks of 10^6 key bits through the whole post-processing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from keysource.qkd.distill.party import Terms
from keysource.qkd.duet import play
from keysource.qkd.optics.model import Optics
from keysource.qkd.plan import Plan, make_plan
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
    """``formula``: for everything that the N pulses of the block sift on average; ``planned``: for the plan's sizes,
    which are five standard deviations less."""

    km: float
    key_bits: int
    length: int
    accepted: int
    blocks: int
    formula: int
    planned: int

    @property
    def share(self) -> float:
        """Length x acceptance over the length of the formula."""
        return self.length * self.accepted / self.blocks / self.formula


def acceptance(km: float, blocks: int, nature: np.random.Generator | None = None) -> Accepted:
    """Both ends of each block, in this process.  The formula has the same pulses and the expected statistics, no
    margins, and error correction at :data:`FORMULA_F`, with Bob's parities counted as Alice's are."""
    optics, plan, formula = _planned(km)
    terms, dice = Terms(plan, optics.source, optics.p_z, Security()), nature or np.random.default_rng()
    reasons = [play(terms, optics, dice)[0].reason for _ in range(blocks)]
    passed = sum(reason is None for reason in reasons)
    return Accepted(km, plan.n_z, plan.length, passed, blocks, formula, _formula(optics, plan.n_z, plan.n_x))


def planned_share(km: float) -> float:
    """Length over formula, where every block passes."""
    _optics, plan, formula = _planned(km)
    return plan.length / formula


def _planned(km: float) -> tuple[Optics, Plan, int]:
    """(link, plan of its blocks, formula for all that they sift)."""
    optics = replace(GOOD, distance_km=km)
    pulses = round(1.01 * BLOCK / optics.sifted()[0])
    n_z, n_x = (pulses * share for share in optics.sifted())
    return optics, make_plan(optics, pulses, Security(), "optimised"), _formula(optics, n_z, n_x)


def _formula(optics: Optics, n_z: float, n_x: float) -> int:
    security = Security()
    leak = 2.0 * FORMULA_F * n_z * binary_entropy(optics.mean_qber())
    return secret_bits(optics.source, judge(optics.source, optics.expected(n_z, n_x), security), leak, security)
