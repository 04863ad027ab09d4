"""Two-decoy BB84, BBM92 and E91 through the same stack as one-decoy BB84: equal keys, a ledger to the bit, each under
its own proof, and Eve seen where each protocol sees her."""

from __future__ import annotations

import math
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from qkd_bench import Bench, Side, terms_of
from scipy import stats

from keysource.qkd.config import load
from keysource.qkd.distill.alice import AliceBlock
from keysource.qkd.distill.mac import TICKET_BYTES, Ticket
from keysource.qkd.distill.party import Fly, Receive, Send
from keysource.qkd.distill.wire import Reason, Start, ready
from keysource.qkd.duet import play
from keysource.qkd.errors import LinkError, LinkSettings
from keysource.qkd.optics.blinding import Blinding, Mode
from keysource.qkd.optics.entangled import ANGLES, PairOptics, detect_pairs
from keysource.qkd.optics.eve import Eve, InterceptResend, PhotonNumber
from keysource.qkd.optics.flight import acts_on
from keysource.qkd.optics.model import Optics, Recovery
from keysource.qkd.optics.monitors import MONITORS, Monitor
from keysource.qkd.optics.pairs import Coincidences, PairLink, chsh, fly
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.optics.settings import ReceiverSeed
from keysource.qkd.presets import PRESETS, variant
from keysource.qkd.rates import tomamichel
from keysource.qkd.rates.finite import Counts, Decoy, Security
from keysource.qkd.rates.proofs import judge, proof_name, protocol_name, secret_bits
from keysource.qkd.rates.twodecoy import TwoDecoy
from keysource.qkd.records import RecordedSettings, detections_untrusted, encode_detections

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
SECURITY = Security(1e-2, 1e-6)
TWO = Optics(TwoDecoy(0.6, 0.2, 2e-4, 0.35, 0.4), 0.65, 1.0, 0.2, 0.9, 1e-7, 0.005, 1e6)
BBM = PairOptics(0.03, 0.7, 0.0, 1.0, 0.2, 0.7, 1e-6, 0.005, 1e6)
E91 = replace(BBM, chsh=0.25)
TERMS = {"bb84-2decoy": terms_of(TWO, 300_000), "bbm92": terms_of(BBM, 1_500_000), "e91": terms_of(E91, 1_500_000)}
LINKS = {"bb84-2decoy": TWO, "bbm92": BBM, "e91": E91}


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, subsets and hash seeds of these blocks are the same in every run: a verdict never hangs on a coin."""
    monkeypatch.setattr(os, "urandom", random.Random(1).randbytes)


def passed(side: Side) -> bool:
    return side.outcome is not None and side.outcome.reason is None


@pytest.mark.parametrize("protocol", LINKS)
def test_both_ends_get_the_same_keys_and_the_ledger_balances(protocol: str) -> None:
    terms = TERMS[protocol]
    assert protocol_name(terms.source) == protocol
    alice, bob = Bench(terms, optics=LINKS[protocol], nature=1).run()
    assert passed(alice) and passed(bob), alice.outcome
    a, b = alice.outcome, bob.outcome
    assert a.keys == b.keys and alice.kept == bob.kept
    assert len(a.keys) == (terms.plan.length - 768) // 256 * 32 > 0
    assert a.ledger == b.ledger and a.ledger.balance() == 0
    assert a.found == b.found and a.chsh == b.chsh and (a.chsh is not None) == (protocol == "e91")


@pytest.mark.parametrize("protocol", LINKS)
def test_eve_ends_the_block_and_nothing_is_delivered(protocol: str) -> None:
    alice, bob = Bench(TERMS[protocol], optics=LINKS[protocol], eve=1.0, nature=2).run()
    for side in (alice, bob):
        assert side.outcome.reason is (Reason.CHSH if protocol == "e91" else Reason.QBER)
        assert not side.outcome.keys and side.kept is None and side.outcome.ledger.balance() == 0
        assert abs(side.outcome.qber - 0.25) < 0.04
    if protocol == "e91":
        s, sigma = alice.outcome.chsh
        assert abs(s - np.sqrt(2)) < 5 * sigma + 0.1, "in the key bases: the root of two"


def test_s_only_ends_blocks_and_never_lengthens_a_key() -> None:
    """The plan, and so the length, is that of BBM92 at the same counts; S does not enter."""
    plan = TERMS["e91"].plan
    counts = E91.expected(plan.n_z, plan.n_x)
    assert judge(E91.source, counts, SECURITY) == judge(BBM.source, counts, SECURITY)
    alice, bob = Bench(TERMS["e91"], optics=E91, nature=1).run()
    s, sigma = alice.outcome.chsh
    assert s - 5 * sigma + 0.5 > 2.5 and s < 2 * np.sqrt(2) + 5 * sigma
    assert 8 * len(alice.outcome.keys) <= plan.length
    noisy = replace(E91, misalignment=0.17)  # 17 % errors: beyond Bell, too
    alice, bob = Bench(TERMS["e91"], optics=noisy, nature=3).run()
    assert alice.outcome.reason is bob.outcome.reason is Reason.CHSH


def test_a_faint_eve_on_pairs_shows_in_errors_before_bell_sees_her() -> None:
    alice, _bob = Bench(TERMS["e91"], optics=E91, eve=0.2, nature=4).run()
    assert alice.outcome.reason in (Reason.QBER, Reason.STATISTICS, Reason.LEAK)
    assert alice.outcome.chsh is not None and alice.outcome.chsh[0] > 2.0


@pytest.mark.parametrize("protocol", ["bbm92", "e91"])
def test_sparse_pairs_are_the_dense_ones(protocol: str) -> None:
    """Every (angle, angle, bit, bit) of coincidences, against the sampler that throws every pulse."""
    optics = replace(
        LINKS[protocol], p_z=0.5, dark=2e-3, misalignment=0.02, pairs=0.1, chsh=0.5 * (protocol == "e91")
    )
    count, nature = 2_000_000, np.random.default_rng(5)
    seeds = ReceiverSeed(bytes(32), 0.5), ReceiverSeed(bytes(31) + b"\1", 0.5, chsh=optics.chsh)
    alice, bob = detect_pairs(optics, *seeds, (0, count), Eve(), nature)
    both, here, there = np.intersect1d(alice.positions, bob.positions, return_indices=True)
    mine, theirs = seeds[0].angles(both), seeds[1].angles(both)
    sparse = np.bincount(16 * mine + 4 * theirs + 2 * alice.bits[here] + bob.bits[there], minlength=32)
    angles = ANGLES[:2], ANGLES[: 4 if optics.chsh else 2]
    link = PairLink(optics.pairs, optics.line_a * optics.detector, optics.line * optics.detector, 2e-3, 0.02)
    seen = fly(link, count, tuple(map(tuple, angles)), nature)  # type: ignore[arg-type]
    dense = np.bincount(16 * seen.angle_a + 4 * seen.angle_b + 2 * seen.a + seen.b, minlength=32)
    used = (sparse + dense) > 0
    assert used.sum() == (32 if optics.chsh else 16)
    assert stats.chi2_contingency(np.array([sparse[used], dense[used]])).pvalue > 1e-3
    expected = count * optics.mean_gain()
    assert abs(len(both) - expected) < 5 * np.sqrt(expected)
    single = optics.singles()
    assert abs(len(alice.positions) - count * single[0]) < 5 * np.sqrt(count * single[0])
    assert abs(len(bob.positions) - count * single[1]) < 5 * np.sqrt(count * single[1])


def test_dead_time_costs_pairs_as_the_closed_form_says() -> None:
    optics = replace(BBM, pairs=0.1, recovery=Recovery(10e-6))
    seeds = ReceiverSeed(bytes(32), 0.7), ReceiverSeed(bytes(31) + b"\1", 0.7)
    alice, bob = detect_pairs(optics, *seeds, (0, 1_000_000), Eve(), np.random.default_rng(6))
    assert (np.diff(alice.positions.astype(np.int64)) > 10).all() and (
        np.diff(bob.positions.astype(np.int64)) > 10
    ).all()
    for seen, rate in zip((alice, bob), optics.singles(), strict=True):
        assert abs(len(seen.positions) - 1e6 * rate) < 5 * np.sqrt(1e6 * rate)
    both = len(np.intersect1d(alice.positions, bob.positions))
    assert 1e6 * optics.mean_gain() < both < 1.5e6 * optics.mean_gain(), "pauses coincide: more than unrelated ones"


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_bound_of_pairs_holds_for_what_the_key_would_have_shown(fraction: float) -> None:
    """n + k coincidences measured in X, k of them published at random: the bound on the other n never fails."""
    nature, n, k = np.random.default_rng(7), 4000, 1500
    for _ in range(2000 if LONG else 200):
        errors = nature.random(n + k) < 0.02 + fraction * nature.uniform(0, 0.2)
        checked = nature.permutation(n + k)[:k]
        found = tomamichel.bounds(n, k, float(errors[checked].sum()), 1e-6)
        assert found.s_z1 == n and found.phi >= (errors.sum() - errors[checked].sum()) / n


def test_the_bounds_of_two_decoys_hold_in_every_block() -> None:
    """Against true photon numbers: singles in the key at least, their errors at most, and what the key's singles
    would have shown in the check basis at most."""
    nature, security, decoy = np.random.default_rng(8), Security(1e-6, 1e-15), TwoDecoy(0.6, 0.2, 2e-4, 0.3, 0.4)
    told, blocks, number = 0, 2000 if LONG else 300, np.arange(12)
    for _ in range(blocks):
        e1, eta = nature.uniform(0.005, 0.05), nature.uniform(0.1, 0.5)
        yields = 1 - (1 - 1e-4) * (1 - eta) ** number
        errors = np.where(number == 0, 0.5, e1)
        rows: dict[str, list[int]] = {"n_z": [], "m_z": [], "n_x": [], "m_x": []}
        singles, wrong_singles = {"z": 0, "x": 0}, {"z": 0, "x": 0}
        for mu, p in zip(decoy.intensities, decoy.probabilities, strict=True):
            for basis, share in (("z", 0.5), ("x", 0.12)):
                sent = nature.multinomial(round(4_000_000 * p * share), poisson(mu, number))
                clicked = nature.binomial(sent, yields)
                wrong = nature.binomial(clicked, errors)
                rows[f"n_{basis}"].append(int(clicked.sum()))
                rows[f"m_{basis}"].append(int(wrong.sum()))
                singles[basis] += int(clicked[1])
                wrong_singles[basis] += int(wrong[1])
        found = judge(decoy, Counts(*(tuple(row) for row in rows.values())), security)
        assert found.s_z1 <= singles["z"] and found.s_x1 <= singles["x"] and found.v_x1 >= wrong_singles["x"]
        assert found.phi >= nature.binomial(singles["z"], e1) / singles["z"]
        told += found.phi < 0.5 and found.s_z1 > 0.6 * singles["z"]
    assert told > 0.9 * blocks, "bounds that say nothing hold too"


def poisson(mu: float, number: np.ndarray) -> np.ndarray:
    """Photons of a pulse; the last class has all that are more."""
    p = np.exp(-mu) * mu**number / np.array([math.factorial(n) for n in number])
    p[-1] += 1 - p.sum()
    return p


def test_the_order_of_the_formulas_is_never_broken() -> None:
    """At the same intensities and statistics: more bits or a laxer budget never give less, nothing gives more than
    its single photons."""
    nature = np.random.default_rng(9)
    for _ in range(300):
        mu2 = nature.uniform(0.05, 0.3)
        decoy = TwoDecoy(mu2 + nature.uniform(0.1, 0.5), mu2, nature.uniform(0, 0.02), 0.4, 0.35)
        optics = replace(TWO, decoy=decoy, distance_km=nature.uniform(0, 120), detector=0.3, misalignment=0.01)
        n = 10 ** nature.uniform(4, 9)
        counts, more = optics.expected(n, n / 4), optics.expected(2 * n, n / 2)
        strict, lax = Security(1e-12, 1e-15), Security(1e-6, 1e-15)
        found = judge(decoy, counts, strict)
        length = secret_bits(decoy, found, 0.0, strict)
        assert 0 <= length <= n and length <= secret_bits(decoy, judge(decoy, counts, lax), 0.0, lax)
        assert length / n <= secret_bits(decoy, judge(decoy, more, strict), 0.0, strict) / (2 * n) + 1e-9
        true = n * decoy.tau(1) * (1 - (1 - optics.dark) ** 2 * (1 - optics.eta)) / optics.mean_gain()
        assert found.s_z1 <= true * (1 + 1e-9)


@pytest.mark.parametrize("lit", ["hers", "clicks"])
def test_bright_light_at_either_end_of_a_link_of_pairs_ends_the_block_before_a_bit_is_announced(lit: str) -> None:
    """Alice measures too: her photocurrent is watched as Bob's is.  Readings that are missing are no excuse."""

    def bright(seen: Detections) -> Detections:
        assert seen.readings is not None and seen.readings.current < 1e-6
        return replace(seen, readings=replace(seen.readings, current=20e-6))

    def silent(seen: Detections) -> Detections:
        return replace(seen, readings=None)

    for change in (bright, silent):
        bench = Bench(TERMS["bbm92"], optics=BBM, nature=13, monitor="photocurrent", **{lit: change})
        for side in bench.run():
            assert side.outcome is not None and side.outcome.reason is Reason.MONITOR and not side.outcome.keys
            assert side.outcome.ledger.balance() == 0
        assert "SIFT" not in [kind for _who, kind in bench.log]
    quiet, _bob = Bench(TERMS["bbm92"], optics=BBM, nature=13, monitor="photocurrent").run()
    assert passed(quiet)


