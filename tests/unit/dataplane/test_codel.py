"""CoDel beside the pseudo-code of RFC 8289, chapter 5, written down as it stands over a list of packets."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qvpn.dataplane.codel import INTERVAL, TARGET, CoDel


class Rfc8289:
    """``deque`` and ``dodequeue`` of the RFC.  Packets are (number, time of arrival)."""

    def __init__(self) -> None:
        self.queue: list[tuple[int, float]] = []
        self.dropped: list[int] = []
        self.first_above_time = self.drop_next = 0.0
        self.count = self.lastcount = 0
        self.dropping = False

    def control_law(self, t: float, count: int) -> float:
        return t + INTERVAL / math.sqrt(count)

    def dodequeue(self, now: float) -> tuple[tuple[int, float] | None, bool]:
        if not self.queue:
            self.first_above_time = 0.0
            return None, False
        packet = self.queue.pop(0)
        if now - packet[1] < TARGET or len(self.queue) <= 1:
            self.first_above_time = 0.0
        elif self.first_above_time == 0.0:
            self.first_above_time = now + INTERVAL
        elif now >= self.first_above_time:
            return packet, True
        return packet, False

    def deque(self, now: float) -> tuple[int, float] | None:
        packet, ok = self.dodequeue(now)
        if packet is None:
            self.dropping = False
            return None
        if self.dropping:
            if not ok:
                self.dropping = False
            while now >= self.drop_next and self.dropping:
                assert packet is not None
                self.dropped.append(packet[0])
                self.count += 1
                packet, ok = self.dodequeue(now)
                if not ok:
                    self.dropping = False
                else:
                    self.drop_next = self.control_law(self.drop_next, self.count)
        elif ok:
            self.dropped.append(packet[0])
            packet, _ = self.dodequeue(now)
            self.dropping = True
            delta = self.count - self.lastcount
            self.count = 1
            if delta > 1 and now - self.drop_next < 16 * INTERVAL:
                self.count = delta
            self.drop_next = self.control_law(now, self.count)
            self.lastcount = self.count
        return packet


class Quick:
    """The same queue with ours."""

    def __init__(self) -> None:
        self.queue: list[tuple[int, float]] = []
        self.dropped: list[int] = []
        self.codel = CoDel()

    def deque(self, now: float) -> tuple[int, float] | None:
        while self.queue:
            packet = self.queue.pop(0)
            if not self.codel.judge(now - packet[1], len(self.queue) <= 1, now):
                return packet
            self.dropped.append(packet[0])
        self.codel.emptied()
        return None


steps = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from((0.0005, 0.004, 0.02, 0.07, 0.3))), max_size=150
)


@given(steps)
def test_the_same_packets_are_dropped_as_by_the_rfc(run: list[tuple[int, int, float]]) -> None:
    slow, quick = Rfc8289(), Quick()
    now, number = 1.0, 0
    for arrive, leave, pause in run:
        for _ in range(arrive):
            slow.queue.append((number, now))
            quick.queue.append((number, now))
            number += 1
        now += pause
        assert [slow.deque(now) for _ in range(leave)] == [quick.deque(now) for _ in range(leave)]
        assert slow.dropped == quick.dropped


def overload(seconds: float, waited: float, step: float = 0.001) -> list[float]:
    codel = CoDel()
    return [place * step for place in range(int(seconds / step)) if codel.judge(waited, False, place * step)]


def test_drops_begin_after_an_interval_and_come_faster() -> None:
    times = overload(1.0, 2 * TARGET)
    assert abs(times[0] - INTERVAL) < 0.002
    gaps = [later - earlier for earlier, later in pairwise(times)]
    for place, gap in enumerate(gaps[:8], start=1):
        assert abs(gap - INTERVAL / math.sqrt(place)) < 0.004, (place, gap)


def test_a_short_wait_is_never_punished() -> None:
    assert overload(10.0, 0.9 * TARGET) == []


def test_a_burst_that_drains_within_the_interval_is_left_alone() -> None:
    codel = CoDel()
    for burst in range(20):
        for place in range(90):
            now = burst + place * 0.001
            assert not codel.judge(0.09 - place * 0.001, False, now)
