"""Every Eve shows her true signature, and no other; what she knows of a final key is counted by rank, not
estimated."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from qkd_bench import OPTICS, SECURITY, Bench, Side
from scipy import stats

from keysource.qkd.audit import Overheard, determined, parity_rows, rank, toeplitz_rows
from keysource.qkd.distill.cascade import Question, Reference
from keysource.qkd.distill.party import Terms
from keysource.qkd.distill.toeplitz import toeplitz_hash
from keysource.qkd.distill.wire import Reason
from keysource.qkd.errors import LinkError
from keysource.qkd.optics.attacks import ATTACKS, make_eve
from keysource.qkd.optics.blinding import Blinding, Mode
from keysource.qkd.optics.eve import BeamSplitting, Eve, InterceptResend, PhotonNumber
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import MONITORS, TEST_SHARE, Monitor, alarm
from keysource.qkd.optics.sampler import Detections, detect
from keysource.qkd.optics.settings import AliceSettings, Bits, ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.plan import Plan, make_plan
from keysource.qkd.rates.finite import Decoy

LONG_RUN = os.environ.get("QVPN_TEST_LONG") == "1"
FAR = Optics(Decoy(0.5, 0.1, 0.5), 0.7, 50.0, 0.2, 0.2, 1e-6, 0.01, 1e9)
"""17 dB in all, 10 of them fibre."""
LOSSY = replace(OPTICS, distance_km=10.0, detector=0.3, decoy=Decoy(0.6, 0.2, 0.3), p_z=0.6)
PLAN = make_plan(LOSSY, 700_000, SECURITY, "original")
TERMS = Terms(PLAN, LOSSY.decoy, LOSSY.p_z, SECURITY)
TESTED = Terms(make_plan(LOSSY, 700_000, SECURITY, "original", tests=True), LOSSY.decoy, LOSSY.p_z, SECURITY)
"""The same link where some of Bob's gates are tests of the efficiency."""
FAR_LAB = replace(FAR, decoy=Decoy(0.5, 0.13, 0.3), p_z=0.6)
FAR_PLAN = make_plan(FAR_LAB, 14_000_000, SECURITY, "original")
FAR_TERMS = Terms(FAR_PLAN, FAR_LAB.decoy, FAR_LAB.p_z, SECURITY)


def fly(
    optics: Optics, eve: Eve, pulses: int, test: float = 0.0, seed: int = 1
) -> tuple[Detections, AliceSettings, Bits]:
    """(detections, Alice's settings of them, Bob's bases)."""
    source = SourceSeed(fresh_seed(), optics.p_z, optics.decoy.p1)
    bob = ReceiverSeed(fresh_seed(), optics.p_z, test)
    seen = detect(optics, source, bob, (0, pulses), eve, np.random.default_rng(seed))
    return seen, source.at(seen.positions), bob.at(seen.positions)


def gains(optics: Optics, found: tuple[Detections, AliceSettings, Bits], pulses: int) -> tuple[list[float], float]:
    """(Q of each intensity, QBER of the sifted bits)."""
    seen, alice, bases = found
    q = [float((alice.decoy == i).sum()) / (pulses * p) for i, p in enumerate(optics.probabilities)]
    same = alice.check == bases
    return q, float((alice.bit != seen.bits)[same].mean())


def close(found: float, expected: float, sent: float, sigmas: float = 4.5) -> bool:
    return abs(found - expected) < sigmas * math.sqrt(max(expected, 1e-12) / sent)


# Signatures on the pulses


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_intercept_resend_raises_errors_by_a_quarter_and_knows_half_of_what_she_took(fraction: float) -> None:
    pulses = 20_000_000
    seen, alice, bases = found = fly(FAR, InterceptResend(fraction), pulses)
    q, e = gains(FAR, found, pulses)
    for mu, share, gain in zip(FAR.intensities, FAR.probabilities, q, strict=True):
        assert close(gain, FAR.gain(mu), pulses * share), "the gains stay"
    sifted = int((alice.check == bases).sum())
    clean = FAR.mean_qber()
    assert close(e, clean + fraction * (0.25 - clean / 2), sifted)
    assert seen.notes is not None
    same = alice.check == bases
    known = seen.notes.knows(alice.check)
    assert close(float(known[same].mean()), fraction / 2, sifted)
    assert (seen.notes.bit[known] == alice.bit[known]).all(), "what she claims to know, she knows"