PAIR_TRUTH = {
    (mode, guard): guard == "both" or guard == {"cw": "photocurrent", "pulsed": "efficiency"}[mode]
    for mode in ("cw", "pulsed")
    for guard in MONITORS
}
TESTED = terms_of(BBM, 1_700_000, tests=True)


@pytest.mark.parametrize(("mode", "guard"), PAIR_TRUTH)
def test_blinding_both_ends_of_a_link_of_pairs_against_each_monitor(mode: Mode, guard: Monitor) -> None:
    """The same truth table as for weak pulses; where nothing fires the block passes and Eve's copy is the key."""
    terms = TESTED if guard in ("efficiency", "both") else TERMS["bbm92"]
    bench = Bench(terms, optics=BBM, eve=Blinding(1.0, mode), monitor=guard, nature=14)
    alice, bob = bench.run()
    if PAIR_TRUTH[mode, guard]:
        assert alice.outcome.reason is bob.outcome.reason is Reason.MONITOR and not alice.outcome.keys
        assert "DETECTED" not in [kind for _who, kind in bench.log]
        return
    assert passed(alice) and alice.outcome.keys == bob.outcome.keys
    assert abs(alice.outcome.qber - BBM.mean_qber()) < 0.01
    heard = bench.overheard()
    assert heard.known().all() and (heard.as_bob() == alice.party.key).all()
    quiet, _bob = Bench(terms, optics=BBM, monitor=guard, nature=15).run()
    assert passed(quiet), "an honest link raises no alarm, and its gates for tests are in the plan"


