"""The queues of both ends in a small world with TCP in it: virtual time, real FQ-CoDel and real CoDel.

Connections like Linux's (slow start that ends when the round trip grows, CUBIC and its Reno-friendly part, a window
of at most 4 MB) send superpackets; one end seals, the other opens, each at so many bytes a second; an echo request
every 10 ms goes the same way.  Without our queues the world has what a kernel has: two queues without order.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from qvpn.dataplane.arrivals import Arrivals
from qvpn.dataplane.flowqueue import FlowQueue
from qvpn.netio.base import Received
from tests.unit.dataplane.support import ALICE

SEGMENT = 1388
BIG = 46 * SEGMENT
WINDOW = 4e6
ROUND_TRIP = 0.0003
SOCKET = 4.2e6
"""Payload that a socket buffer of 4 MiB takes in superpackets."""
BETA, CUBIC, RENO = 0.7, 0.4, 0.53
"""RFC 9438, 4."""


class Parcel(NamedTuple):
    flow: int
    """-1: an echo request."""
    size: int
    sent: float


@dataclass
class Connection:
    window: float = 10 * SEGMENT
    threshold: float = float("inf")
    flight: int = 0
    smoothed: float = 0.001
    recovered: float = 0.0
    before: float = 0.0
    epoch: tuple[float, float] | None = None
    """When the window began to grow again, and from what."""

    def acked(self, size: int, trip: float, now: float) -> None:
        self.flight -= size
        self.smoothed += (trip - self.smoothed) / 8
        if self.window < self.threshold:
            self.window += size
            if trip > ROUND_TRIP + 0.006:
                self.threshold = self.window
        else:
            self._grow(size, now)
        self.window = min(self.window, WINDOW)

    def _grow(self, size: int, now: float) -> None:
        began, start = self.epoch = self.epoch or (now, self.window)
        since, most = now - began, self.before / SEGMENT
        turning = (most * (1 - BETA) / CUBIC) ** (1 / 3)
        cubic = (CUBIC * (since + self.smoothed - turning) ** 3 + most) * SEGMENT
        target = max(cubic, start + RENO * SEGMENT * since / self.smoothed)
        if target > self.window:
            self.window += (min(target, 1.5 * self.window) - self.window) * size / self.window

    def lost(self, size: int, now: float) -> None:
        self.flight -= size
        if now >= self.recovered:
            self.before, self.window = self.window, max(self.window * BETA, 2 * SEGMENT)
            self.threshold, self.epoch, self.recovered = self.window, None, now + self.smoothed


class _NoBind:
    def watch_waits(self, descriptor: int, on: bool) -> None:
        pass


@dataclass
class World:
    """``seals`` and ``opens``: bytes a second."""

    flows: int
    seals: float
    opens: float
    ours: bool = True
    now: float = 0.0
    delivered: int = 0
    drops: int = 0
    trips: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._due: list[tuple[float, int, Callable[..., None], Parcel | None]] = []
        self._numbers = itertools.count()
        self._connections = [Connection() for _ in range(self.flows)]
        self._fair: FlowQueue[Parcel] = FlowQueue(lambda parcel, full: self._drop(parcel))
        self._plain: deque[Parcel] = deque()
        self._socket: deque[tuple[Parcel, float]] = deque()
        self._queued = 0
        self._arrivals = Arrivals(_NoBind())  # type: ignore[arg-type]
        self._arrivals.behind(1)
        self._sealing = self._opening = False

    def run(self, seconds: float, echoes_from: float) -> None:
        for flow in range(self.flows):
            self._at(0.001 * flow, self._begin, Parcel(flow, 0, 0))
        self._at(echoes_from, self._echo, None)
        while self._due and self._due[0][0] <= seconds:
            self.now, _, action, parcel = heapq.heappop(self._due)
            action(parcel)

    def _at(self, when: float, action: Callable[..., None], parcel: Parcel | None) -> None:
        heapq.heappush(self._due, (when, next(self._numbers), action, parcel))

    def _begin(self, parcel: Parcel) -> None:
        connection = self._connections[parcel.flow]
        while connection.flight + BIG <= min(max(connection.window, BIG), WINDOW):
            connection.flight += BIG
            self._wait(Parcel(parcel.flow, BIG, self.now))

    def _echo(self, _: None) -> None:
        self._wait(Parcel(-1, 140, self.now))
        self._at(self.now + 0.01, self._echo, None)

    def _wait(self, parcel: Parcel) -> None:
        if self.ours:
            self._fair.put(bytes([parcel.flow + 1]), parcel, parcel.size, self.now)
        else:
            self._plain.append(parcel)
        if not self._sealing:
            self._seal()

    def _seal(self) -> None:
        if self.ours:
            waiting = self._fair.take(self.now)
            parcel = waiting.packet if waiting else None
        else:
            parcel = self._plain.popleft() if self._plain else None
        self._sealing = parcel is not None
        if parcel is not None:
            self._at(self.now + parcel.size / self.seals + 1e-6, self._sealed, parcel)

    def _sealed(self, parcel: Parcel) -> None:
        if self._queued + parcel.size > SOCKET:
            self._drop(parcel)
        else:
            self._socket.append((parcel, self.now))
            self._queued += parcel.size
            if not self._opening:
                self._open()
        self._seal()

    def _open(self) -> None:
        self._opening = bool(self._socket)
        if not self._socket:
            return
        parcel, since = self._socket.popleft()
        self._queued -= parcel.size
        received = Received(memoryview(b""), parcel.size, 1472, ALICE, 0, max(self.now - since, 1e-9))
        if self.ours:
            self._arrivals.look(1, received, self.now)
        done = self._refused if received.ecn else self._opened
        self._at(self.now + parcel.size / self.opens + 1e-6, done, parcel)

    def _refused(self, parcel: Parcel) -> None:
        self._drop(parcel)
        self._open()

    def _opened(self, parcel: Parcel) -> None:
        if parcel.flow < 0:
            self.trips.append(self.now - parcel.sent)
        else:
            self.delivered += parcel.size
            self._at(self.now + ROUND_TRIP, self._acked, parcel)
        self._open()

    def _acked(self, parcel: Parcel) -> None:
        self._connections[parcel.flow].acked(parcel.size, self.now - parcel.sent, self.now)
        self._begin(parcel)

    def _drop(self, parcel: Parcel) -> None:
        self.drops += 1
        if parcel.flow >= 0:
            self._at(self.now + ROUND_TRIP, self._lost, parcel)

    def _lost(self, parcel: Parcel) -> None:
        self._connections[parcel.flow].lost(parcel.size, self.now)
        self._begin(parcel)


def p99(trips: list[float]) -> float:
    return sorted(trips)[int(len(trips) * 0.99)]


@pytest.mark.parametrize("flows", [1, 4])
@pytest.mark.parametrize(("seals", "opens"), [(400e6, 200e6), (200e6, 400e6), (210e6, 200e6)])
def test_an_echo_beside_full_connections_is_quick_and_they_lose_nothing_by_it(
    flows: int, seals: float, opens: float
) -> None:
    """One end is always the slower one, so without us its queue is as long as all windows together."""
    before, after = (World(flows, seals, opens, ours=ours) for ours in (False, True))
    for world in (before, after):
        world.run(1.5, echoes_from=0.4)
    slower = min(seals, opens)
    assert p99(before.trips) > 0.012
    assert p99(after.trips) < 0.004
    assert after.delivered > 0.97 * 1.5 * slower
    assert after.drops < 100
    assert len(after.trips) >= 109


def test_where_nothing_waits_nothing_is_dropped() -> None:
    """Each window of a narrow connection passes in a fraction of the target."""
    world = World(1, 3e9, 3e9)
    world.run(0.3, echoes_from=0.05)
    assert world.drops == 0
