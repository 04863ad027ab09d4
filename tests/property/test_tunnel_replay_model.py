"""The window against a model that remembers every counter it ever accepted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qvpn.tunnel.replay import BLOCK, ReplayWindow

BLOCKS = 8


class SlowWindow:
    """What the window means, word by word: seen counters, and a limit counted in blocks from the highest."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def fresh(self, counter: int) -> bool:
        highest = max(self.seen, default=0)
        return counter // BLOCK > highest // BLOCK - BLOCKS and counter not in self.seen

    def mark(self, counter: int) -> None:
        self.seen.add(counter)


NEAR = st.integers(0, 3 * BLOCKS * BLOCK)
ANY = NEAR | st.integers(0, (1 << 63) - 1)


@given(
    st.lists(
        ANY | st.tuples(st.just("again"), st.integers(0, 20)) | st.integers(-700, 700).map(lambda d: ("step", d))
    )
)
def test_window_equals_model(steps: list[int | tuple[str, int]]) -> None:
    window, model, given_so_far = ReplayWindow(BLOCKS), SlowWindow(), [0]
    for step in steps:
        if isinstance(step, int):
            counter = step
        elif step[0] == "again":
            counter = given_so_far[-1 - step[1] % len(given_so_far)]
        else:
            counter = min(max(0, given_so_far[-1] + step[1]), (1 << 63) - 1)
        given_so_far.append(counter)
        assert window.fresh(counter) == model.fresh(counter)
        assert window.fresh(counter) or counter <= window.highest  # so an opener need not ask about what is above
        if window.fresh(counter):
            window.mark(counter)
            model.mark(counter)
        assert window.highest == max(model.seen, default=-1)
        assert window.marked == len(model.seen)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 63), st.integers(1, 64))))
def test_runs_equal_one_by_one(runs: list[tuple[int, int, int]]) -> None:
    window, model = ReplayWindow(BLOCKS), SlowWindow()
    for block, first, count in runs:
        indexes = range(first, min(first + count, BLOCK))
        mask = sum(1 << index for index in indexes)
        counters = [block * BLOCK + index for index in indexes]
        allowed = all(model.fresh(counter) for counter in counters)
        assert window.run_fresh(block, mask) == allowed
        if allowed:
            window.mark_run(block, mask, len(counters))
            for counter in counters:
                model.mark(counter)