def test_faked_pairs_show_what_honest_ones_show_bells_inequality_included() -> None:
    optics = replace(BBM, pairs=0.02, chsh=0.4)
    seeds = ReceiverSeed(bytes(32), 0.7), ReceiverSeed(bytes(31) + b"\1", 0.7, chsh=0.4)
    pulses, nature = 6_000_000, np.random.default_rng(16)
    tables, tests = [], []
    for eve in (Eve(), Blinding(1.0, "cw")):
        alice, bob = detect_pairs(optics, *seeds, (0, pulses), eve, nature)
        both, here, there = np.intersect1d(alice.positions, bob.positions, return_indices=True)
        mine, theirs = seeds[0].angles(both), seeds[1].angles(both)
        a, b = alice.bits[here], bob.bits[there]
        tables.append(np.bincount(16 * mine + 4 * theirs + 2 * a + b, minlength=32))
        turned = theirs >= 2
        tests.append(chsh(Coincidences(a[turned], b[turned], mine[turned], theirs[turned] - np.uint8(2))))
        assert (bob.notes is not None) == isinstance(eve, Blinding)
    assert stats.chi2_contingency(np.array(tables)).pvalue > 1e-4, "gains, errors and correlations are as they were"
    for s, spread in tests:
        assert s - 5 * spread > 2.0, "a violation that proves nothing: the detectors are hers"


