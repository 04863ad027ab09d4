"""The decoy bounds against what nature knows: in every simulated block they are on the safe side of the truth."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from qkd_bench import OPTICS
from scipy import stats

from keysource.qkd.distill.bits import Bits
from keysource.qkd.optics.eve import Eve, Light, Notes, Sent
from keysource.qkd.optics.model import Optics, Recovery
from keysource.qkd.optics.sampler import detect
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.rates.finite import (
    COUNTED,
    TERMS,
    Counts,
    Decoy,
    Pair,
    Security,
    bounds,
    deviation,
    single_errors_upper,
    single_lower,
    vacuum_upper,
)

LONG_RUN = os.environ.get("QVPN_TEST_LONG") == "1"
LINK = replace(OPTICS, distance_km=10.0, detector=0.4, misalignment=0.02)
RESTING = replace(LINK, recovery=Recovery(2e-6, 0.02, 2e-6))


@dataclass(frozen=True, slots=True)
class Census(Eve):
    """Touches nothing: nature's own count of the photons of each pulse, 0, 1, 2 for more."""

    name: str = field(default="census", init=False)

    def sends(self, mu: float, optics: Optics, detector: float) -> list[Sent]:
        eta, one = optics.line * detector, mu * math.exp(-mu)
        rest = 1.0 - math.exp(-mu) - one

        def several(c: float) -> float:
            return (math.exp(-mu * eta * c) - math.exp(-mu) - one * (1.0 - eta * c)) / rest

        return [Sent(math.exp(-mu), 0, lambda c: 1.0), Sent(one, 1, lambda c: 1.0 - eta * c), Sent(rest, 2, several)]

    def notes(self, held: Bits, light: Light, measured: Notes | None) -> Notes | None:
        return Notes(held, light.bit)


def block(optics: Optics, pulses: int, nature: np.random.Generator) -> tuple[Counts, dict[str, int]]:
    """(what both sites count, what only nature knows)."""
    source = SourceSeed(fresh_seed(), optics.p_z, optics.decoy.p1)
    bob = ReceiverSeed(fresh_seed(), optics.p_z)
    seen = detect(optics, source, bob, (0, pulses), Census(1.0), nature)
    alice, bases = source.at(seen.positions), bob.at(seen.positions)
    assert seen.notes is not None
    wrong, single = alice.bit != seen.bits, seen.notes.how == 1

    def pair(chosen: np.ndarray) -> Pair:
        return Pair(int((chosen & (alice.decoy == 0)).sum()), int((chosen & (alice.decoy == 1)).sum()))

    z, x = (alice.check == 0) & (bases == 0), (alice.check == 1) & (bases == 1)
    counts = Counts(pair(z), pair(z & wrong), pair(x), pair(x & wrong))
    truth = {
        "s_z1": int((z & single).sum()),
        "s_x1": int((x & single).sum()),
        "v_x1": int((x & single & wrong).sum()),
    }
    return counts, truth


def test_the_census_disturbs_nothing() -> None:
    nature = np.random.default_rng(1)
    tables = []
    for eve in (Eve(), Census(1.0)):
        source, bob = SourceSeed(fresh_seed(), 0.65, 0.4), ReceiverSeed(fresh_seed(), 0.65)
        seen = detect(LINK, source, bob, (0, 600_000), eve, nature)
        alice, bases = source.at(seen.positions), bob.at(seen.positions)
        cell = 8 * alice.decoy + 4 * alice.check + 2 * bases + (alice.bit == seen.bits)
        tables.append(np.bincount(cell, minlength=16))
    assert stats.chi2_contingency(np.array(tables)).pvalue > 1e-4


@pytest.mark.timeout(900 if LONG_RUN else 120)
@pytest.mark.parametrize(
    "optics", [LINK, replace(LINK, recovery=Recovery(2e-6, 0.02, 2e-6))], ids=["ready", "resting"]
)
def test_the_bounds_hold_in_every_block(optics: Optics) -> None:
    """Singles in the key at least, their errors in the check basis at most, and the phase error ratio that the key's
    singles would have shown, had they been measured in X, at most: 2,200 blocks in a long run, 120 in a short one."""
    nature, security = np.random.default_rng(2), Security(1e-6, 1e-15)
    e1 = 0.5 - (1.0 - 2.0 * optics.misalignment) / 2.0 + 0.02 * (optics.recovery.after_pulse > 0)
    bounded = 0
    for _ in range(1100 if LONG_RUN else 60):
        counts, truth = block(optics, 1_200_000, nature)
        for proof in ("wiesemann2024", "rusca2018"):
            found = bounds(optics.decoy, counts, security, proof)
            assert found.s_z1 <= truth["s_z1"] and found.s_x1 <= truth["s_x1"] and found.v_x1 >= truth["v_x1"]
            phase_errors = nature.binomial(truth["s_z1"], e1)
            assert found.phi >= phase_errors / truth["s_z1"]
            bounded += found.phi < 0.5 and found.s_z1 > 0.5 * truth["s_z1"]
    assert bounded > 50, "bounds that say nothing hold too"


