"""A block between two ends that share only a wire: equal keys, a ledger to the bit, and nobody tampers unseen."""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qkd_bench import OPTICS, Bench, Side, small_plan, small_terms

from keysource.qkd.distill import wire
from keysource.qkd.distill.alice import random_subset
from keysource.qkd.distill.bits import pack, unpack_untrusted
from keysource.qkd.distill.party import Party
from keysource.qkd.distill.wire import Frame, Kind, Reason, frame_untrusted
from keysource.qkd.errors import BadFrame, Forged, LinkError
from keysource.qkd.ledger import Ledger
from keysource.qkd.optics.sampler import Detections

TERMS = small_terms()
MANY = 10 if os.environ.get("QVPN_TEST_LONG") == "1" else 1
ORDER = [
    "START",
    "READY",
    "flown",
    "DETECTED",
    "SIFT",
    "CHECK",
    "CORRECT",
    "ASK",
    "VERIFY",
    "ACCEPT",
    "AMPLIFY",
    "AUTH",
    "COMMIT",
]


def passed(side: Side) -> bool:
    return side.outcome is not None and side.outcome.reason is None


def test_both_ends_get_the_same_keys_and_pad_and_the_ledger_sums_to_zero() -> None:
    for refills in (1, 2):
        bench = Bench(TERMS, refills=refills)
        alice, bob = bench.run()
        assert passed(alice) and passed(bob)
        a, b = alice.outcome, bob.outcome
        assert a.keys == b.keys and alice.kept == bob.kept and len(alice.kept) == refills
        assert len(a.keys) == (TERMS.plan.length - 768 * refills) // 256 * 32 > 0
        assert len({bytes(a.keys[i : i + 32]) for i in range(0, len(a.keys), 32)}) == len(a.keys) // 32
        assert a.ledger.balance() == 0 == b.ledger.balance()
        assert a.ledger == b.ledger, "both ends counted by themselves"