def test_splitting_photon_numbers_breaks_two_decoys_too() -> None:
    far = Optics(TwoDecoy(0.6, 0.2, 1e-3, 0.35, 0.4), 0.65, 45.0, 0.2, 0.9, 1e-7, 0.005, 1e6)
    terms = terms_of(far, 5_000_000)
    bench = Bench(terms, optics=far, eve=PhotonNumber(1.0, target=0.6), nature=10)
    alice, _bob = bench.run()
    assert alice.outcome.reason in (Reason.STATISTICS, Reason.SHORT) and not alice.outcome.keys
    honest, _ = Bench(terms, optics=far, nature=11).run()
    assert passed(honest)


def test_only_attacks_with_a_meaning_act_on_pairs() -> None:
    assert acts_on(InterceptResend(0.5), BBM) and acts_on(Eve(), BBM) and acts_on(PhotonNumber(1.0), TWO)
    assert not acts_on(PhotonNumber(1.0), BBM) and acts_on(Blinding(1.0, "pulsed"), E91)


# Names, files, records


def test_each_protocol_has_one_delivering_proof_that_both_ends_compare() -> None:
    names = {proof_name(PRESETS[variant("demo", name)].optics.source) for name in ("bb84-1decoy", *LINKS)}  # type: ignore[arg-type]
    assert names == {"wiesemann2024", "wiesemann2024-2decoy", "tomamichel2012"}
    digests = {PRESETS[name].plan().digest(PRESETS[name].optics, SECURITY) for name in ("demo-bbm92", "demo-e91")}
    assert len(digests) == 2


