"""Dead time, after-pulses, double clicks, dense and sparse: each against a loop over gates or the closed form."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qkd_bench import OPTICS
from scipy import stats

from keysource.qkd.optics.detectors import BOTH, ONE, ZERO, Clicks, Receiver, _some, bits_of, ready_again
from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.model import Optics, Recovery, Stretch
from keysource.qkd.optics.sampler import Method, detect
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.rates.finite import Decoy

LONG = Optics(Decoy(0.5, 0.15, 0.6), 0.8, 20.0, 0.2, 0.2, 1e-4, 0.03, 1e6)
BUSY = replace(LONG, recovery=Recovery(10e-6, 0.1, 20e-6))
"""Ten gates of dead time, traps that live 20 gates: enough of both to be seen."""
SEEDS = 20 if os.environ.get("QVPN_TEST_LONG") == "1" else 4


def gate_by_gate(clicks: dict[int, int], recovery: Recovery, rate: float, end: int, seed: int) -> dict[int, int]:
    """The slow model: one gate after the other, one trap after the other."""
    nature, dead = np.random.default_rng(seed), recovery.dead_gates(rate)
    traps: dict[int, list[int]] = {}
    found, blind = {}, -1
    for gate in range(end):
        causes = ([clicks[gate]] if gate in clicks else []) + traps.pop(gate, [])
        if gate <= blind or not causes:
            continue
        found[gate] = int(np.bitwise_or.reduce(causes))
        blind = gate + dead
        for cause in causes:
            if nature.random() < recovery.after_pulse:
                port = cause if cause != BOTH else int(nature.integers(ZERO, BOTH))
                wait = int(nature.geometric(1.0 - recovery.survival(rate)))
                traps.setdefault(gate + dead + wait, []).append(port)
    return found


@given(st.lists(st.integers(0, 300), unique=True), st.integers(0, 40), st.integers(-1, 60))
def test_dead_time_in_arrays_is_dead_time_in_a_loop(gates: list[int], dead: int, blind: int) -> None:
    gates.sort()
    expected, until = [], blind
    for gate in gates:
        expected.append(gate > until)
        until = gate + dead if gate > until else until
    assert ready_again(np.array(gates, dtype=np.int64), dead, blind).tolist() == expected


def test_after_pulses_in_arrays_have_the_distribution_of_the_loop() -> None:
    """Clicks, their ports and the gaps between them: chi-square over many short runs."""
    recovery, rate, end = Recovery(3e-6, 0.3, 4e-6), 1e6, 4000
    nature = np.random.default_rng(1)
    tables = np.zeros((2, 4 * 12))
    for run in range(60):
        gates = np.flatnonzero(nature.random(end) < 0.08)
        ports = nature.choice([ZERO, ONE, BOTH], len(gates), p=[0.5, 0.4, 0.1]).astype(np.uint8)
        slow = gate_by_gate(dict(zip(gates.tolist(), ports.tolist(), strict=True)), recovery, rate, end, run)
        receiver, quick = Receiver(recovery, rate), {}
        for low in range(0, end, 500):  # in slices, with state between them
            inside = (gates >= low) & (gates < low + 500)
            found, light = receiver.take(Clicks(gates[inside], ports[inside]), low + 500, nature)
            assert ((light < 0) | (gates[inside][light] == found.gates)).all()
            quick.update(zip(found.gates.tolist(), found.ports.tolist(), strict=True))
        for which, found_gates in enumerate((slow, quick)):
            at = np.array(sorted(found_gates))
            gap = np.minimum(np.diff(at) - recovery.dead_gates(rate) - 1, 11)
            assert (gap >= 0).all(), "a click in the dead time"
            kind = np.array([found_gates[g] for g in at.tolist()][1:])
            np.add.at(tables[which], gap * 4 + kind, 1)
    seen = tables.sum(0) > 20
    assert stats.chi2_contingency(tables[:, seen]).pvalue > 1e-4, tables


@settings(max_examples=300 if SEEDS > 4 else 60, deadline=None)
@given(
    st.integers(0, 12), st.floats(0.01, 0.45), st.floats(0.0, 9e-6), st.floats(0.01, 0.6), st.integers(0, 2**32 - 1)
)
def test_causes_fire_as_they_would_one_after_the_other(
    dead: int, after: float, trap: float, busy: float, seed: int
) -> None:
    """The same lots, gate by gate, over slices with state between them."""
    nature, receiver = np.random.default_rng(seed), Receiver(Recovery(dead * 1e-6, after, trap), 1e6)
    for low in range(0, 900, 300):
        gates = low + np.flatnonzero(nature.random(300) < busy)
        clicks = Clicks(gates, nature.integers(ZERO, BOTH, len(gates), dtype=np.uint8, endpoint=True))
        pending, blind = receiver._pending, receiver._blind_until
        causes = receiver._causes(clicks, nature)
        check_causes(causes, clicks, pending, dead)
        fired = receiver._fired(causes, low + 300)
        expected, left = one_by_one(causes, low + 300, dead, blind)
        assert fired.tolist() == expected
        assert receiver._pending.gates.tolist() == causes.gates[left].tolist()
        receiver._remember(causes.gates[: len(fired)][fired])


def check_causes(causes: object, clicks: Clicks, pending: Clicks, dead: int) -> None:
    """Sorted; every click is there with its ports; a trap is live only after its parent's dead time."""
    assert (np.diff(causes.gates) >= 0).all() and len(causes.light) == len(causes.gates)
    light = causes.light >= 0
    assert causes.light[light].tolist() == list(range(len(clicks.gates)))
    assert (causes.gates[light] == clicks.gates).all() and (causes.ports[light] == clicks.ports).all()
    assert causes.traps.tolist() == np.flatnonzero(~light).tolist()
    over = causes.parent < 0
    assert sorted(causes.gates[causes.traps[over]].tolist()) == sorted(pending.gates.tolist())
    born, parents = causes.traps[~over], causes.parent[~over]
    assert (causes.gates[born] - causes.gates[parents] > dead).all()
    assert ((causes.ports[born] & causes.ports[parents]) == causes.ports[born]).all(), "the trap sits where it fired"


