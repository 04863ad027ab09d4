"""Cascade: corrects, counts its leak, is as efficient as said, asks what the slow one asks, and answers no question
that it should not."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_cascade import Asked, SlowBob

from keysource.qkd.distill.cascade import Corrector, Question, Reference, block_sizes
from keysource.qkd.distill.layout import Layout, lanes_of, orders
from keysource.qkd.errors import BadFrame
from keysource.qkd.rates.entropy import binary_entropy

LONG = os.environ.get("QVPN_TEST_LONG") == "1"


def talk(reference: Reference, corrector: Corrector) -> list[Asked]:
    """Both ends to the end of it; what was asked."""
    work, asked = corrector.run(), []
    question = next(work, None)
    while question is not None:
        asked.append((question.number, question.positions.tolist()))
        answers = reference.answer_untrusted(question)
        try:
            question = work.send(answers)
        except StopIteration:
            break
    return asked


def pair(bits: int, ratio: float, nature: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    alice = nature.integers(0, 2, bits, dtype=np.uint8)
    return alice, alice ^ (nature.random(bits) < ratio).astype(np.uint8)


def correct(bits: int, ratio: float, schedule: str, nature: np.random.Generator) -> tuple[int, float, int]:
    """(frames with an error left, f, messages) for one key."""
    alice, bob = pair(bits, ratio, nature)
    seed, sizes = nature.bytes(32), block_sizes(bits, ratio, schedule)
    corrector = Corrector(bob, seed, sizes)
    asked = talk(Reference(alice, seed, sizes), corrector)
    entropy = bits * binary_entropy(max(float((alice ^ bob).mean()), 1 / bits))
    wrong = np.flatnonzero(corrector.bits != alice) % lanes_of(bits, max(sizes))
    return len(set(wrong.tolist())), sum(len(each) for _number, each in asked) / entropy, len(asked)


@pytest.mark.parametrize("ratio", [0.01, 0.02, 0.03, 0.05, 0.08, 0.11])
@pytest.mark.parametrize(("schedule", "f_most", "messages"), [("original", 1.26, 120), ("optimised", 1.09, 1500)])
def test_it_corrects_at_every_error_ratio_with_the_efficiency_it_claims(
    ratio: float, schedule: str, f_most: float, messages: int
) -> None:
    nature = np.random.default_rng(round(ratio * 1000))
    runs = [correct(16_384, ratio, schedule, nature) for _ in range(2)]
    assert not any(run[0] for run in runs)
    f = float(np.mean([run[1] for run in runs]))
    assert 1.0 < f < f_most, "below 1 is a bug: no correction leaks less than the entropy"
    assert np.mean([run[2] for run in runs]) < messages


@pytest.mark.parametrize("ratio", [0.01, 0.02, 0.05])
def test_large_keys_come_close_to_shannons_limit(ratio: float) -> None:
    nature = np.random.default_rng(9)
    failed, f, messages = correct(1 << 18, ratio, "optimised", nature)
    assert not failed and 1.0 < f < 1.045 and messages < 1500
    failed, f, messages = correct(1 << 18, ratio, "original", nature)
    assert not failed and 1.0 < f < 1.2 and messages < 300


@pytest.mark.parametrize("schedule", ["original", "optimised"])
def test_few_frames_are_left_with_an_error(schedule: str) -> None:
    """At most one in a thousand: 64 frames in lock-step at once."""
    nature, bits = np.random.default_rng(11), 1 << 20
    frames = lanes_of(bits, max(block_sizes(bits, 0.03, schedule)))
    runs = [correct(bits, 0.03, schedule, nature)[0] for _ in range(40 if LONG else 1)]
    assert frames == (64 if schedule == "original" else 16)
    assert sum(runs) <= frames * len(runs) // 1000


# Beside the slow one


@settings(max_examples=60 if LONG else 12, deadline=None)
@given(
    st.integers(1, 700),
    st.sampled_from([1, 2, 4, 8, 16, 64]),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(0, 5),
    st.floats(0.0, 0.12),
    st.integers(0, 2**32 - 1),
)
def test_it_asks_exactly_what_the_slow_one_asks(
    bits: int, lanes: int, laned: list[int], subsets: int, ratio: float, number: int
) -> None:
    nature = np.random.default_rng(number)
    alice, bob = pair(bits, ratio, nature)
    seed, sizes = nature.bytes(32), laned + [0] * subsets
    slow = SlowBob(alice.tolist(), bob.tolist(), seed, sizes, lanes)
    slow.run()
    corrector = Corrector(bob, seed, sizes, lanes)
    assert talk(Reference(alice, seed, sizes, lanes), corrector) == slow.asked
    assert corrector.bits.tolist() == slow.bits


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.sampled_from([1, 2, 8, 32, 64]), st.integers(0, 2**32 - 1))
def test_an_answer_is_the_parity_of_the_bits_that_the_position_stands_for(bits: int, lanes: int, number: int) -> None:
    nature = np.random.default_rng(number)
    key, seed = nature.integers(0, 2, bits, dtype=np.uint8), nature.bytes(32)
    sizes = [int(nature.integers(1, 20)), int(nature.integers(1, 60)), 0, 0]
    layout = Layout(bits, seed, sizes, lanes)
    for which, most in ((0, layout.trees[0].end), (1, layout.nodes - layout.trees[1].base)):
        where = np.unique(nature.integers(0, most * lanes, 20)).astype(np.uint32)
        answers = Reference(key, seed, sizes, lanes).answer_untrusted(Question(which, where))
        assert answers.tolist() == [int(key[layout.members(which, p)].sum()) & 1 for p in where.tolist()]
    nodes = np.unique(nature.integers(1, 2 << layout.depth, 20)).tolist()
    where = np.array([layout.position(subset, node) for subset in (0, 1) for node in nodes], dtype=np.uint32)
    answers = Reference(key, seed, sizes, lanes).answer_untrusted(Question(2, where))
    assert answers.tolist() == [int(key[layout.members(2, p)].sum()) & 1 for p in where.tolist()]


@pytest.mark.parametrize(("bits", "lanes"), [(1, 1), (100, 1), (1000, 4), (1003, 8), (5000, 64), (4097, 16)])
def test_the_blocks_of_a_pass_are_all_of_the_key_and_halves_make_up_their_node(bits: int, lanes: int) -> None:
    seed, sizes = os.urandom(32), [7, 16, 37, 0, 0]
    layout = Layout(bits, seed, sizes, lanes)
    for number, trees in enumerate(layout.trees):
        blocks = [
            layout.members(number, (node - trees.base) * lanes + lane)
            for node in trees.tops.tolist()
            for lane in range(lanes)
        ]
        assert np.sort(np.concatenate(blocks)).tolist() == list(range(bits))
        assert max(map(len, blocks)) <= trees.size
        for level in range(1, trees.levels + 1):
            node = int(trees.rows[level]) - trees.base
            left = int(trees.rows[level - 1]) - trees.base
            halves = np.concatenate([layout.members(number, (left + half) * lanes) for half in (0, 1)])
            assert np.sort(halves).tolist() == layout.members(number, node * lanes).tolist()
    whole = [layout.members(3, layout.position(subset, 1)) for subset in (0, 1)]
    assert all(abs(len(members) - bits / 2) <= 5 * bits**0.5 for members in whole)
    for node in (1, 2, 3, (1 << layout.depth) // 2 + 1):
        if node < 1 << layout.depth:
            halves = np.concatenate([layout.members(3, layout.position(1, 2 * node + half)) for half in (0, 1)])
            assert np.sort(halves).tolist() == layout.members(3, layout.position(1, node)).tolist()


@given(st.integers(1, 3000), st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.integers(0, 2**32 - 1))
def test_a_key_in_words_is_the_key(bits: int, lanes: int, number: int) -> None:
    key = np.random.default_rng(number).integers(0, 2, bits, dtype=np.uint8)
    layout = Layout(bits, bytes(32), [8], lanes)
    words = layout.pack(key)
    assert (layout.unpack(words) == key).all()
    for bit in (0, bits // 2, bits - 1):
        assert int(words[bit // lanes]) >> (bit % lanes) & 1 == key[bit]


@pytest.mark.parametrize("bits", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("wrong", [0, 1, 2, 5])
@pytest.mark.parametrize("schedule", ["original", "optimised"])
def test_odd_sizes_and_no_errors_at_all(bits: int, wrong: int, schedule: str) -> None:
    nature = np.random.default_rng(bits * 10 + wrong)
    alice = nature.integers(0, 2, bits, dtype=np.uint8)
    bob = alice.copy()
    bob[nature.permutation(bits)[: min(wrong, bits)]] ^= 1
    sizes, seed = block_sizes(bits, 0.02, schedule), nature.bytes(32)
    corrector = Corrector(bob, seed, sizes)
    talk(Reference(alice, seed, sizes), corrector)
    assert (corrector.bits == alice).all()


def test_each_pass_reads_the_key_in_an_order_of_its_own_that_both_ends_find() -> None:
    seed = os.urandom(32)
    first, again = orders(1001, seed, 4), orders(1001, seed, 4)
    for mine, theirs in zip(first, again, strict=True):
        assert sorted(mine.tolist()) == list(range(1001)) and (mine == theirs).all()
    assert len({tuple(order.tolist()) for order in first}) == 4
    assert (orders(1001, os.urandom(32), 2)[1] != first[1]).any()


def test_frames_are_as_many_as_leave_room_for_blocks() -> None:
    assert [lanes_of(bits, 100) for bits in (1, 16_383, 16_384, 1 << 17, 1 << 19, 1 << 30)] == [1, 1, 2, 16, 64, 64]
    assert [lanes_of(bits, 4096) for bits in (1 << 14, 1 << 17, 1 << 20, 1 << 30)] == [1, 2, 16, 64]
    assert Layout(1_000_001, bytes(32), [600, 0]).words == 15_626


# Liars


SIZES = [8, 16, 33, 0, 0]


def reference(bits: int = 100) -> Reference:
    return Reference(np.zeros(bits, dtype=np.uint8), bytes(32), SIZES)


@pytest.mark.parametrize(("number", "positions"), [
    (4, [1]),
    (9, [1]),
    (0, []),
    (0, [5, 4]),
    (0, [5, 5]),
    (0, [0, 1_000]),
    (2, [4_000_000_000]),
    (3, [0]),
    (3, [4_000_000_000]),
    (3, [256]),
])  # fmt: skip
def test_a_liars_questions_get_no_answer(number: int, positions: list[int]) -> None:
    with pytest.raises(BadFrame):
        reference().answer_untrusted(Question(number, np.array(positions, dtype=np.uint32)))


def test_the_last_position_of_each_pass_is_answered_and_the_next_is_not() -> None:
    layout = Layout(100, bytes(32), SIZES)
    ends = [trees.end - trees.base for trees in layout.trees] + [layout.position(2, 0)]
    for number, end in enumerate(ends):
        assert len(reference().answer_untrusted(Question(number, np.array([end - 1], dtype=np.uint32)))) == 1
        with pytest.raises(BadFrame, match="outside"):
            reference().answer_untrusted(Question(number, np.array([end], dtype=np.uint32)))


@pytest.mark.parametrize("number", [1, 3])
def test_no_parity_is_given_twice(number: int) -> None:
    alice = reference()
    alice.answer_untrusted(Question(number, np.array([10, 20], dtype=np.uint32)))
    with pytest.raises(BadFrame, match="before"):
        alice.answer_untrusted(Question(number, np.array([20, 30], dtype=np.uint32)))
    assert len(alice.answer_untrusted(Question(number - 1, np.array([20], dtype=np.uint32)))) == 1


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("kind", ["random", "ones", "zeros"])
def test_a_liars_answers_end_in_an_error_or_in_the_end(kind: str, lanes: int) -> None:
    """Whatever he says, Bob stops, and no more was asked than there are nodes."""
    for number in range(6):
        nature = np.random.default_rng(number)
        corrector = Corrector(nature.integers(0, 2, 400, dtype=np.uint8), nature.bytes(32), SIZES, lanes)
        work, asked = corrector.run(), 0
        with pytest.raises((BadFrame, StopIteration)):
            question = next(work)
            while True:
                asked += len(question.positions)
                lies = nature.integers(0, 2, len(question.positions), dtype=np.uint8)
                question = work.send(lies if kind == "random" else np.full_like(lies, kind == "ones"))
        assert asked < 4_000


@pytest.mark.parametrize("sizes", [[], [0, 0], [8, 0, 8], [8, -1]])
def test_a_schedule_is_laned_passes_and_then_subsets(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="laned passes"):
        Layout(100, bytes(32), sizes)