@pytest.mark.parametrize(("preset", "protocol", "found"), [
    ("demo", None, "demo"), ("demo", "bb84-1decoy", "demo"), ("demo", "e91", "demo-e91"),
    ("demo-e91", "bb84-2decoy", "demo-2decoy"), ("demo-bbm92", "bb84-1decoy", "demo"), ("demo-e91", None, "demo-e91"),
])  # fmt: skip
def test_the_protocol_picks_the_variant_of_a_preset(tmp_path, preset: str, protocol: str | None, found: str) -> None:
    file = tmp_path / "link.toml"
    line = f'protocol = "{protocol}"\n' if protocol else ""
    base = 'version = 1\nrole = "right"\npeer = "127.0.0.1:1"\nauth_key = "p"\nstate = "s"\nsocket = "d"\n'
    file.write_text(base + f'preset = "{preset}"\n' + line)
    assert load(file).preset == found
    for wrong, words in (
        ('preset = "lab10"\nprotocol = "e91"\n', "has no variant of e91"),
        ('protocol = "b92"\n', 'key "protocol"'),
    ):
        file.write_text(base + wrong)
        with pytest.raises(LinkSettings, match=words):
            load(file)


def test_intensities_that_are_none_are_refused() -> None:
    for mu1, mu2, mu3, p1, p2 in ((0.2, 0.2, 0.1, 0.3, 0.3), (0.5, 0.1, 0.2, 0.3, 0.3), (0.5, 0.2, 0.0, 0.6, 0.4)):
        with pytest.raises(ValueError, match="two decoys need"):
            TwoDecoy(mu1, mu2, mu3, p1, p2)
    with pytest.raises(ValueError, match="no key"):
        terms_of(replace(BBM, km_b=100.0), 1_000_000)
    with pytest.raises(ValueError, match="after-pulses"):
        replace(BBM, recovery=Recovery(1e-6, 0.02, 1e-6))


def test_turned_gates_survive_a_record() -> None:
    seen = Detections(np.array([3, 5, 9], np.uint64), np.array([1, 0, 1], np.uint8), np.array([0, 3, 2], np.uint8))
    again = detections_untrusted(encode_detections(seen, 10), 10)
    assert again.bases is not None and again.bases.tolist() == [0, 3, 2] and again.bits.tolist() == [1, 0, 1]


def test_a_record_of_another_protocol_is_named() -> None:
    nothing = np.zeros(10, np.uint8)
    for flown, terms in (
        (RecordedSettings(nothing, nothing, nothing, 2), TERMS["bb84-2decoy"]),
        (None, TERMS["bbm92"]),
        (Detections(np.array([1], np.uint64), nothing[:1]), TERMS["bb84-2decoy"]),
    ):
        steps = AliceBlock(terms, Start(0, 0, 1, 1), Ticket(0, bytes(TICKET_BYTES))).run()
        assert isinstance(next(steps), Send) and isinstance(steps.send(None), Receive)
        assert isinstance(steps.send(ready(1)), Fly)
        with pytest.raises(LinkError, match="record"):
            steps.send(flown)


def test_one_decoy_still_is_what_it_was() -> None:
    assert proof_name(Decoy(0.5, 0.15, 0.4)) == "wiesemann2024" and PRESETS["demo"].protocol == "bb84-1decoy"


@pytest.mark.parametrize("protocol", LINKS)
def test_the_benchmark_plays_whole_blocks(protocol: str) -> None:
    alice, bob = play(TERMS[protocol], LINKS[protocol], np.random.default_rng(12))
    assert alice.reason is None and alice.keys == bob.keys and alice.ledger == bob.ledger
    assert alice.ledger.balance() == 0 and alice.messages == bob.messages
