"""The packet paths of one lane at both ends, in memory and virtual time, told what a daemon would tell them."""

from __future__ import annotations

import random
import select
import socket
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpn.lanes.lanes import _install, lane_address
from qvpn.lanes.messages import Endpoint, Erase, Hold, PeerSetup, Report, Setup, Usable, decode
from qvpn.lanes.traffic import LaneTrafficPath
from qvpn.lanes.worker import LaneProcess
from qvpn.netio.memory import Impairments, MemoryNetwork, MemoryTun
from qvpn.tunnel.keys import EpochKeys
from tests.unit.dataplane.support import ALICE, BOB, FROM_ALICE, FROM_BOB, epoch_pair, networks, number_of, numbered

LANE = 2
OTHER = {"alice": "bob", "bob": "alice"}


class End:
    """One site's lane."""

    def __init__(self, network: MemoryNetwork, name: str, seed: int) -> None:
        self.name, self.network = name, network
        self.tun = MemoryTun()
        self.relayed: list[bytes] = []
        self.room = True
        own, allowed = (ALICE, FROM_BOB) if name == "alice" else (BOB, FROM_ALICE)
        address = lane_address(own, LANE)
        assert address is not None
        peer = PeerSetup(OTHER[name], tuple(networks(allowed)), 10.0, 10.0)
        self.bind = network.bind(address)
        self.path = LaneTrafficPath(
            Setup(LANE, (peer,)),
            self.tun,
            self.bind,
            self.relay,
            clock=lambda: network.now,
            random=random.Random(seed).randbytes,
        )
        self.path.plane.start()
        self.path.obey(Endpoint(OTHER[name], lane_address(BOB if name == "alice" else ALICE, LANE)))

    def relay(self, frames: memoryview) -> bool:
        if self.room:
            self.relayed.append(bytes(frames))
        return self.room

    def install(self, keys: EpochKeys) -> None:
        self.path.obey(_install(OTHER[self.name], keys, LANE))

    def usable(self, keys: EpochKeys) -> None:
        self.path.obey(Usable(OTHER[self.name], keys.receive_index | LANE))

    def traffic(self):  # type: ignore[no-untyped-def]
        return self.path.report().peers[OTHER[self.name]]


class Lane:
    """Both ends."""

    def __init__(self, seed: int = 0, impairments: Impairments | None = None) -> None:
        self.network = MemoryNetwork(seed, impairments)
        self.alice, self.bob = End(self.network, "alice", seed), End(self.network, "bob", seed + 1)
        self.sent = 0
        self._looked = 0.0

    def run(self, seconds: float, *, every: float | None = None) -> None:
        """Let time pass; with ``every`` both ends send a packet so often."""
        until = self.network.now + seconds
        while self.network.now < until - 1e-9:
            self.network.advance(min(self.network.now + (every or 0.05), until))
            for end in (self.alice, self.bob):
                end.path.look()
                if self.network.now - self._looked >= 1.0:
                    end.path.look_back()
                    end.path.plane.tick()
            if self.network.now - self._looked >= 1.0:
                self._looked = self.network.now
            if every is not None:
                self.send()

    def send(self) -> None:
        self.alice.tun.inject([numbered(self.sent, FROM_ALICE[4], FROM_BOB[4])])
        self.bob.tun.inject([numbered(self.sent, FROM_BOB[4], FROM_ALICE[4])])
        self.sent += 1

    def epoch(self, number: int = 1, *, late: float = 0.0, **settings: object) -> tuple[EpochKeys, EpochKeys]:
        """Alice is the initiator; Bob's process hears of the keys ``late`` seconds after hers."""
        initiator, responder = epoch_pair(number, **settings)  # type: ignore[arg-type]
        self.alice.install(initiator)
        self.run(late, every=0.02 if late else None)
        self.bob.install(responder)
        self.bob.usable(responder)
        return initiator, responder


def arrived(end: End) -> list[int]:
    return [number_of(packet) for packet in end.tun.taken]


def test_nothing_passes_without_a_key_and_lane_0_gets_it() -> None:
    lane = Lane()
    lane.run(0.5, every=0.1)
    assert arrived(lane.bob) == arrived(lane.alice) == []
    assert len(lane.alice.relayed) == len(lane.bob.relayed) == lane.sent
    lane.alice.room = False
    lane.send()
    assert lane.alice.traffic().drops == {"no_key": 1}


