"""Physics: closed form against the formulas of the literature, the quick sampler against a slow one, Eve's mark."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from qkd_bench import OPTICS
from scipy import stats

from keysource.qkd.optics.eve import Eve, InterceptResend, Light
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import ATTENUATOR
from keysource.qkd.optics.sampler import _undisturbed, candidates, detect
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed, fresh_seed, keystream
from keysource.qkd.optics.table import cases, make_table
from keysource.qkd.rates.finite import Decoy

LONG = Optics(Decoy(0.5, 0.15, 0.6), 0.8, 20.0, 0.2, 0.2, 1e-4, 0.03, 1e6)
"""Loss, and dark counts and misalignment large enough to be seen."""


def fly(optics: Optics, pulses: int, fraction: float = 0.0, seed: int = 1) -> dict[str, np.ndarray]:
    """Settings and outcomes of all detections."""
    source = SourceSeed(fresh_seed(), optics.p_z, optics.decoy.p1)
    receiver = ReceiverSeed(fresh_seed(), optics.p_z)
    nature = np.random.default_rng(seed)
    seen = detect(optics, source, receiver, (0, pulses), InterceptResend(fraction), nature)
    alice = source.at(seen.positions)
    return {
        "positions": seen.positions,
        "a": alice.bit,
        "a_basis": alice.check,
        "decoy": alice.decoy,
        "b": seen.bits,
        "b_basis": receiver.at(seen.positions),
    }


def photon_by_photon(optics: Optics, pulses: int, fraction: float, nature: np.random.Generator) -> np.ndarray:
    """The slow model: throws every photon of every pulse.  Counts by [decoy][agree][wrong, right]."""
    counts = np.zeros((2, 2, 2))
    for decoy, (mu, share) in enumerate(zip(optics.intensities, optics.probabilities, strict=True)):
        n = round(pulses * share)
        a_basis, b_basis = (nature.random((2, n)) >= optics.p_z).astype(int)
        bit = nature.integers(0, 2, n)
        photons = nature.poisson(mu, n)
        basis, sent = a_basis.copy(), bit.copy()
        caught = nature.random(n) < fraction
        e_basis = nature.integers(0, 2, n)
        # Eve's own two detectors: photons of the other basis split; ties are a coin
        at_one = nature.binomial(photons, np.where(e_basis == a_basis, bit, 0.5))
        seen = np.where(at_one == photons, 1, np.where(at_one == 0, 0, nature.integers(0, 2, n)))
        seen = np.where(photons == 0, nature.integers(0, 2, n), seen)
        basis, sent = np.where(caught, e_basis, basis), np.where(caught, seen, sent)
        arrived = nature.binomial(photons, optics.eta)
        p_one = np.where(basis != b_basis, 0.5, np.where(sent == 1, 1 - optics.misalignment, optics.misalignment))
        ones = nature.binomial(arrived, p_one)
        click_one = (ones > 0) | (nature.random(n) < optics.dark)
        click_zero = (arrived - ones > 0) | (nature.random(n) < optics.dark)
        result = np.where(click_one & click_zero, nature.integers(0, 2, n), click_one.astype(int))
        clicked = click_one | click_zero
        for agree, right in itertools.product((0, 1), (0, 1)):
            where = clicked & ((a_basis == b_basis) == bool(agree)) & ((result == bit) == bool(right))
            counts[decoy, agree, right] = where.sum()
    return counts


def table(found: dict[str, np.ndarray]) -> np.ndarray:
    counts = np.zeros((2, 2, 2))
    agree = (found["a_basis"] == found["b_basis"]).astype(int)
    right = (found["a"] == found["b"]).astype(int)
    np.add.at(counts, (found["decoy"], agree, right), 1)
    return counts


@pytest.mark.parametrize("optics", [OPTICS, LONG, replace(LONG, misalignment=0.0), replace(LONG, dark=0.0)])
@pytest.mark.parametrize("mu", [0.05, 0.15, 0.5, 1.0])
def test_gain_and_error_are_the_published_closed_form(optics: Optics, mu: float) -> None:
    """qber from click probabilities of two detectors = the one-line form with random double clicks."""
    light, pd, s = mu * optics.eta, optics.dark, optics.misalignment
    gain = 1 - (1 - pd) ** 2 * math.exp(-light)
    error = (
        1 + (1 - pd) * (math.exp(-light * (1 - s)) - math.exp(-light * s)) - (1 - pd) ** 2 * math.exp(-light)
    ) / 2
    assert optics.gain(mu) == pytest.approx(gain, rel=1e-12)
    assert optics.error_gain(mu) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_sparse_sampler_has_the_distribution_of_throwing_every_photon(fraction: float) -> None:
    pulses = 2_000_000
    slow = photon_by_photon(LONG, pulses, fraction, np.random.default_rng(2))
    quick = table(fly(LONG, pulses, fraction))
    result = stats.chi2_contingency(np.stack([slow.ravel(), quick.ravel()]))
    assert result.pvalue > 1e-4, (slow, quick)


@pytest.mark.parametrize("optics", [OPTICS, LONG])
def test_gain_and_qber_of_each_intensity_and_basis_match_the_closed_form(optics: Optics) -> None:
    pulses = 1_000_000
    found = fly(optics, pulses)
    for decoy, basis in itertools.product((0, 1), (0, 1)):
        mu, share = optics.intensities[decoy], optics.probabilities[decoy]
        chosen = (found["decoy"] == decoy) & (found["a_basis"] == basis) & (found["b_basis"] == basis)
        sent = pulses * share * (optics.p_z if basis == 0 else 1 - optics.p_z) ** 2
        expected = sent * optics.gain(mu)
        assert abs(chosen.sum() - expected) < 5 * math.sqrt(expected)
        wrong, n = (found["a"] != found["b"])[chosen].sum(), chosen.sum()
        e = optics.qber(mu)
        assert abs(wrong - n * e) < 5 * math.sqrt(n * e * (1 - e)) + 1


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_eve_raises_the_error_ratio_by_a_quarter_of_her_fraction_and_leaves_the_gain(fraction: float) -> None:
    optics = replace(OPTICS, misalignment=0.0, dark=0.0)
    pulses = 1_000_000
    counts = table(fly(optics, pulses, fraction))
    agreeing = counts[:, 1, :]
    n, wrong = agreeing.sum(), agreeing[:, 0].sum()
    # a double click of light split by the wrong basis is a coin too: exactly a quarter whatever the intensity
    e = fraction / 4
    assert abs(wrong - n * e) <= 4 * math.sqrt(n * e * (1 - e))
    expected = pulses * optics.mean_gain()
    assert abs(counts.sum() - expected) < 5 * math.sqrt(expected)


def test_eve_does_not_read_intensities_or_know_alices_basis() -> None:
    """Her function is given light and nature only, and gives light of the same shape."""
    nature = np.random.default_rng(5)
    light = Light(np.zeros(40_000, dtype=np.uint8), np.ones(40_000, dtype=np.uint8))
    after, _notes = InterceptResend(1.0).touch(light, OPTICS, nature)
    assert 0.48 < after.check.mean() < 0.52
    assert after.bit[after.check == 0].all()  # her basis was right
    assert 0.47 < after.bit[after.check == 1].mean() < 0.53


def test_settings_come_from_the_seed_at_any_pulse_number_and_are_balanced() -> None:
    source, receiver = SourceSeed(fresh_seed(), 0.7, 0.4), ReceiverSeed(fresh_seed(), 0.7)
    where = np.arange(200_000, dtype=np.uint64)
    all_of_them, some = source.at(where), source.at(where[137::1000])
    assert (all_of_them.bit[137::1000] == some.bit).all() and (all_of_them.decoy[137::1000] == some.decoy).all()
    for values, p in (
        (all_of_them.bit, 0.5),
        (all_of_them.check, 0.3),
        (all_of_them.decoy, 0.6),
        (receiver.at(where), 0.3),
    ):
        assert abs(values.mean() - p) < 5 * math.sqrt(p * (1 - p) / len(where))
    cells = all_of_them.bit * 4 + all_of_them.check * 2 + all_of_them.decoy
    p = [b * c * d for b in (0.5, 0.5) for c in (0.7, 0.3) for d in (0.4, 0.6)]
    assert stats.chisquare(np.bincount(cells, minlength=8), np.array(p) * len(where)).pvalue > 1e-5
    assert (SourceSeed(fresh_seed(), 0.7, 0.4).at(where).bit != all_of_them.bit).any()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_settings_are_read_off_aes_blocks_bit_by_bit(p: float) -> None:
    """Each pulse alone, in whole numbers: AES-256 of its number."""
    seed, where = fresh_seed(), [0, 1, 77, 8191, 8192, 8193, 2**40 + 5, 2**60]
    positions = np.array(where, dtype=np.uint64)
    cipher = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    blocks = [cipher.update(number.to_bytes(16, "big")) for number in where]
    lots = [[int.from_bytes(block[at : at + 4], "little") for at in range(0, 16, 4)] for block in blocks]
    assert keystream(seed, positions).tobytes() == b"".join(blocks)

    def at_least(column: int, share: float) -> list[int]:
        return [int(row[column] >= round(share * 2**32)) for row in lots]

    alice = SourceSeed(seed, p, 0.4).at(positions)
    assert alice.bit.tolist() == [row[2] & 1 for row in lots]
    assert alice.check.tolist() == at_least(0, p) and alice.decoy.tolist() == at_least(1, 0.4)
    three = SourceSeed(seed, p, 0.4, 0.3).at(positions)
    assert three.decoy.tolist() == [a + b for a, b in zip(at_least(1, 0.4), at_least(1, 0.7), strict=True)]
    bob = ReceiverSeed(seed, p, 0.25, 0.5)
    bases, tested = bob.both(positions)
    assert bases.tolist() == at_least(0, p) == bob.at(positions).tolist()
    assert tested.tolist() == [1 - each for each in at_least(1, 0.25)]
    turned = [2 + (row[2] & 1) if row[3] < 2**31 else basis for row, basis in zip(lots, at_least(0, p), strict=True)]
    assert bob.angles(positions).tolist() == turned


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("dense", [False, True])
def test_what_cannot_click_is_thrown_away_early_and_nothing_else(share: float, dense: bool) -> None:
    """The same dice for all pulses at once, with Bob's choices worked out for each."""
    table = make_table(LONG, Eve(), ATTENUATOR)
    source, receiver = SourceSeed(fresh_seed(), 0.8, 0.6), ReceiverSeed(fresh_seed(), 0.8, share)
    most = 1.0 if dense else table.most
    positions = candidates(0, 200_000, most, np.random.default_rng(5))
    clicks = _undisturbed(table, source, receiver, (positions, most), np.random.default_rng(6))
    settings, (bases, tested) = source.at(positions), receiver.both(positions)
    dice = np.random.default_rng(6).random(len(positions)) * most
    case = cases(settings.decoy, Light(settings.check, settings.bit), bases, tested if share else None)
    clicked, ports, _held = table.throw(dice, case)
    assert clicks.gates.tolist() == positions[clicked].tolist() and clicks.ports.tolist() == ports.tolist()
    assert 0 < len(clicked) < len(positions)


