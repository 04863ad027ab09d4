"""Finite-key bounds: published constants and table values, and the order that must never break."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qkd_bench import OPTICS

from keysource.qkd.optics.model import Optics
from keysource.qkd.plan import make_plan
from keysource.qkd.presets import PRESETS
from keysource.qkd.rates import proofs
from keysource.qkd.rates.entropy import binary_entropy
from keysource.qkd.rates.finite import (
    Counts,
    Decoy,
    Pair,
    Security,
    bounds,
    constant_cost,
    secret_bits,
    single_lower,
)
from keysource.qkd.rates.proofs import judge

PAPER = Security(1e-9, 1e-15)


def expected_counts(optics: Optics, n_z: float) -> Counts:
    """A block whose statistics are exactly what the closed form says."""
    gain = optics.mean_gain()
    n_x = n_z * ((1 - optics.p_z) / optics.p_z) ** 2

    def pairs(total: float) -> tuple[Pair, Pair]:
        shares = [p * optics.gain(mu) / gain for p, mu in zip(optics.probabilities, optics.intensities, strict=True)]
        n = [total * share for share in shares]
        return Pair(*n), Pair(*(k * optics.qber(mu) for k, mu in zip(n, optics.intensities, strict=True)))

    n_zp, m_z = pairs(n_z)
    n_xp, m_x = pairs(n_x)
    return Counts(n_zp, m_z, n_xp, m_x)


def rusca(km: float) -> Optics:
    """Fixed parameters of the reference table: mu .5/.15, p1 .7, p_Z .9, eta_Bob .2, p_d 1e-7, e_mis 1 %."""
    return Optics(Decoy(0.5, 0.15, 0.7), 0.9, km, 0.2, 0.2, 1e-7, 0.01, 1e9)


def test_binary_entropy_has_its_known_values() -> None:
    known = {0.005: 0.045415, 0.01: 0.080793, 0.02: 0.141441, 0.05: 0.286397, 0.11: 0.499916}
    for x, h in known.items():
        assert binary_entropy(x) == pytest.approx(h, abs=1e-6) == binary_entropy(1 - x)
    assert binary_entropy(0) == binary_entropy(1) == 0.0


def test_what_every_block_pays_is_the_published_constant() -> None:
    """1e-9 / 1e-15: 185.0459 bits (arXiv:2405.16578), 255.7006 bits (arXiv:1801.03443)."""
    assert constant_cost(PAPER, "wiesemann2024") == pytest.approx(185.0459, abs=5e-5)
    assert constant_cost(PAPER, "rusca2018") == pytest.approx(255.7006, abs=5e-5)


@pytest.mark.parametrize(("km", "n_z", "bits", "tolerance"), [
    (0, 1e7, 3531119, 1e-3),
    (50, 1e7, 3213057, 1e-5),
    (100, 1e7, 3166925, 1e-5),
    (100, 1e8, 38305675, 1e-5),
])  # fmt: skip
def test_rusca_lengths_match_independently_computed_ones(km: float, n_z: float, bits: int, tolerance: float) -> None:
    optics = rusca(km)
    counts = expected_counts(optics, n_z)
    found = bounds(optics.decoy, counts, PAPER, "rusca2018")
    leak = 1.16 * n_z * binary_entropy(counts.m_z.total / n_z)
    assert secret_bits(found, leak, PAPER, "rusca2018") == pytest.approx(bits, rel=tolerance)


def test_too_small_a_block_gives_nothing_and_never_less() -> None:
    optics = rusca(50)
    counts = expected_counts(optics, 1e5)
    for proof in ("wiesemann2024", "rusca2018"):
        assert secret_bits(bounds(optics.decoy, counts, PAPER, proof), 1e5, PAPER, proof) == 0
    nothing = Counts(*(Pair(0, 0),) * 4)
    assert secret_bits(bounds(optics.decoy, nothing, PAPER), 0, PAPER) == 0


optics_drawn = st.builds(
    lambda mu1, ratio, p1, pz, km, e: Optics(Decoy(mu1, mu1 * ratio, p1), pz, km, 0.2, 0.3, 1e-7, e, 1e9),
    st.floats(0.2, 0.9),
    st.floats(0.05, 0.7),
    st.floats(0.1, 0.9),
    st.floats(0.3, 0.95),
    st.floats(0.0, 120.0),
    st.floats(0.0, 0.06),
)


@settings(max_examples=300, deadline=None)
@given(optics_drawn, st.floats(4.0, 10.0), st.sampled_from(["wiesemann2024", "rusca2018"]))
def test_the_order_finite_below_truth_below_plob_never_breaks(optics: Optics, exponent: float, proof: str) -> None:
    """s_1 and phi of the bound are worse than the true ones, more pulses never give less, PLOB is never passed."""
    n_z = 10.0**exponent
    counts = expected_counts(optics, n_z)
    found = bounds(optics.decoy, counts, PAPER, proof)
    dark = 1 - (1 - optics.dark) ** 2
    yield_1 = 1 - (1 - dark) * (1 - optics.eta)
    true_singles = n_z * optics.decoy.tau(1) * yield_1 / optics.mean_gain()
    cos2 = 1 - 2 * optics.misalignment
    true_error = (yield_1 - (1 - optics.dark) * optics.eta * cos2) / (2 * yield_1)
    assert 0 <= found.s_z1 <= true_singles * (1 + 1e-9)
    assert found.phi >= min(0.5, true_error - 1e-12)
    length = secret_bits(found, 0.0, PAPER, proof)
    more = bounds(optics.decoy, expected_counts(optics, 2 * n_z), PAPER, proof)
    assert 0 <= length <= max(1, secret_bits(more, 0.0, PAPER, proof))
    pulses = n_z / (optics.mean_gain() * optics.p_z**2)
    plob = -pulses * math.log2(1 - optics.eta) + dark * pulses
    assert length <= plob


@settings(max_examples=100, deadline=None)
@given(optics_drawn, st.floats(5.0, 9.0))
def test_a_smaller_error_budget_never_gives_more_key(optics: Optics, exponent: float) -> None:
    counts = expected_counts(optics, 10.0**exponent)
    strict, lax = Security(1e-12, 1e-15), Security(1e-6, 1e-15)
    assert secret_bits(bounds(optics.decoy, counts, strict), 0, strict) <= secret_bits(
        bounds(optics.decoy, counts, lax), 0, lax
    )


def test_the_single_photon_bound_holds_against_true_photon_numbers() -> None:
    """Blocks whose photon numbers nature knows: the bound at 1e-9 is below the truth every time."""
    nature, decoy = np.random.default_rng(7), OPTICS.decoy
    for _ in range(300):
        n, m, singles = [], [], 0
        for mu, share in zip((decoy.mu1, decoy.mu2), (decoy.p1, 1 - decoy.p1), strict=True):
            photons = nature.poisson(mu, round(40_000 * share))
            clicked = nature.binomial(photons, OPTICS.eta) > 0
            singles += int((clicked & (photons == 1)).sum())
            n.append(int(clicked.sum()))
            m.append(int((nature.random(n[-1]) < 0.01).sum()))
        assert single_lower(decoy, Pair(*n), Pair(*m), 1e-9) <= singles


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_plan_promises_less_than_its_expected_block_would_allow(preset) -> None:
    plan = preset.plan()
    source = preset.optics.source
    found = judge(source, preset.optics.expected(plan.n_z, plan.n_x), preset.security)
    assert plan.accepts(found, source, preset.security)
    leak = 2 * 1.04 * plan.n_z * binary_entropy(plan.expected_qber)
    ideal = proofs.secret_bits(source, found, leak, preset.security)
    small = preset.name.startswith("small")  # margins of the same number of deviations weigh more in small blocks
    assert (0.4 if small else 0.6) * ideal < plan.length < ideal


def test_a_link_without_key_is_refused_when_planned() -> None:
    with pytest.raises(ValueError, match="no key"):
        make_plan(rusca(150), 10_000_000, PAPER, "original")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="proof"):
        constant_cost(PAPER, "mine")
    with pytest.raises(ValueError, match="mu1 > mu2"):
        Decoy(0.1, 0.5, 0.5)