def test_both_ends_prove_the_lane_and_then_use_it() -> None:
    lane = Lane()
    lane.epoch()
    lane.run(0.2)
    assert lane.alice.path.report().peers["bob"].up and lane.bob.path.report().peers["alice"].up
    before = len(lane.alice.relayed), len(lane.bob.relayed)
    lane.run(0.5, every=0.05)
    lane.run(0.2)
    assert arrived(lane.bob) == arrived(lane.alice) == list(range(lane.sent)) and lane.sent >= 10
    assert (len(lane.alice.relayed), len(lane.bob.relayed)) == before


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), late=st.lists(st.floats(0.0, 1.5), min_size=1, max_size=4))
def test_a_rekey_loses_nothing_however_late_the_other_process_hears_of_it(seed: int, late: list[float]) -> None:
    """Every packet comes through on the lane, or is given to lane 0, once."""
    lane = Lane(seed, Impairments(delay=0.003))
    lane.epoch(hard_end=1e6)
    lane.run(1.0, every=0.02)
    for number, delay in enumerate(late, start=2):
        lane.epoch(number, late=delay, hard_end=1e6)
        lane.run(0.7, every=0.02)
    lane.run(1.0)
    for here, there in ((lane.alice, lane.bob), (lane.bob, lane.alice)):
        assert len(arrived(there)) == len(set(arrived(there)))
        assert len(arrived(there)) + len(here.relayed) == lane.sent
        assert len(arrived(there)) > lane.sent * 0.4
        assert here.traffic().drops == {}


def test_a_lane_whose_other_end_died_gives_its_packets_to_lane_0() -> None:
    lane = Lane()
    lane.epoch(hard_end=1e6)
    lane.run(1.0, every=0.1)
    lane.bob.path.plane.close()  # kill -9: its keys are gone, its port is open
    lane.run(6.0, every=0.1)
    before = len(lane.alice.relayed)
    assert not lane.alice.traffic().up
    lane.run(1.0, every=0.1)
    assert len(lane.alice.relayed) == before + 10


def test_hold_and_erase_end_the_sending() -> None:
    for message in (Hold, Erase):
        lane = Lane()
        initiator, _ = lane.epoch(hard_end=1e6)
        lane.run(1.0)
        assert lane.alice.traffic().up
        lane.alice.path.obey(message("bob", initiator.receive_index | LANE))
        before = len(lane.alice.relayed)
        lane.send()
        assert len(lane.alice.relayed) == before + 1
        assert not lane.alice.traffic().up
    lane.alice.path.obey(Erase("bob", None))
    assert lane.alice.path.plane.stats("bob").epochs == ()


def test_at_the_hard_end_nothing_leaves_and_nothing_comes_in() -> None:
    lane = Lane()
    lane.epoch(hard_end=5.0)
    lane.run(4.9, every=0.1)
    assert lane.alice.traffic().up and lane.alice.traffic().sent_packets > 40
    lane.run(0.2)
    before, came = lane.alice.traffic().sent_packets, len(arrived(lane.bob))
    lane.run(2.0, every=0.1)
    assert (lane.alice.traffic().sent_packets, len(arrived(lane.bob))) == (before, came)
    assert not lane.alice.traffic().up


def test_a_handshake_on_a_lanes_port_is_dropped_and_counted() -> None:
    lane = Lane()
    own = lane_address(ALICE, LANE)
    assert own is not None
    lane.bob.bind.send_batch([memoryview(b"\x01" + bytes(60))], own)
    lane.run(0.1)
    assert lane.alice.path.report().drops == {"handshake_state": 1}


def test_a_used_up_key_is_told_once() -> None:
    lane = Lane()
    lane.epoch()
    lane.alice.path.on_limit("bob", 0x12)
    assert lane.alice.path.report().limits == (("bob", 0x12),)
    assert lane.alice.path.report().limits == ()


def test_a_used_up_key_is_told_again_where_the_daemon_took_no_report() -> None:
    lane = Lane()
    lane.epoch()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        process = LaneProcess(theirs, lane.alice.path)
        with pytest.raises(BlockingIOError):
            while True:
                theirs.send(b"x")
        lane.alice.path.on_limit("bob", 0x12)
        process._report()
        while select.select([ours], [], [], 0)[0]:
            assert ours.recv(100) == b"x"
        process._report()
        said = decode(ours.recv(1 << 16))
    assert isinstance(said, Report) and said.limits == (("bob", 0x12),)


@pytest.mark.parametrize("port", [65_533, 65_535])
def test_a_lane_beyond_the_last_port_is_looked_for_nowhere(port: int) -> None:
    found = lane_address(replace(ALICE, port=port), LANE)
    assert (found is None) == (port + LANE > 65_535)