# What the one-decoy bounds take of the error budget

DECOY = Decoy(0.6, 0.2, 0.5)
ALLOWED = 0.8
"""Of each deviation: large, so that bounds do fail and what made them fail can be looked up."""


def basis(nature: np.random.Generator) -> tuple[Pair, Pair, dict[str, float], set[str]]:
    """(detections, errors, the truth, the deviations that happened) in a basis where Eve lets light of 0, 1 and 2
    photons through as she likes: few vacuum events or none but vacuum, and errors of her choice."""
    eve_likes = nature.dirichlet((0.5, 0.5, 0.5))
    photons = nature.choice(3, size=300, p=eve_likes)
    wrong = nature.random(300) < np.array([0.5, nature.random() * 0.2, nature.random()])[photons]
    weight = DECOY.p1 * math.exp(-DECOY.mu1) * DECOY.mu1**photons
    first = weight / (weight + (1.0 - DECOY.p1) * math.exp(-DECOY.mu2) * DECOY.mu2**photons)
    signal = nature.random(300) < first
    n, m = (Pair(int((of & signal).sum()), int((of & ~signal).sum())) for of in (wrong | True, wrong))
    truth = {f"s{k}": int((photons == k).sum()) for k in (0, 1)} | {"v1": int((wrong & (photons == 1)).sum())}
    tilt_n, tilt_m = (float((of * (signal - first)).sum()) for of in (1.0, wrong))  # of mu1 over its expectation
    half = truth["s0"] / 2.0 - float((wrong & (photons == 0)).sum())
    spread_n, spread_m = deviation(n.total, ALLOWED), deviation(m.total, ALLOWED)
    happened = {
        "n: mu1 too few": -tilt_n > spread_n,
        "m: mu1 too few": -tilt_m > spread_m,
        "m: mu2 too few": tilt_m > spread_m,
        "vacuum's half": half > spread_n,
    }
    return n, m, truth, {name for name, did in happened.items() if did}


def failures(n: Pair, m: Pair, truth: dict[str, float]) -> set[str]:
    """Which bounds are on the wrong side of the truth."""
    failed = {"s0": vacuum_upper(DECOY, n, m, ALLOWED) < truth["s0"]}
    failed["s1"] = single_lower(DECOY, n, m, ALLOWED) > truth["s1"]
    failed["v1"] = single_errors_upper(DECOY, m, ALLOWED) < truth["v1"]
    return {name for name, did in failed.items() if did}


def test_four_deviations_of_each_basis_are_all_that_a_one_decoy_bound_can_fail_by() -> None:
    """Vacuum events are bounded by either intensity, the lower bound is used, and all those of errors and of single
    photons: what fails was caused by one of four deviations, and each of the four does cause failures."""
    nature, alone = np.random.default_rng(5), set[str]()
    failed = 0
    for _ in range(6_000):
        n, m, truth, happened = basis(nature)
        wrong = failures(n, m, truth)
        assert happened or not wrong, "a bound fails by a deviation that the budget does not name"
        failed += bool(wrong)
        alone |= happened if wrong and len(happened) == 1 else set()
    assert failed > 100 and alone == {"n: mu1 too few", "m: mu1 too few", "m: mu2 too few", "vacuum's half"}


def test_the_terms_of_the_one_decoy_budget_are_those_that_its_bounds_use() -> None:
    """Four deviations of each basis, five parts for smoothing and hashing, and two more in the chain rule's other
    order: no more than the published 15."""
    for name in ("Z", "X"):
        assert sum(count for what, count in COUNTED.items() if f"s_{name.lower()}1" in what) == 4
    assert sum(COUNTED.values()) == 13 and sum(COUNTED.values()) + 2 == TERMS["wiesemann2024"] == 15
