"""Cascade: corrects, counts its leak, is as efficient as said, and answers no question that it should not."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keysource.qkd.distill.cascade import Corrector, Question, Reference, block_sizes, orders, prefix_parities
from keysource.qkd.errors import BadFrame
from keysource.qkd.rates.entropy import binary_entropy


def correct(bits: int, ratio: float, schedule: str, nature: np.random.Generator) -> tuple[bool, float, int, int]:
    """(corrected, f, messages, parities asked twice) for one frame."""
    alice = nature.integers(0, 2, bits, dtype=np.uint8)
    errors = (nature.random(bits) < ratio).astype(np.uint8)
    seed, sizes = os.urandom(32), block_sizes(bits, ratio, schedule)
    reference, corrector = Reference(alice, seed, len(sizes)), Corrector(alice ^ errors, seed, sizes)
    work, asked, messages = corrector.run(), 0, 0
    question = next(work, None)
    while question is not None:
        answers = reference.answer_untrusted(question)
        asked, messages = asked + len(answers), messages + 1
        try:
            question = work.send(answers)
        except StopIteration:
            break
    f = asked / (bits * binary_entropy(max(errors.mean(), 1 / bits)))
    return bool((corrector.bits == alice).all()), f, messages, int(errors.sum())


@pytest.mark.parametrize("ratio", [0.01, 0.02, 0.03, 0.05, 0.08, 0.11])
@pytest.mark.parametrize(("schedule", "f_most", "messages"), [("original", 1.26, 120), ("optimised", 1.09, 1500)])
def test_it_corrects_at_every_error_ratio_with_the_efficiency_it_claims(
    ratio: float, schedule: str, f_most: float, messages: int
) -> None:
    nature = np.random.default_rng(round(ratio * 1000))
    runs = [correct(16_384, ratio, schedule, nature) for _ in range(4)]
    assert all(run[0] for run in runs)
    f = float(np.mean([run[1] for run in runs]))
    assert 1.0 < f < f_most, "below 1 is a bug: no correction leaks less than the entropy"
    assert np.mean([run[2] for run in runs]) < messages


@pytest.mark.parametrize("ratio", [0.01, 0.02])
def test_at_the_error_ratios_of_real_links_the_original_schedule_stays_below_1_2(ratio: float) -> None:
    nature = np.random.default_rng(9)
    assert np.mean([correct(60_000, ratio, "original", nature)[1] for _ in range(3)]) < 1.2


def test_few_frames_are_left_with_an_error() -> None:
    nature = np.random.default_rng(11)
    failed = [not correct(4096, 0.03, "original", nature)[0] for _ in range(120)]
    assert sum(failed) <= 2


@pytest.mark.parametrize("bits", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("wrong", [0, 1, 2, 5])
def test_odd_sizes_and_no_errors_at_all(bits: int, wrong: int) -> None:
    nature = np.random.default_rng(bits * 10 + wrong)
    alice = nature.integers(0, 2, bits, dtype=np.uint8)
    bob = alice.copy()
    bob[nature.permutation(bits)[: min(wrong, bits)]] ^= 1
    sizes, seed = [1, 2, bits // 2 + 1], os.urandom(32)
    sizes = [min(size, bits) for size in sizes]
    reference, corrector = Reference(alice, seed, 3), Corrector(bob, seed, sizes)
    work = corrector.run()
    question = next(work)
    while True:
        answers = reference.answer_untrusted(question) if len(question.positions) else np.empty(0, np.uint8)
        try:
            question = work.send(answers)
        except StopIteration:
            break
    assert (corrector.bits == alice).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_prefix_parities_are_what_counting_gives(bits: list[int], random) -> None:
    order = list(range(len(bits)))
    random.shuffle(order)
    quick = prefix_parities(np.array(bits, dtype=np.uint8), np.array(order))
    slow = [sum(bits[i] for i in order[:n]) % 2 for n in range(len(bits) + 1)]
    assert quick.tolist() == slow


def test_each_pass_reads_the_key_in_an_order_of_its_own_that_both_ends_find() -> None:
    seed = os.urandom(32)
    first, again = orders(1001, seed, 4), orders(1001, seed, 4)
    for mine, theirs in zip(first, again, strict=True):
        assert sorted(mine.tolist()) == list(range(1001)) and (mine == theirs).all()
    assert len({tuple(order.tolist()) for order in first}) == 4
    assert (orders(1001, os.urandom(32), 2)[1] != first[1]).any()


@pytest.mark.parametrize(("number", "positions"), [
    (9, [1]),
    (0, []),
    (0, [0, 5]),
    (0, [5, 4]),
    (0, [5, 5]),
    (0, [101]),
])  # fmt: skip
def test_a_liars_questions_get_no_answer(number: int, positions: list[int]) -> None:
    reference = Reference(np.zeros(100, dtype=np.uint8), os.urandom(32), 3)
    with pytest.raises(BadFrame):
        reference.answer_untrusted(Question(number, np.array(positions, dtype=np.uint32)))


def test_no_parity_is_given_twice() -> None:
    reference = Reference(np.zeros(100, dtype=np.uint8), os.urandom(32), 3)
    reference.answer_untrusted(Question(1, np.array([10, 20], dtype=np.uint32)))
    with pytest.raises(BadFrame, match="before"):
        reference.answer_untrusted(Question(1, np.array([20, 30], dtype=np.uint32)))
    assert len(reference.answer_untrusted(Question(2, np.array([20], dtype=np.uint32)))) == 1
