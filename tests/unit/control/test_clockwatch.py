"""Clocks that jump, slew, sleep; machines that are copied or moved."""

from __future__ import annotations

import pytest

from qvpn.control.clockwatch import ClockWatch, Sight
from qvpn.netio.vmclock import Generation


class Host:
    """A machine whose clocks the test moves."""

    def __init__(self) -> None:
        self.boottime, self.wall = 1000.0, 1.7e9
        self.mark: Generation | None = Generation(1, 1)
        self.stops: list[float] = []

    def read_wall(self) -> float:
        wall = self.wall
        if self.stops:
            self.passes(self.stops.pop())
        return wall

    def passes(self, seconds: float) -> None:
        self.boottime += seconds
        self.wall += seconds

    def watch(self) -> ClockWatch:
        return ClockWatch(lambda: self.boottime, self.read_wall, [lambda: None, lambda: self.mark])


@pytest.mark.parametrize("asleep", [0.5, 30.0, 86400.0])
def test_a_suspend_is_no_jump(asleep: float) -> None:
    host = Host()
    watch = host.watch()
    host.passes(asleep)
    assert watch.look()[0] is Sight.NOTHING


@pytest.mark.parametrize(
    ("step", "sight"),
    [(4.9, Sight.NOTHING), (-4.9, Sight.NOTHING), (5.1, Sight.JUMPED), (-5.1, Sight.JUMPED), (1e6, Sight.JUMPED)],
)
def test_a_step_beyond_five_seconds_is_a_jump_once(step: float, sight: Sight) -> None:
    host = Host()
    watch = host.watch()
    host.passes(0.5)
    host.wall += step
    found, seconds = watch.look()
    assert found is sight
    assert seconds == pytest.approx(step, abs=1e-3)
    assert watch.look()[0] is Sight.NOTHING


def test_a_clock_that_is_slewed_for_days_is_no_jump() -> None:
    host = Host()
    watch = host.watch()
    for _ in range(1000):
        host.passes(0.5)
        host.wall += 0.5
        assert watch.look()[0] is Sight.NOTHING


def test_a_suspend_between_two_reads_is_no_jump() -> None:
    host = Host()
    watch = host.watch()
    host.stops = [3600.0]
    assert watch.look()[0] is Sight.NOTHING
    assert watch.look()[0] is Sight.NOTHING


def test_a_copy_is_seen_once_and_more_than_its_jump() -> None:
    host = Host()
    watch = host.watch()
    assert watch.sees_forks
    host.mark, host.wall = Generation(2, 2), host.wall + 100
    assert watch.look()[0] is Sight.FORKED
    assert watch.look()[0] is Sight.NOTHING


def test_a_migration_is_a_jump() -> None:
    host = Host()
    watch = host.watch()
    host.mark = Generation(1, 2)
    assert watch.look()[0] is Sight.JUMPED
    assert watch.look()[0] is Sight.NOTHING


def test_a_mark_that_cannot_be_read_for_a_moment_is_remembered() -> None:
    host = Host()
    watch = host.watch()
    host.mark = None
    assert watch.look()[0] is Sight.NOTHING
    host.mark = Generation(2, 2)
    assert watch.look()[0] is Sight.FORKED


def test_where_nothing_is_shown_clocks_are_still_compared() -> None:
    host = Host()
    watch = ClockWatch(lambda: host.boottime, lambda: host.wall)
    assert not watch.sees_forks
    host.wall += 60
    assert watch.look()[0] is Sight.JUMPED


def test_two_devices_that_tell_of_one_copy_do_it_once() -> None:
    host = Host()
    marks = [Generation(1, 1), Generation(0, 0)]
    watch = ClockWatch(lambda: host.boottime, lambda: host.wall, [lambda: marks[0], lambda: marks[1]])
    marks[1] = Generation(1, 0)
    assert watch.look()[0] is Sight.FORKED
    assert watch.look()[0] is Sight.NOTHING
