"""Who gets which keys: no two processes ever get the sending key of one lane and epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qvpn.dataplane.plane import Plane
from qvpn.lanes.lanes import LanedPlane, Lanes
from qvpn.lanes.messages import Endpoint, Erase, Hold, Install, LaneTraffic, Message, PeerSetup, Report, Usable
from qvpn.netio.base import Address
from qvpn.netio.errors import TunError
from qvpn.netio.memory import MemoryNetwork, MemoryTun
from qvpn.tunnel.keys import EpochKeys
from tests.unit.dataplane.support import ALICE, BOB, FROM_BOB, Recorder, epoch_pair, networks


class Queue:
    """A TUN queue that remembers how it stands."""

    def __init__(self) -> None:
        self.attached = False
        self.broken = False

    def attach(self) -> None:
        if self.broken:
            raise TunError("it is gone")
        self.attached = True

    def detach(self) -> None:
        self.attached = False

    def close(self) -> None: ...


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def _line(self, event: str, **_: object) -> None:
        self.lines.append(event)

    info = warning = error = _line


class Site:
    """Lanes whose processes are played by the test."""

    def __init__(self, count: int = 3) -> None:
        network = MemoryNetwork(0)
        self.plane = Plane(MemoryTun(), network.bind(ALICE), lambda: network.now, Recorder())
        self.plane.add_peer("bob", networks(FROM_BOB), overlap=10.0)
        self.queues = {number: Queue() for number in range(1, count)}
        kits: Any = [
            SimpleNamespace(number=number, port=51840 + number, queue=queue, close=lambda: None)
            for number, queue in self.queues.items()
        ]
        self.wanted: list[str] = []
        self.limits: list[tuple[str, int]] = []
        self.lanes = Lanes(
            kits,
            [PeerSetup("bob", tuple(networks(FROM_BOB)), 10.0, 10.0)],
            self.plane,
            Log(),
            want_epoch=self.wanted.append,
            limit=lambda peer, index: self.limits.append((peer, index)),
        )
        self.laned = LanedPlane(self.plane, self.lanes)
        self.generation = dict.fromkeys(self.queues, 0)
        self.told: list[tuple[int, int, Message]] = []
        for number, keeper in self.lanes._keepers.items():
            keeper.tell = lambda message, number=number: self.told.append(  # type: ignore[method-assign,misc]
                (number, self.generation[number], message)
            )

    def report(self, number: int, **traffic: Any) -> None:
        keeper = self.lanes._keepers[number]
        keeper.up = True
        limits = traffic.pop("limits", ())
        keeper.report = Report({"bob": LaneTraffic(**traffic)}, {"no_route": 1}, {"EPERM": 1}, limits)
        self.lanes._changed(keeper)

    def die(self, number: int) -> None:
        keeper = self.lanes._keepers[number]
        keeper.up = False
        self.lanes._changed(keeper)
        self.generation[number] += 1

    def installs(self) -> list[tuple[int, int, Install]]:
        return [(number, life, message) for number, life, message in self.told if isinstance(message, Install)]


def keys(number: int, lanes: int = 3) -> EpochKeys:
    from dataclasses import replace

    return replace(epoch_pair(number)[0], lanes=lanes)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("epoch"), st.integers(1, 4)),
        st.tuples(st.just("up"), st.integers(1, 2)),
        st.tuples(st.just("die"), st.integers(1, 2)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_no_two_processes_get_a_key(events: list[tuple[str, int]]) -> None:
    site, number, up = Site(), 0, set()
    for kind, value in events:
        if kind == "epoch":
            number += 1
            if number > 8:
                site.laned.erase_all("bob")
            site.laned.install("bob", keys(number, lanes=value))
        elif kind == "up":
            site.report(value)
            up.add(value)
        elif value in up:
            site.die(value)
            up.discard(value)
    owners: dict[bytes, tuple[int, int]] = {}
    for lane, life, install in site.installs():
        assert install.receive_index & 0xF == install.send_index & 0xF == lane
        for key in (install.send_key, install.receive_key):
            assert owners.setdefault(key, (lane, life)) == (lane, life)
    assert len(owners) == 2 * len(site.installs()), "a key was given twice"


def test_a_process_that_comes_back_waits_for_a_new_epoch_which_is_asked_for() -> None:
    site = Site()
    site.report(1)
    site.report(2)
    site.laned.install("bob", keys(1))
    assert site.wanted == []
    site.die(1)
    site.report(1)
    assert site.wanted == ["bob"]
    assert [(lane, life) for lane, life, _ in site.installs()] == [(1, 0), (2, 0)]
    site.laned.install("bob", keys(2))
    assert [(lane, life) for lane, life, _ in site.installs()][2:] == [(1, 1), (2, 0)]
    site.report(1)
    assert site.wanted == ["bob"]


def test_lanes_that_the_peer_has_not_get_nothing() -> None:
    site = Site(4)
    for number in (1, 2, 3):
        site.report(number)
    site.laned.install("bob", keys(1, lanes=2))
    assert [lane for lane, _, _ in site.installs()] == [1]
    site.die(3)
    site.report(3)
    assert site.wanted == []


def test_what_control_says_reaches_every_process_that_is_there() -> None:
    site = Site()
    site.report(1)
    epoch = keys(1)
    site.laned.set_endpoint("bob", BOB)
    site.laned.install("bob", epoch)
    site.lanes.usable("bob", epoch.receive_index)
    site.laned.hold("bob", epoch.receive_index)
    site.laned.erase("bob", epoch.receive_index)
    site.laned.erase_all("bob")
    assert [type(message) for _, _, message in site.told] == [Endpoint, Install, Usable, Hold, Erase, Erase]
    assert site.told[0][2] == Endpoint("bob", Address(BOB.ip, BOB.port + 1))
    assert [message.receive_index for _, _, message in site.told[2:]] == [  # type: ignore[union-attr]
        *[epoch.receive_index | 1] * 3,
        None,
    ]
    assert site.plane.stats("bob").epochs == ()


def test_a_queue_gets_packets_only_while_its_lane_can_send() -> None:
    site = Site()
    site.report(1)
    assert not site.queues[1].attached
    site.report(1, up=True)
    assert site.queues[1].attached and not site.queues[2].attached
    site.report(1, up=False)
    assert not site.queues[1].attached
    site.report(1, up=True)
    site.die(1)
    assert not site.queues[1].attached
    site.queues[1].broken = True
    site.report(1, up=True)
    assert [state.attached for state in site.lanes.states()] == [False, False]


def test_counters_never_fall_when_a_process_dies() -> None:
    site = Site()
    site.report(1, sent_packets=5, opened=7, drops={"replay": 2}, up=True, endpoint="somewhere")
    site.report(2, sent_packets=1)
    site.die(1)
    assert site.lanes.traffic("bob")[1] == LaneTraffic(sent_packets=5, opened=7, drops={"replay": 2})
    site.report(1, sent_packets=2, drops={"replay": 1, "limit": 1})
    traffic = site.lanes.traffic("bob")
    assert traffic[1].sent_packets == 7 and traffic[1].opened == 7
    assert traffic[1].drops == {"replay": 3, "limit": 1}
    assert traffic[2].sent_packets == 1
    assert site.lanes.drops == {"no_route": 3} and site.lanes.send_errors == {"EPERM": 3}


def test_a_limit_is_told_of_the_epoch_and_not_of_the_lane() -> None:
    site = Site()
    site.report(2, limits=(("bob", 0x1232),))
    assert site.limits == [("bob", 0x1230)]
