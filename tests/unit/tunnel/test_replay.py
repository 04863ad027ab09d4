"""The replay window at its edges, as a truth table."""

from __future__ import annotations

import pytest

from qvpn.tunnel.replay import BLOCK, WINDOW_BLOCKS, ReplayWindow

SPAN = WINDOW_BLOCKS * BLOCK

# counters marked before, counter asked, fresh?
TABLE = [
    ([], 0, True),
    ([], SPAN * 1000, True),
    ([], (1 << 63) - 1, True),
    ([0], 0, False),
    ([0], 1, True),
    ([63], 64, True),
    ([63], 63, False),
    ([64], 63, True),
    ([64], 0, True),
    ([5, 3], 4, True),
    ([5, 3], 3, False),
    # the oldest block in the window is highest block - 8191
    ([WINDOW_BLOCKS * BLOCK], BLOCK - 1, False),
    ([WINDOW_BLOCKS * BLOCK], BLOCK, True),
    ([WINDOW_BLOCKS * BLOCK + 63], BLOCK, True),
    ([(WINDOW_BLOCKS - 1) * BLOCK], 0, True),
    # the same place in the ring, one turn later and one turn earlier
    ([7, SPAN + 7], 7, False),
    ([7, SPAN], SPAN + 7, True),
    ([7], SPAN + 7, True),
    # a jump by less than the window keeps what is still inside
    ([100, 100 + SPAN - BLOCK], 100, False),
    ([100, 100 + SPAN - BLOCK], 101, True),
    # a jump by more clears all, and what lies behind is too old
    ([100, 50 * SPAN], 101, False),
    ([100, 50 * SPAN], 50 * SPAN - SPAN + BLOCK, True),
    ([100, 50 * SPAN], 50 * SPAN - SPAN, False),
    ([(1 << 63) - 1], (1 << 63) - 1, False),
    ([(1 << 63) - 1], (1 << 63) - 2, True),
    ([(1 << 63) - 1], 0, False),
]


@pytest.mark.parametrize(("marked", "counter", "fresh"), TABLE)
def test_truth_table(marked: list[int], counter: int, fresh: bool) -> None:
    window = ReplayWindow()
    for each in marked:
        assert window.fresh(each)
        window.mark(each)
    assert window.fresh(counter) is fresh
    assert window.run_fresh(counter // BLOCK, 1 << counter % BLOCK) is fresh


def test_asking_changes_nothing() -> None:
    window = ReplayWindow()
    window.mark(SPAN)
    for _ in range(2):
        assert window.fresh(10 * SPAN)
        assert window.fresh(SPAN - 1)
        assert not window.fresh(SPAN)
    assert (window.highest, window.marked) == (SPAN, 1)


def test_highest_and_marked_follow() -> None:
    window = ReplayWindow()
    assert window.highest == -1
    for counter in (5, 2, 700, 64, 699):
        window.mark(counter)
    assert (window.highest, window.marked) == (700, 5)


def test_a_run_is_refused_if_one_of_it_was_seen() -> None:
    window = ReplayWindow()
    window.mark(3 * BLOCK + 10)
    assert not window.run_fresh(3, 0b111 << 9)
    assert window.run_fresh(3, 0b111 << 11)
    window.mark_run(3, 0b111 << 11, 3)
    assert window.highest == 3 * BLOCK + 13
    assert [window.fresh(3 * BLOCK + index) for index in range(9, 16)] == [
        True,
        False,
        False,
        False,
        False,
        True,
        True,
    ]
    assert window.marked == 4


def test_each_counter_of_several_turns_passes_once() -> None:
    window = ReplayWindow(blocks=4)
    for counter in range(0, 40 * BLOCK, 3):
        assert window.fresh(counter)
        window.mark(counter)
        assert not window.fresh(counter)


@pytest.mark.parametrize("blocks", [0, 1, 3, 6])
def test_the_ring_is_a_power_of_two(blocks: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        ReplayWindow(blocks)