def test_photon_number_splitting_leaves_signal_and_errors_and_breaks_the_decoys() -> None:
    pulses = 40_000_000
    eve = PhotonNumber(1.0, target=FAR.decoy.mu1)
    seen, alice, bases = found = fly(FAR, eve, pulses)
    q, e = gains(FAR, found, pulses)
    assert close(q[0], FAR.gain(0.5), pulses * 0.5), "the signal's gain is what it was"
    assert abs(e - FAR.mean_qber()) < 0.004
    assert q[1] < 0.5 * FAR.gain(0.1), "the decoy's is not"
    assert seen.notes is not None and (alice.bit != seen.bits)[alice.check == bases].mean() < 0.03
    known = seen.notes.knows(alice.check)
    assert known.mean() > 0.8 and (seen.notes.bit[known] == alice.bit[known]).all()


@pytest.mark.parametrize(("mu", "decibel"), [(0.1, 13.288), (0.48, 7.370), (0.5, 7.234)])
def test_photon_number_splitting_owns_everything_from_the_published_loss_on(mu: float, decibel: float) -> None:
    """eta = -ln[(1 + mu) e^-mu] / mu, for detectors that see every photon: 13.288 dB at 0.1 and so on."""
    ideal = Optics(Decoy(mu, mu / 3, 0.5), 0.5, 0.0, 1.0, 1.0, 0.0, 0.0, 1e6)
    eve = PhotonNumber(1.0, target=mu)
    inside, beyond = replace(ideal, distance_km=decibel - 0.005), replace(ideal, distance_km=decibel + 0.005)
    assert eve.blocks(beyond)[0] == 1.0 and eve.blocks(inside)[0] < 1.0
    assert -10 * math.log10(-math.log((1 + mu) * math.exp(-mu)) / mu) == pytest.approx(decibel, abs=1e-3)
    if mu == 0.1:
        seen, alice, _bases = fly(beyond, eve, 4_000_000)
        signal = alice.decoy == 0
        assert seen.notes is not None and signal.sum() > 5000
        assert (seen.notes.knows(alice.check) & (seen.notes.bit == alice.bit))[signal].all(), "all of it"
        assert (alice.bit == seen.bits)[alice.check == _bases].all(), "and no error"


def test_beam_splitting_has_no_signature_at_all() -> None:
    """Chi-square of every cell with and without her; what she has is what the fibre loses, independent of Bob."""
    pulses = 20_000_000
    cells = []
    for eve in (Eve(), BeamSplitting(1.0)):
        seen, alice, bases = fly(FAR, eve, pulses, seed=len(cells) + 5)
        index = alice.decoy * 8 + alice.check * 4 + bases * 2 + (alice.bit == seen.bits)
        cells.append(np.append(np.bincount(index, minlength=16), pulses - len(index)))
    assert stats.chi2_contingency(np.array(cells)).pvalue > 1e-4
    assert seen.notes is not None
    for i, mu in enumerate(FAR.intensities):
        held = seen.notes.knows(alice.check)[alice.decoy == i]
        assert close(float(held.mean()), 1 - math.exp(-mu * (1 - FAR.line)), len(held))
    known = seen.notes.knows(alice.check)
    assert (seen.notes.bit[known] == alice.bit[known]).all()


