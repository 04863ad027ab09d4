"""The search for the path's MTU finds it: any size, any loss up to 30 % each way, a bounded number of probes."""

from __future__ import annotations

import heapq
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from qvpn.tunnel.pathmtu import FLOOR, TINY, PathSearch


class Path:
    """A peer that answers every probe, behind a path that swallows what is too long, and some of the rest."""

    def __init__(self, size: int, ceiling: int, *, loss: float = 0.0, delay: float = 0.01, seed: int = 0) -> None:
        self.size, self.loss, self.delay = size, loss, delay
        self.chance = random.Random(seed)
        self.search = PathSearch(ceiling, 28, 0.0)
        self.now, self.on, self.busy = 0.0, True, False
        self._answers: list[tuple[float, int, int]] = []
        self.history: list[tuple[float, int]] = []

    def run(self, until: float) -> None:
        while True:
            if self.busy:
                self.search.traffic(self.now)
            due = min(self.search.next_timer(), self._answers[0][0] if self._answers else math.inf)
            if self.busy:
                due = min(due, self.now + 1.0)
            if due > until:
                self.now = until
                return
            self.now = max(self.now, due)
            self._step()

    def _step(self) -> None:
        while self._answers and self._answers[0][0] <= self.now:
            _, number, size = heapq.heappop(self._answers)
            assert self.search.answered(number, size, self.now) in (True, False)
        for probe in self.search.probes(self.now):
            assert probe.size <= self.search.ceiling
            if self.on and probe.size <= self.size and not self._lost() and not self._lost():
                heapq.heappush(self._answers, (self.now + self.delay, probe.number, probe.size))
        if not self.history or self.history[-1][1] != self.search.size:
            self.history.append((self.now, self.search.size))

    def _lost(self) -> bool:
        return self.chance.random() < self.loss


ceilings = st.sampled_from([1472, 1452, 8972, 65_507, 1400, 4442])


@settings(deadline=None, max_examples=40)
@given(ceilings, st.data(), st.floats(0.0005, 0.3))
def test_without_loss_the_true_size_is_found_within_seconds(ceiling: int, data: st.DataObject, delay: float) -> None:
    size = data.draw(st.integers(FLOOR, ceiling))
    path = Path(size, ceiling, delay=delay)
    path.run(15.0 + 60 * delay)
    assert path.search.settled
    assert path.search.size == size
    assert path.search.sent <= 600


@settings(deadline=None)
@given(ceilings, st.data(), st.floats(0.0, 0.3), st.integers(0, 1 << 32))
def test_with_loss_the_true_size_is_found_too(ceiling: int, data: st.DataObject, loss: float, seed: int) -> None:
    size = data.draw(st.integers(FLOOR, ceiling))
    path = Path(size, ceiling, loss=loss, seed=seed)
    path.run(1800.0)
    assert path.search.size == size  # at the latest one of the later searches did
    assert path.search.sent <= 8000


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([1472, 8972]), st.data(), st.floats(0.0, 0.3), st.integers(0, 1 << 32))
def test_a_size_is_never_used_for_long_that_does_not_pass(
    ceiling: int, data: st.DataObject, loss: float, seed: int
) -> None:
    size, later = (data.draw(st.integers(FLOOR, ceiling)) for _ in range(2))
    path = Path(size, ceiling, loss=loss, seed=seed)
    path.busy = True
    path.run(900.0)
    assert path.search.size == size
    path.size, shrunk = later, path.now
    # where half of the rounds are lost, twenty misses that loss cannot explain take twenty rounds that were answered
    path.run(shrunk + (5.0 if not loss else 40.0 if loss < 0.05 else 400.0))
    assert path.search.size <= max(later, FLOOR)
    path.run(shrunk + (2500.0 if loss < 0.2 else 12_000.0))  # a later search finds what loss hid from one
    assert path.search.size == later


def test_a_usual_path_takes_one_round_trip() -> None:
    path = Path(1472, 1472)
    path.run(0.05)
    assert (path.search.size, path.search.assumed, path.search.sent) == (1472, False, 3)


def test_a_path_that_breaks_under_traffic_is_left_within_three_seconds() -> None:
    path = Path(1472, 1472)
    path.busy = True
    path.run(100.0)
    assert path.search.settled
    path.size = 1272
    path.run(103.0)
    assert path.search.size <= 1272
    path.run(106.0)
    assert (path.search.size, path.search.settled, path.search.falls) == (1272, True, 1)


def test_a_path_that_heals_is_used_again() -> None:
    path = Path(1300, 1472)
    path.run(20.0)
    assert path.search.size == 1300
    path.size = 1472
    path.run(60.0)
    assert path.search.size == 1472


def test_an_idle_peer_whose_size_is_known_is_left_alone() -> None:
    path = Path(1472, 1472)
    path.run(1.0)
    sent = path.search.sent
    path.run(10_000.0)
    assert path.search.sent == sent


def test_a_peer_that_knows_no_probes_costs_little_and_keeps_the_links_size() -> None:
    path = Path(1472, 1472)
    path.on = False
    path.busy = True
    path.run(3600.0)
    assert (path.search.size, path.search.assumed) == (1472, True)
    assert path.search.sent < 3 * 80


def test_silence_is_not_narrowness() -> None:
    """A peer that is away for a while keeps its size."""
    path = Path(1472, 1472)
    path.busy = True
    path.run(50.0)
    path.on = False
    path.run(500.0)
    assert path.search.size == 1472
    path.on = True
    path.run(510.0)
    assert (path.search.size, path.search.falls, path.search.settled) == (1472, 0, True)


def test_nothing_drives_the_size_below_the_floor() -> None:
    path = Path(TINY, 1472)
    path.busy = True
    path.run(300.0)
    assert path.search.size == FLOOR


def test_answers_to_what_was_not_asked_change_nothing() -> None:
    search = PathSearch(1472, 28, 0.0)
    probes = search.probes(0.0)
    assert not search.answered(999, 1472, 0.1)
    assert not search.answered(probes[-1].number, 9000, 0.1)
    assert search.answered(probes[-1].number, probes[-1].size, 0.1)
    assert not search.answered(probes[-1].number, probes[-1].size, 0.1)


def test_a_link_that_changes_its_mtu_is_followed() -> None:
    path = Path(8972, 8972)
    path.run(5.0)
    path.search.set_ceiling(1472, path.now)
    assert path.search.size == 1472
    path.search.set_ceiling(8972, path.now)
    path.run(15.0)
    assert path.search.size == 8972


def test_after_a_move_the_old_size_is_used_until_more_is_proved() -> None:
    path = Path(1300, 1472)
    path.run(20.0)
    path.size = 1472
    path.search.moved(28, path.now)
    assert path.search.size == 1300
    path.run(21.0)
    assert path.search.size == 1472