def one_by_one(causes: object, end: int, dead: int, blind: int) -> tuple[list[bool], list[int]]:
    parent = dict(zip(causes.traps.tolist(), causes.parent.tolist(), strict=True))
    fired: list[bool] = []
    newest, left = -1, []
    for number, gate in enumerate(causes.gates.tolist()):
        came = parent.get(number, -1)
        possible = came < 0 or (came < len(fired) and fired[came])
        if gate >= end:
            left += [number] if possible and number in parent else []
            continue
        fired.append(possible and (gate > blind or gate == newest))
        if fired[-1] and gate != newest:
            newest, blind = gate, gate + dead
    return fired, left


def test_lots_are_drawn_with_their_probability_and_for_each_alone() -> None:
    nature, seen = np.random.default_rng(8), np.zeros(5000)
    for p in (0.002, 0.05, 0.3):
        seen[:] = 0
        for _ in range(400):
            seen[_some(5000, p, nature)] += 1
        total = 400 * 5000 * p
        assert abs(seen.sum() - total) < 5 * total**0.5
        assert abs(seen.var() - 400 * p * (1 - p)) < 0.15 * 400 * p, "no place is favoured, and none left out"
    assert len(_some(0, 0.05, nature)) == 0 and len(_some(1, 0.05, nature)) <= 1


def fly(optics: Optics, pulses: int, method: Method, seed: int) -> np.ndarray:
    """Counts by (intensity, Alice's basis, Bob's basis, wrong or right)."""
    source = SourceSeed(fresh_seed(), optics.p_z, optics.decoy.p1)
    bob = ReceiverSeed(fresh_seed(), optics.p_z)
    seen = detect(optics, source, bob, (0, pulses), Eve(), np.random.default_rng(seed), method=method)
    alice, bases = source.at(seen.positions), bob.at(seen.positions)
    counts = np.zeros((2, 2, 2, 2))
    np.add.at(counts, (alice.decoy, alice.check, bases, (alice.bit == seen.bits).astype(int)), 1)
    return counts


@pytest.mark.parametrize("optics", [LONG, BUSY], ids=["ready", "recovering"])
def test_dense_and_sparse_are_one_distribution(optics: Optics) -> None:
    """Both throw for the same settings distribution: intensity x bases x outcome, no clicks among the cells."""
    for seed in range(SEEDS):
        pulses = 400_000
        both = [fly(optics, pulses, method, seed).ravel() for method in ("dense", "sparse")]
        cells = np.array([np.append(counts, pulses - counts.sum()) for counts in both])
        cells = cells[:, cells.sum(0) >= 10]  # chi-square wants expected counts of 5 and more
        assert stats.chi2_contingency(cells).pvalue > 1e-3 / SEEDS, cells