@pytest.mark.parametrize("mode", ["cw", "pulsed"])
def test_blinding_mimics_every_number_and_has_every_bit_that_bob_has(mode: Mode) -> None:
    pulses = 20_000_000
    seen, _alice, bases = found = fly(FAR, Blinding(1.0, mode), pulses)
    q, e = gains(FAR, found, pulses)
    for mu, share, gain in zip(FAR.intensities, FAR.probabilities, q, strict=True):
        assert close(gain, FAR.gain(mu), pulses * share) or abs(gain / FAR.gain(mu) - 1) < 0.01
    assert abs(e - FAR.mean_qber()) < 0.003
    assert seen.notes is not None and (seen.notes.how == bases).all() and (seen.notes.bit == seen.bits).all()


TRUTH = {
    ("cw", "none"): False,
    ("cw", "photocurrent"): True,
    ("cw", "efficiency"): False,
    ("cw", "both"): True,
    ("pulsed", "none"): False,
    ("pulsed", "photocurrent"): False,
    ("pulsed", "efficiency"): True,
    ("pulsed", "both"): True,
}


@pytest.mark.parametrize("mode", ["cw", "pulsed"])
@pytest.mark.parametrize("monitor", MONITORS)
def test_the_truth_table_of_blinding_with_the_cells_where_nothing_fires(mode: Mode, monitor: Monitor) -> None:
    pulses = 20_000_000
    for seed in range(3):
        test = TEST_SHARE if monitor in ("efficiency", "both") else 0.0
        seen, _alice, _bases = fly(FAR, Blinding(1.0, mode), pulses, test, seed)
        assert seen.readings is not None
        assert (alarm(monitor, seen.readings, FAR) is not None) == TRUTH[mode, monitor]
    for harmless in (Eve(), InterceptResend(1.0), PhotonNumber(1.0, target=0.5), BeamSplitting(1.0)):
        seen, _alice, _bases = fly(FAR, harmless, pulses, TEST_SHARE)
        if not isinstance(harmless, PhotonNumber):  # her line without loss is not linear in the attenuator
            assert seen.readings is not None
            assert alarm("both", seen.readings, FAR) is None, "monitors see bright light only"


def test_an_attenuator_below_one_half_catches_continuous_blinding_too() -> None:
    """Two thresholds are all the power that the wrong basis allows: no click survives."""
    eve, nature = Blinding(1.0, "cw"), np.random.default_rng(1)
    ones = np.ones(10_000, dtype=np.uint8)
    assert not eve.clicks(ones, ones, ones, 0.45, nature).any()
    assert abs(eve.clicks(ones, ones, ones, 0.7, nature).mean() - 0.7) < 0.02
    assert not eve.clicks(ones, 0 * ones, 0 * ones, 0.7, nature).any(), "silent in the other basis"


# Signatures on blocks


def verdicts(eve: Eve, monitor: Monitor = "none") -> tuple[Bench, Side, Side]:
    terms = TESTED if monitor in ("efficiency", "both") else TERMS
    bench = Bench(terms, eve=eve, optics=LOSSY, monitor=monitor)
    return bench, *bench.run()


@pytest.mark.parametrize(("eve", "reason"), [
    (InterceptResend(1.0), Reason.QBER),
    (PhotonNumber(1.0), Reason.STATISTICS),
])  # fmt: skip
def test_a_block_with_her_in_it_ends_for_the_right_reason(eve: Eve, reason: Reason) -> None:
    alice, bob = Bench(FAR_TERMS, eve=eve, optics=FAR_LAB).run()
    for side in (alice, bob):
        assert side.outcome is not None and side.outcome.reason is reason and not side.outcome.keys
        assert side.outcome.ledger.balance() == 0
    if reason is Reason.STATISTICS:
        assert bob.outcome is not None and bob.outcome.found is not None
        assert bob.outcome.found.s_z1 < FAR_PLAN.s_z1 and bob.outcome.qber < 0.04, "errors say nothing"


def passing(eve: Eve, monitor: Monitor = "none") -> tuple[Bench, Side, Side]:
    """The first of a few blocks that passes: a block in fifty fails by chance."""
    for _ in range(8):
        bench, alice, bob = verdicts(eve, monitor)
        assert alice.outcome is not None and bob.outcome is not None
        if alice.outcome.reason is None:
            return bench, alice, bob
    raise AssertionError(f"no block passed: {alice.outcome.reason}")