def test_candidates_are_independent_and_stay_inside() -> None:
    nature = np.random.default_rng(3)
    found = candidates(1000, 100_000, 0.05, nature)
    assert found[0] >= 1000 and found[-1] < 101_000 and (np.diff(found.astype(np.int64)) > 0).all()
    assert abs(len(found) - 5000) < 5 * math.sqrt(5000 * 0.95)
    halves = [len(candidates(0, 50, 0.3, nature)) for _ in range(4000)]
    expected = stats.binom.pmf(np.arange(51), 50, 0.3) * 4000
    observed = np.bincount(halves, minlength=51)
    some = expected > 10
    assert stats.chisquare(observed[some], expected[some] * observed[some].sum() / expected[some].sum()).pvalue > 1e-5


def test_slices_of_a_block_are_the_same_pulses() -> None:
    """Two slices together have no pulse twice and none outside."""
    source, receiver = SourceSeed(fresh_seed(), 0.7, 0.4), ReceiverSeed(fresh_seed(), 0.7)
    nature = np.random.default_rng(4)
    parts = [detect(OPTICS, source, receiver, span, InterceptResend(), nature) for span in ((0, 3000), (3000, 7000))]
    joined = np.concatenate([part.positions for part in parts])
    assert (np.diff(joined.astype(np.int64)) > 0).all() and joined[-1] < 10_000
    assert parts[0].positions[-1] < 3000 <= parts[1].positions[0]