def test_the_ledger_counts_what_was_on_the_wire() -> None:
    """Every column from the recorded frames alone."""
    bench = Bench(TERMS)
    alice, _bob = bench.run()
    frames = [(sender, frame_untrusted(body)) for sender, body in bench.frames]
    found = Ledger()
    for _sender, frame in frames:
        match frame.kind:
            case Kind.DETECTED:
                found.raw = int.from_bytes(frame.payload[:4], "big")
            case Kind.CHECK:
                found.check = TERMS.plan.n_x
                assert len(frame.payload) == -(-TERMS.plan.n_x // 8)
            case Kind.SIFT:
                found.discarded = frame.payload[: found.raw].count(0)
            case Kind.ASK:
                found.mirrored += (len(frame.payload) - 1) // 4
            case Kind.VERIFY:
                found.verified = TERMS.plan.verify_bits
    asked = [(len(frame.payload) - 1) // 4 for _s, frame in frames if frame.kind is Kind.ASK]
    answered = [len(frame.payload) for _s, frame in frames if frame.kind is Kind.PARITY]
    assert [-(-n // 8) for n in asked] == answered
    ledger = alice.outcome.ledger
    for column in ("raw", "check", "discarded", "mirrored", "verified"):
        assert getattr(ledger, column) == getattr(found, column), column
    assert ledger.leaked == sum(asked)
    assert ledger.delivered == 8 * len(alice.outcome.keys)
    assert ledger.authenticated == 8 * sum(map(len, alice.kept))


@pytest.mark.parametrize("column", [f for f in Ledger().as_dict() if f != "raw"])
def test_a_count_that_is_off_by_one_makes_the_sum_wrong(column: str) -> None:
    alice, _ = Bench(TERMS).run()
    ledger = alice.outcome.ledger
    setattr(ledger, column, getattr(ledger, column) + 1)
    assert ledger.balance() != 0


def test_a_place_that_forgets_to_count_makes_the_sum_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Party.disclose
    monkeypatch.setattr(Party, "disclose", lambda self, answers, questions: honest(self, answers - 1, questions))
    alice, bob = Bench(TERMS).run()
    assert alice.outcome.ledger.balance() != 0 != bob.outcome.ledger.balance()


def test_nothing_about_a_block_leaves_a_site_before_all_pulses_are_measured() -> None:
    bench = Bench(TERMS)
    bench.run()
    flown = bench.log.index(("fibre", "flown"))
    assert [kind for _who, kind in bench.log[:flown]] == ["START", "READY"]
    seen = list(dict.fromkeys(kind for _who, kind in bench.log if kind not in ("PARITY", "CORRECTED")))
    assert seen == ORDER
    kinds = [kind for _who, kind in bench.log]
    last_error_correction = max(i for i, kind in enumerate(kinds) if kind == "PARITY")
    assert kinds.index("VERIFY") > last_error_correction and kinds.index("AMPLIFY") > kinds.index("ACCEPT")


def test_check_bits_and_key_bits_are_disjoint_and_of_the_fixed_sizes() -> None:
    bench = Bench(TERMS)
    alice, bob = bench.run()
    assert len(alice.party.key) == TERMS.plan.n_z == len(bob.party.key)
    (sift,) = [frame_untrusted(body).payload for _s, body in bench.frames if body[0] == Kind.SIFT]
    raw = alice.outcome.ledger.raw
    codes = np.frombuffer(sift[:raw], dtype=np.uint8) & 3
    assert (codes == wire.KEY).sum() == TERMS.plan.n_z and (codes == wire.CHECKED).sum() == TERMS.plan.n_x


def test_the_subsets_are_random_not_the_first_ones() -> None:
    bench = Bench(TERMS)
    alice, _ = bench.run()
    (sift,) = [frame_untrusted(body).payload for _s, body in bench.frames if body[0] == Kind.SIFT]
    codes = np.frombuffer(sift[: alice.outcome.ledger.raw], dtype=np.uint8)
    last_key = np.flatnonzero((codes & 3) == wire.KEY)[-1]
    assert last_key > 0.95 * len(codes), "surplus detections would otherwise all be at the end"


def test_every_subset_of_a_size_is_equally_likely() -> None:
    members, counts = np.array([3, 5, 8, 9, 12]), dict[tuple[int, ...], int]()
    for _ in range(4000):
        chosen = tuple(random_subset(members, 3).tolist())
        counts[chosen] = counts.get(chosen, 0) + 1
    assert sorted(counts) == sorted(itertools.combinations(members.tolist(), 3))
    assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 30, "chi-square with 9 degrees of freedom"
    assert random_subset(members, 5).tolist() == members.tolist()


def test_lots_that_are_equal_at_the_edge_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lots = iter([np.array([7, 1, 7, 9], dtype=np.uint32), np.array([4, 3, 2, 1], dtype=np.uint32)])
    monkeypatch.setattr(os, "urandom", lambda size: next(lots).tobytes())
    assert random_subset(np.arange(4), 2).tolist() == [2, 3]


# Eve and bad luck


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_eve_ends_the_block_with_an_authenticated_verdict_at_both_ends(fraction: float) -> None:
    alice, bob = Bench(TERMS, eve=fraction).run()
    for side in (alice, bob):
        assert side.outcome is not None and side.outcome.reason is Reason.QBER and not side.outcome.keys
        assert side.kept is None and side.outcome.ledger.balance() == 0
        assert side.outcome.ledger.lost == TERMS.plan.n_z
        assert abs(side.outcome.qber - (fraction / 4 + 0.005 * (1 - fraction / 2))) < 0.025


def test_too_few_detections_end_the_block() -> None:
    def half(seen: Detections) -> Detections:
        return Detections(seen.positions[::2], seen.bits[::2])

    alice, bob = Bench(TERMS, clicks=half).run()
    assert alice.outcome.reason is bob.outcome.reason is Reason.SHORT
    assert alice.outcome.ledger.balance() == 0 == bob.outcome.ledger.balance()


def test_more_errors_than_the_leak_budget_can_pay_end_the_block_within_the_budget() -> None:
    plan = replace(TERMS.plan, leak_budget=TERMS.plan.leak_budget // 2)
    alice, bob = Bench(small_terms(plan)).run()
    assert alice.outcome.reason is bob.outcome.reason is Reason.LEAK
    for side in (alice, bob):
        assert 0 < side.outcome.ledger.leaked <= plan.leak_budget and side.outcome.ledger.balance() == 0


@pytest.mark.parametrize("what", ["singles", "phases", "together"])
def test_statistics_below_the_thresholds_end_the_block(what: str) -> None:
    """Each bound by itself, and what both prove together: a length that an honest block does not reach."""
    plan = TERMS.plan
    wanted = {
        "singles": replace(plan, s_z1=float(plan.n_z)),
        "phases": replace(plan, phi=0.0),
        "together": replace(plan, length=plan.length + 2000),
    }[what]
    alice, bob = Bench(small_terms(wanted)).run()
    assert alice.outcome.reason is bob.outcome.reason is Reason.STATISTICS
    assert alice.outcome.ledger.balance() == 0 == bob.outcome.ledger.balance()
    assert alice.outcome.found is None or alice.outcome.found.s_z1 > plan.s_z1
    assert not alice.outcome.keys and not bob.outcome.keys


def test_keys_that_still_differ_are_noticed_by_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cascade that gives up after the first pass leaves errors; the universal hash sees them."""
    plan = replace(TERMS.plan, sizes=TERMS.plan.sizes[:1])
    alice, bob = Bench(small_terms(plan)).run()
    assert alice.outcome.reason is bob.outcome.reason is Reason.VERIFY
    assert alice.outcome.ledger.balance() == 0 == bob.outcome.ledger.balance()
    assert not alice.outcome.keys and not bob.outcome.keys


def test_blocks_of_an_honest_link_nearly_always_pass() -> None:
    reasons = [side.outcome.reason for _ in range(25) for side in Bench(TERMS).run()]
    assert sum(reason is not None for reason in reasons) <= 2, reasons


# Whoever stands between


def check_tampered(bench: Bench, touched: list[str]) -> None:
    """Alice, who speaks the last word, gives nothing; Bob passes only if the touched frame is the last, COMMIT."""
    alice, bob = bench.alice, bench.bob
    assert not passed(alice) or not touched
    if passed(bob) and touched:
        assert touched == ["COMMIT"]
    for side in (alice, bob):
        if side.outcome is not None and side.outcome.reason is not None:
            assert bench.eve > 0, "a forged abort must not pass for a true one"


@settings(max_examples=60 * MANY, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(Kind)[5:]), st.integers(0, 10**9), st.integers(0, 30), st.booleans())
def test_any_flipped_bit_of_any_frame_aborts(kind: Kind, where: int, which: int, eve: bool) -> None:
    touched: list[str] = []
    seen = 0

    def flip(_number: int, _sender: str, body: bytes) -> list[bytes]:
        nonlocal seen
        if body[0] != kind or touched:
            return [body]
        seen += 1
        if kind in (Kind.ASK, Kind.PARITY) and seen <= which:
            return [body]
        bit = where % (8 * len(body))
        touched.append(kind.name)
        return [body[: bit // 8] + bytes([body[bit // 8] ^ 1 << bit % 8]) + body[bit // 8 + 1 :]]

    bench = Bench(TERMS, tamper=flip, eve=1.0 if eve else 0.0)
    alice, bob = bench.run()
    check_tampered(bench, touched)
    if touched:
        errors = [side.error for side in (alice, bob)]
        assert any(isinstance(error, BadFrame | Forged) for error in errors) or not (alice.done and bob.done)


@settings(max_examples=40 * MANY, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 60), st.sampled_from(["drop", "twice", "truncate", "empty", "earlier", "swap", "append"]))
def test_dropped_repeated_reordered_and_truncated_frames_abort(number: int, deed: str) -> None:
    history: list[bytes] = []
    touched: list[str] = []
    stored: list[bytes] = []

    def disturb(current: int, _sender: str, body: bytes) -> list[bytes]:
        history.append(body)
        if stored:  # "swap": the frame held back comes after its successor
            return [body, stored.pop()]
        if current != number:
            return [body]
        touched.append(Kind(body[0]).name)
        match deed:
            case "drop":
                return []
            case "twice":
                return [body, body]
            case "truncate":
                return [body[:-1]]
            case "empty":
                return [body[:1]] if len(body) > 1 else [body + b"x"]
            case "earlier":
                return [history[-3] if len(history) > 2 and history[-3] != body else history[0]]
            case "append":
                return [body + b"\0"]
        stored.append(body)
        return []

    bench = Bench(TERMS, tamper=disturb)
    bench.run()
    if touched and deed == "twice":
        # the last frame repeated comes after the block's end: it belongs to the next connection state
        assert touched == ["COMMIT"] or not (passed(bench.alice) and touched != ["AUTH"])
    else:
        check_tampered(bench, touched)


def test_a_whole_block_recorded_and_replayed_convinces_nobody() -> None:
    """Bob against the recording of Alice's frames of an earlier block: his detections differ."""
    first = Bench(TERMS)
    first.run()
    recorded = [body for sender, body in first.frames if sender == "A"]
    position = iter(recorded)

    def replay(_number: int, sender: str, body: bytes) -> list[bytes]:
        return [next(position, b"")] if sender == "A" else [body]

    bench = Bench(TERMS, tamper=replay)
    _alice, bob = bench.run()
    assert not passed(bob) and not passed(_alice)


def test_a_forged_abort_is_not_believed() -> None:
    def give_up(_number: int, sender: str, body: bytes) -> list[bytes]:
        return [bytes([Kind.ABORT, Reason.QBER])] if body[0] == Kind.CORRECT else [body]

    alice, bob = Bench(TERMS, tamper=give_up).run()
    assert alice.outcome is None and bob.outcome is None
    assert isinstance(alice.error, LinkError)


# Decoders


@given(st.binary(max_size=200), st.integers(0, 300))
def test_decoders_raise_bad_frame_and_nothing_else(data: bytes, count: int) -> None:
    bases = np.zeros(min(count, 100), dtype=np.uint8)
    for decode in (
        lambda: frame_untrusted(data),
        lambda: wire.Start.from_untrusted(data),
        lambda: wire.ready_untrusted(data),
        lambda: wire.detected_untrusted(data, 1000),
        lambda: wire.sift_untrusted(data, bases, 3, 2),
        lambda: wire.ask_untrusted(data),
        lambda: wire.hashed_untrusted(data, count, 50),
        lambda: wire.accept_untrusted(data),
        lambda: wire.abort_untrusted(data),
        lambda: unpack_untrusted(data, count),
    ):
        with contextlib.suppress(BadFrame):
            decode()


@given(st.lists(st.integers(0, 1), max_size=100))
def test_packed_bits_come_back_and_padding_must_be_zero(values: list[int]) -> None:
    bits = np.array(values, dtype=np.uint8)
    data = pack(bits)
    assert unpack_untrusted(data, len(bits)).tolist() == values
    if len(bits) % 8:
        with pytest.raises(BadFrame, match="padded"):
            unpack_untrusted(data[:-1] + bytes([data[-1] | 1]), len(bits))


def test_alice_takes_no_sifting_lies_and_bob_none_either() -> None:
    bases = np.array([0, 0, 1, 1], dtype=np.uint8)
    good = wire.sift(np.array([1, 0, 2, 0], dtype=np.uint8), np.array([1], dtype=np.uint8)).payload
    codes, bits, tested = wire.sift_untrusted(good, bases, 1, 1)
    assert codes.tolist() == [1, 0, 2, 0] and bits.tolist() == [1] and not len(tested)
    for wrong in ([2, 0, 2, 0], [1, 1, 2, 0], [1, 0, 1, 0], [3, 0, 2, 0], [1, 0, 2, 4], [9, 0, 2, 0]):
        frame = wire.sift(np.array(wrong, dtype=np.uint8), np.array([1], dtype=np.uint8))
        with pytest.raises(BadFrame):
            wire.sift_untrusted(frame.payload, bases, 1, 1)
    with pytest.raises(BadFrame, match="ascend"):
        wire.detected_untrusted(wire.detected(np.array([5, 5], np.uint64), bases[:2]).payload, 10)
    with pytest.raises(BadFrame, match="ascend"):
        wire.detected_untrusted(wire.detected(np.array([5, 10], np.uint64), bases[:2]).payload, 10)


def test_frames_say_nothing_of_their_payload() -> None:
    assert "secret" not in repr(Frame(Kind.CHECK, b"secret"))
    alice, _ = Bench(TERMS).run()
    assert bytes(alice.outcome.keys[:8]).hex() not in repr(alice.outcome) and "keys" not in repr(alice.outcome)


def test_the_small_plan_of_these_tests_is_a_real_one() -> None:
    plan = small_plan()
    assert plan.length > 2 * 768 + 256 and plan.expected_qber == pytest.approx(0.005, rel=0.05)
    assert OPTICS.mean_gain() > 0.1