@pytest.mark.parametrize("mode", ["cw", "pulsed"])
def test_a_blinded_block_passes_and_eve_has_the_whole_key(mode: Mode) -> None:
    """No monitor, no alarm: QBER, decoys and tags are fine, and her copy of the key is Bob's.  QKD theory does not
    see it."""
    bench, alice, bob = passing(Blinding(1.0, mode))
    assert alice.outcome.keys == bob.outcome.keys
    hers = bench.overheard().as_bob()
    assert (hers == alice.party.key).all()


@pytest.mark.parametrize(("mode", "monitor"), [cell for cell, fires in TRUTH.items() if fires])
def test_a_monitor_that_fires_ends_the_block_before_anything_is_announced(mode: Mode, monitor: Monitor) -> None:
    bench, alice, bob = verdicts(Blinding(1.0, mode), monitor)
    for side in (alice, bob):
        assert side.outcome is not None and side.outcome.reason is Reason.MONITOR and not side.outcome.keys
        assert side.outcome.ledger.balance() == 0
    assert [kind for who, kind in bench.log if who != "fibre"] == ["START", "READY", "ABORT", "AUTH", "AUTH"]


def test_a_block_without_the_readings_that_a_monitor_wants_is_no_key() -> None:
    bench = Bench(TERMS, optics=LOSSY, monitor="photocurrent", clicks=lambda seen: replace(seen, readings=None))
    for side in bench.run():
        assert side.outcome is not None and side.outcome.reason is Reason.MONITOR and not side.outcome.keys


# What she knows, by rank


def test_rank_is_rank() -> None:
    """Against products of known rank and against the slow way."""
    nature = np.random.default_rng(3)
    for rows, inner, columns in ((40, 12, 130), (200, 64, 65), (64, 64, 64), (7, 3, 5)):
        left, right = (nature.integers(0, 2, shape, dtype=np.uint8) for shape in ((rows, inner), (inner, columns)))
        matrix = (left @ right) & 1
        assert rank(matrix) == slow_rank(matrix) <= inner
    assert rank(np.eye(100, dtype=np.uint8)) == 100 and rank(np.zeros((5, 9), dtype=np.uint8)) == 0


def slow_rank(matrix: np.ndarray) -> int:
    basis: dict[int, int] = {}
    for row in matrix:
        value = int("".join(map(str, row)), 2)
        while value and value.bit_length() in basis:
            value ^= basis[value.bit_length()]
        if value:
            basis[value.bit_length()] = value
    return len(basis)


def test_the_rows_are_those_that_the_link_uses() -> None:
    nature = np.random.default_rng(4)
    key, seed = nature.integers(0, 2, 300, dtype=np.uint8), nature.integers(0, 2, 349, dtype=np.uint8)
    assert ((toeplitz_rows(300, seed, 50) @ key & 1) == toeplitz_hash(key, seed, 50)).all()
    order_seed = fresh_seed()
    sizes = [7, 20, 150, 0]
    for number, positions in ((2, [3, 77, 300]), (3, [1, 2, 77])):
        question = Question(number, np.array(positions, dtype=np.uint32))
        rows = parity_rows(300, order_seed, sizes, [question])
        assert ((rows @ key & 1) == Reference(key, order_seed, sizes).answer_untrusted(question)).all()


def test_determined_counts_what_follows() -> None:
    """Three bits; she knows x0 and x1 + x2; the key is x0 + x1 + x2 and x1."""
    known, view = np.array([True, False, False]), np.array([[0, 1, 1]], dtype=np.uint8)
    assert determined(known, view, np.array([[1, 1, 1]], dtype=np.uint8)) == 1
    assert determined(known, view, np.array([[0, 1, 0]], dtype=np.uint8)) == 0
    assert determined(known, view, np.array([[1, 1, 1], [0, 1, 0]], dtype=np.uint8)) == 1
    assert determined(known, view, np.eye(3, dtype=np.uint8)) == 2
    assert determined(known, view[:0], np.eye(3, dtype=np.uint8)) == 1


