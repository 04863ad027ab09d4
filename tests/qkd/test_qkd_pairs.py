"""Entangled pairs: closed forms of gain and error, CHSH of perfect and noisy pairs, Eve in the middle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysource.qkd.optics.pairs import CHSH, PairLink, acin_rate, chsh, fly, fock_rotation, passes
from keysource.qkd.rates.asymptotic import Pairs

Z_X = ((0.0, math.pi / 4), (0.0, math.pi / 4))
BELL = ((CHSH[0], CHSH[1]), (CHSH[2], CHSH[3]))
FAINT = PairLink(0.01, 0.6, 0.6, 1e-7, 0.0)


@given(st.integers(0, 4), st.integers(0, 4), st.floats(-3.2, 3.2))
def test_a_turned_analyser_conserves_probability_and_mean(n: int, m: int, angle: float) -> None:
    p = fock_rotation(n, m, angle)
    assert p.sum() == pytest.approx(1.0) and (p >= 0).all()
    mean = n * math.cos(angle) ** 2 + m * math.sin(angle) ** 2
    assert float(p @ np.arange(n + m + 1)) == pytest.approx(mean, abs=1e-9)


def test_two_photons_bunch() -> None:
    """Hong, Ou, Mandel: one photon in each polarisation, analysed at 45 degrees, never splits."""
    assert fock_rotation(1, 1, math.pi / 4) == pytest.approx([0.5, 0.0, 0.5])
    assert fock_rotation(3, 0, math.pi / 4) == pytest.approx([0.125, 0.375, 0.375, 0.125])


@pytest.mark.parametrize("link", [PairLink(0.2, 0.5, 0.3, 1e-4, 0.0), PairLink(0.1, 0.2, 0.2, 1e-3, 0.02)])
def test_gain_and_errors_are_those_of_the_closed_form(link: PairLink) -> None:
    """Ma, Fung, Lo: multi-pair errors come out by themselves."""
    pulses = 3_000_000
    seen = fly(link, pulses, Z_X, np.random.default_rng(1))
    dark = 1 - (1 - link.dark) ** 2
    expected = Pairs(link.pairs, link.eta_a, link.eta_b, dark, dark, link.e_d)
    assert abs(len(seen.a) - pulses * expected.gain()) < 4.5 * math.sqrt(len(seen.a))
    same = seen.angle_a == seen.angle_b
    wrong, count = int((seen.a != seen.b)[same].sum()), int(same.sum())
    ratio = expected.error_gain() / expected.gain()
    assert abs(wrong - count * ratio) < 4.5 * math.sqrt(count * ratio) + 0.02 * wrong
    other = (seen.a != seen.b)[~same]
    assert abs(other.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(len(other)), "other bases agree by chance"


def test_faint_pairs_violate_chsh_by_all_that_nature_allows() -> None:
    s, sigma = chsh(fly(FAINT, 12_000_000, BELL, np.random.default_rng(2)))
    visibility = 1 - 2 * 0.5 * FAINT.pairs  # about one pair in a hundred is joined by an independent one
    assert sigma < 0.02 and abs(s - 2 * math.sqrt(2) * visibility) < 5 * sigma and s < 2 * math.sqrt(2) + 5 * sigma
    assert passes(s, sigma) and not passes(2.01, 0.01)


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, math.sqrt(2)), (0.5, 1.5 * math.sqrt(2))])
def test_eve_in_the_key_bases_brings_s_down_linearly_to_the_root_of_two(fraction: float, expected: float) -> None:
    link = PairLink(0.01, 0.8, 0.8, 0.0, 0.0)
    s, sigma = chsh(fly(link, 10_000_000, BELL, np.random.default_rng(3), intercepted=fraction))
    assert abs(s - expected) < 5 * sigma + 0.02
    key = fly(link, 4_000_000, Z_X, np.random.default_rng(4), intercepted=fraction)
    same = key.angle_a == key.angle_b
    error = (key.a != key.b)[same].mean()
    assert abs(error - fraction / 4) < 0.02 and not (fraction == 1.0 and passes(s, sigma))


def werner(visibility: float, events: int, seed: int) -> tuple[float, float]:
    """S of faint pairs of which Bob's bits are flipped with (1 - V) / 2: the correlations of a Werner pair."""
    nature = np.random.default_rng(seed)
    seen = fly(PairLink(0.002, 1.0, 1.0, 0.0, 0.0), events * 500, BELL, nature)
    flipped = nature.random(len(seen.a)) < (1 - visibility) / 2
    return chsh(replace(seen, b=seen.b ^ flipped.astype(np.uint8)))


def test_s_and_its_error_are_the_published_ones() -> None:
    """V = 0.95: S = 2.6870, sigma 0.0296 at 10^4 events."""
    s, sigma = werner(0.95, 10_000, 5)
    assert sigma == pytest.approx(0.0296, rel=0.06) and abs(s - 2.6870) < 5 * sigma


@pytest.mark.parametrize(("v", "s", "qber", "rate"), [
    (1.00, 2.828427, 0.0, 1.0), (0.98, 2.771859, 0.01, 0.776598), (0.95, 2.687006, 0.025, 0.539062),
    (0.90, 2.545584, 0.05, 0.224950), (0.85, 2.404163, 0.075, -0.033850), (0.80, 2.262742, 0.10, -0.256344),
])  # fmt: skip
def test_the_rate_that_is_not_claimed(v: float, s: float, qber: float, rate: float) -> None:
    assert 2 * math.sqrt(2) * v == pytest.approx(s, abs=1e-6) and (1 - v) / 2 == pytest.approx(qber)
    assert acin_rate(2 * math.sqrt(2) * v, qber) == pytest.approx(rate, abs=1e-6)
    assert acin_rate(2.424, 0.071492) == pytest.approx(0, abs=1e-3)