@pytest.mark.parametrize("method", ["dense", "sparse"])
@pytest.mark.parametrize("optics", [LONG, BUSY, replace(BUSY, recovery=Recovery(50e-6, 0.02, 0.0))])
def test_gain_and_error_match_the_closed_form(optics: Optics, method: Method) -> None:
    """Every cell of (intensity, basis, outcome) against Q and E, with dead time and after-pulses."""
    pulses = 2_000_000
    counts, expected = fly(optics, pulses, method, 7), []
    for decoy, mu in enumerate(optics.intensities):
        for basis, p in enumerate((optics.p_z, 1 - optics.p_z)):
            sent = pulses * optics.probabilities[decoy] * p * p
            error = optics.error_gain(mu)
            expected.append([sent * error, sent * (optics.gain(mu) - error)])
            for kind, mean in enumerate(expected[-1]):
                assert abs(counts[decoy, basis, basis, kind] - mean) < 5 * math.sqrt(mean) + 0.002 * mean
    assert abs(counts.sum() - pulses * optics.mean_gain()) < 5 * math.sqrt(counts.sum())


def test_dead_time_is_the_published_formula_and_after_pulses_cost_half_of_theirs() -> None:
    """Rusca 2018, appendix B: 1 / (1 + R P t); Lim 2014: an after-pulse is wrong half of the time."""
    dead = replace(LONG, recovery=Recovery(dead_time=25e-6))
    for mu in LONG.intensities:
        assert dead.gain(mu) == pytest.approx(LONG.gain(mu) / (1 + 25 * LONG.mean_gain()), rel=1e-12)
        assert dead.qber(mu) == pytest.approx(LONG.qber(mu), rel=1e-12)
    quiet = replace(LONG, dark=1e-7, misalignment=0.0)
    traps = replace(quiet, recovery=Recovery(0.0, 0.04, 0.0))
    assert traps.mean_gain() / quiet.mean_gain() == pytest.approx(1.04, abs=2e-3)
    assert traps.mean_qber() == pytest.approx(0.02, abs=1.5e-3)


def test_double_clicks_are_kept_and_are_a_fair_coin() -> None:
    ports = np.full(20_000, BOTH, dtype=np.uint8)
    assert 0.48 < bits_of(ports, np.random.default_rng(2)).mean() < 0.52
    mixed = bits_of(np.array([ZERO, ONE], dtype=np.uint8), np.random.default_rng(2))
    assert mixed.tolist() == [0, 1]
    bright = replace(OPTICS, decoy=Decoy(20.0, 10.0, 0.5), misalignment=0.3)
    counts = fly(bright, 40_000, "sparse", 3)
    assert counts.sum() > 0.999 * 40_000, "every pulse clicks, most of them twice, and none is dropped"
    assert abs(counts[0, 0, 0, 0] / counts[0, 0, 0].sum() - 0.5) < 0.02


def test_both_detectors_rest_together_so_that_clicks_say_nothing_about_the_next_bit() -> None:
    """Gated one by one, a click of one makes the other's bit more likely; here successive bits are independent."""
    optics = replace(LONG, decoy=Decoy(8.0, 4.0, 0.5), recovery=Recovery(dead_time=4e-6))
    source, bob = SourceSeed(fresh_seed(), 0.5, 0.5), ReceiverSeed(fresh_seed(), 0.5)
    seen = detect(optics, source, bob, (0, 400_000), Eve(), np.random.default_rng(4))
    near = np.diff(seen.positions.astype(np.int64)) <= 8
    pairs = np.bincount(2 * seen.bits[:-1][near] + seen.bits[1:][near], minlength=4).reshape(2, 2)
    assert pairs.sum() > 20_000 and stats.chi2_contingency(pairs).pvalue > 1e-4


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1e-4), st.floats(0, 0.3), st.floats(0, 1e-4), st.floats(1e-4, 0.9))
def test_observed_probabilities_stay_probabilities(dead: float, after: float, trap: float, eta: float) -> None:
    optics = replace(LONG, detector=eta, distance_km=0.0, recovery=Recovery(dead, after, trap))
    for mu in optics.intensities:
        assert 0 <= optics.error_gain(mu) <= optics.gain(mu) <= 1
        assert optics.gain(mu) * (1 + optics.recovery.dead_gates(1e6)) <= 1.0001 + optics.recovery.dead_gates(1e6)


def test_a_course_is_the_mean_of_its_stretches() -> None:
    course = (Stretch(0.25, 3.0), Stretch(0.75, 10.0, 1e-4))
    optics = replace(LONG, course=course)
    parts = [LONG.changed(3.0), LONG.changed(10.0, 1e-4)]
    for mu in LONG.intensities:
        assert optics.gain(mu) == pytest.approx(0.25 * parts[0].gain(mu) + 0.75 * parts[1].gain(mu))
    with pytest.raises(ValueError, match="sum to 1"):
        replace(LONG, course=course[:1])