@pytest.mark.timeout(900 if LONG_RUN else 120)
@pytest.mark.parametrize(
    "eve", [BeamSplitting(1.0), PhotonNumber(1.0), InterceptResend(0.01)], ids=lambda eve: eve.name
)
def test_of_the_final_key_she_determines_nothing(eve: Eve) -> None:
    """70 blocks of each (seven in a short run): she holds up to a fifth of the sifted bits and every parity, and of
    the final key not one bit."""
    held = blocks = 0
    while blocks < (70 if LONG_RUN else 7):
        bench, alice, _bob = verdicts(eve)
        if alice.outcome is None or alice.outcome.reason is not None:
            continue
        blocks += 1
        heard = bench.overheard()
        known = heard.known()
        assert (heard.key_notes().bit[known] == alice.party.key[known]).all()
        held += int(known.sum())
        assert heard.determined() == 0
    floor = 0.003 if eve.name == "intercept-resend" else 0.1
    assert held > floor * blocks * PLAN.n_z, "she was there"


def overheard(plan: Plan, eve: Eve, optics: Optics) -> tuple[Overheard, Bits]:
    """A block of this plan that has passed, and Alice's corrected key."""
    for _ in range(8):
        bench = Bench(Terms(plan, optics.decoy, optics.p_z, SECURITY), eve=eve, optics=optics)
        alice, _bob = bench.run()
        if alice.outcome is not None and alice.outcome.reason is None:
            return bench.overheard(), alice.party.key
    raise AssertionError("no block passed")


def test_without_the_decoys_photon_number_splitting_has_nearly_all_of_a_key_that_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same link that ignores what its decoys say: errors and signal are fine, the key passes."""
    monkeypatch.setattr(Plan, "accepts", lambda self, found, source, security: True)
    heard, key = overheard(FAR_PLAN, PhotonNumber(1.0), FAR_LAB)
    known = heard.known()
    assert known.mean() > 0.6 and (heard.key_notes().bit[known] == key[known]).all()
    short = replace(FAR_PLAN, length=4000)
    cut, _key = overheard(short, PhotonNumber(1.0), FAR_LAB)
    assert cut.determined() > 1000


@pytest.mark.skipif(not LONG_RUN, reason="half a minute of linear algebra: QVPN_TEST_LONG=1")
def test_with_amplification_cut_short_beam_splitting_has_key_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashed to all that the ledger leaves, as if multi-photon pulses were no matter."""
    monkeypatch.setattr(Plan, "accepts", lambda self, found, source, security: True)
    generous = replace(PLAN, length=PLAN.n_z - 2 * PLAN.leak_budget - PLAN.verify_bits)
    heard, _key = overheard(generous, BeamSplitting(1.0), LOSSY)
    hidden = np.flatnonzero(~heard.known())
    assert heard.determined() >= generous.length + rank(heard.view()[:, hidden]) - len(hidden) > 0


# Ordering her


def test_eve_by_name() -> None:
    for name in ATTACKS:
        assert make_eve({"attack": name}).name == name
    assert make_eve({"fraction": 0.25}) == InterceptResend(0.25)
    assert make_eve({"fraction": 0}) == Eve() == make_eve({"attack": "none"})
    assert make_eve({"attack": "blinding", "mode": "pulsed"}) == Blinding(1.0, "pulsed")
    assert make_eve({"attack": "photon-number", "fraction": 0.5}) == PhotonNumber(0.5)


@pytest.mark.parametrize("request_", [
    {"attack": "magic"},
    {"attack": ["pns"]},
    {"attack": "blinding", "fraction": 0.5},
    {"attack": "blinding", "mode": "strobe"},
    {"attack": "photon-number", "fraction": "1"},
])  # fmt: skip
def test_an_order_that_makes_no_sense_is_refused_in_one_sentence(request_: dict[str, object]) -> None:
    with pytest.raises(LinkError):
        make_eve(request_)
