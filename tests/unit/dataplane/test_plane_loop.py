"""A plane in a real event loop: descriptors are watched, follow the sockets, and the timer erases keys by itself."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from qvpn.dataplane.loop import PacketLoop
from qvpn.dataplane.plane import Plane
from qvpn.netio.base import Address
from qvpn.netio.udp import UdpBind
from tests.unit.dataplane.segments import Big, finish
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, Recorder, epoch_pair, networks, numbered


class SocketTun:
    """A TUN with a descriptor but without root: the kernel's end is the other half of a socket pair."""

    name = "pair0"
    mtu = 1400
    merges_udp = False

    def __init__(self) -> None:
        self._ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ours.setblocking(False)
        self.kernel.setblocking(False)
        self.gone = False

    def read_batch(self, arena: memoryview, limit: int) -> list[tuple[int, int]]:
        try:
            return [(0, self._ours.recv_into(arena))]
        except BlockingIOError:
            return []

    def write_batch(self, packets: Sequence[memoryview]) -> int:
        return sum(bool(self._ours.send(packet)) for packet in packets)

    def fileno(self) -> int:
        return -1 if self.gone else self._ours.fileno()

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        pass

    def close(self) -> None:
        self._ours.close()
        self.kernel.close()


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.005)


class LoopSite:
    def __init__(self, peer: str, prefixes: dict[int, str]) -> None:
        self.tun = SocketTun()
        self.bind = UdpBind(Address(ipaddress.ip_address("127.0.0.1"), 0))
        self.hooks = Recorder()
        self.plane = Plane(self.tun, self.bind, time.monotonic, self.hooks)
        self.plane.add_peer(peer, networks(prefixes), overlap=0.2)
        self.plane.start()

    def received(self) -> bytes | None:
        try:
            return self.tun.kernel.recv(70_000)
        except BlockingIOError:
            return None

    def close(self) -> None:
        self.plane.close()
        self.bind.close()
        self.tun.close()


Sites = tuple[LoopSite, LoopSite]


@pytest.fixture
async def sites() -> AsyncIterator[Sites]:
    alice, bob = LoopSite("bob", FROM_BOB), LoopSite("alice", FROM_ALICE)
    alice.plane.set_endpoint("bob", bob.bind.local)
    bob.plane.set_endpoint("alice", alice.bind.local)
    yield alice, bob
    alice.close()
    bob.close()


def install(sites: Sites, number: int = 1, life: float = 60.0) -> None:
    initiator, responder = epoch_pair(number, hard_end=time.monotonic() + life)
    sites[1].plane.install("alice", responder)
    sites[0].plane.install("bob", initiator)


async def passes(sender: LoopSite, receiver: LoopSite, packet: bytes) -> None:
    sender.tun.kernel.send(packet)
    got: list[bytes] = []

    def arrived() -> bool:
        data = receiver.received()
        if data is not None:
            got.append(data)
        return bool(got)

    await until(arrived)
    assert got == [packet]


async def test_packets_both_ways(sites: Sites) -> None:
    install(sites)
    alice, bob = sites
    await passes(alice, bob, numbered(1, FROM_ALICE[4], FROM_BOB[4]))
    await passes(bob, alice, numbered(2, FROM_BOB[6], FROM_ALICE[6]))


async def overflow(sites: Sites) -> None:
    """More superpackets than one turn takes, in one piece: no descriptor tells of those that were read ahead."""
    install(sites)
    alice, bob = sites
    count = 60
    packets = [
        Big(FROM_ALICE[4], FROM_BOB[4], number.to_bytes(2, "big") * 500, 100).virtio() for number in range(count)
    ]
    alice.plane._pause = float("inf")  # whatever else runs here, no turn is taken for the one after a pause
    for packet in packets:
        alice.tun.kernel.send(packet)
    got: list[bytes] = []

    def arrived() -> bool:
        while (data := bob.received()) is not None:
            got.append(data)
        return len(got) >= count

    await until(arrived)
    assert [piece for packet in got for piece in finish(packet)] == [p for packet in packets for p in finish(packet)]
    assert alice.plane.queues.longest > 0
    assert alice.plane.queues.packets == 0


async def test_what_one_turn_cannot_take_goes_on_by_itself(sites: Sites) -> None:
    await overflow(sites)


def test_and_so_it_does_in_the_packet_loop() -> None:
    async def main() -> None:
        alice, bob = LoopSite("bob", FROM_BOB), LoopSite("alice", FROM_ALICE)
        alice.plane.set_endpoint("bob", bob.bind.local)
        bob.plane.set_endpoint("alice", alice.bind.local)
        try:
            await overflow((alice, bob))
        finally:
            alice.close()
            bob.close()

    with asyncio.Runner(loop_factory=PacketLoop) as runner:
        runner.run(main())


async def test_closing_in_the_middle_of_a_backlog_ends_it(sites: Sites) -> None:
    install(sites)
    alice, _ = sites
    for number in range(60):
        alice.tun.kernel.send(Big(FROM_ALICE[4], FROM_BOB[4], number.to_bytes(2, "big") * 500, 100).virtio())
    alice.plane._pause = float("inf")
    alice.plane._on_tun()
    assert alice.plane.queues.packets > 0
    alice.plane.close()
    left = alice.plane.queues.packets
    await asyncio.sleep(0.05)
    assert alice.plane.queues.packets == left


async def test_keys_are_erased_at_the_hard_end_without_any_traffic(sites: Sites) -> None:
    install(sites, life=0.3)
    install(sites, number=2, life=60.0)
    start = time.monotonic()
    await until(lambda: len(sites[0].plane.stats("bob").epochs) == 1)
    assert time.monotonic() - start >= 0.25
    assert sites[0].plane.stats("bob").epochs[0].number == 2


async def test_descriptors_follow_the_endpoint(sites: Sites) -> None:
    """Alice moves to another socket; Bob's connected socket is replaced, and everything still arrives."""
    alice, bob = sites
    install(sites)
    await passes(alice, bob, numbered(1, FROM_ALICE[4], FROM_BOB[4]))
    moved = UdpBind(Address(ipaddress.ip_address("127.0.0.1"), 0))
    bob.plane.set_endpoint("alice", moved.local)
    assert len(bob.bind.filenos()) == 2
    await passes(alice, bob, numbered(2, FROM_ALICE[4], FROM_BOB[4]))
    assert bob.hooks.addresses[0][2] == alice.bind.local
    bob.plane.set_endpoint("alice", alice.bind.local)
    await passes(bob, alice, numbered(3, FROM_BOB[4], FROM_ALICE[4]))
    moved.close()


async def test_a_peer_that_is_not_there_hurts_nobody(sites: Sites) -> None:
    """ECONNREFUSED comes back for every datagram; the other peer's traffic goes on."""
    alice, bob = sites
    install(sites)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    alice.plane.add_peer("carol", networks({4: "10.90.0.3"}), overlap=1.0)
    alice.plane.install("carol", epoch_pair(9, hard_end=time.monotonic() + 60)[0])
    alice.plane.set_endpoint("carol", Address(ipaddress.ip_address("127.0.0.1"), port))
    for number in range(5):
        alice.tun.kernel.send(numbered(number, FROM_ALICE[4], "10.90.0.3"))
        await passes(alice, bob, numbered(number, FROM_ALICE[4], FROM_BOB[4]))
    await until(lambda: "ECONNREFUSED" in alice.bind.errors)
    await passes(bob, alice, numbered(7, FROM_BOB[4], FROM_ALICE[4]))


async def test_a_tun_that_is_gone_is_no_longer_watched(sites: Sites) -> None:
    alice, bob = sites
    install(sites)
    alice.plane.send_control("bob", b"\x04")
    await until(lambda: bob.hooks.firsts)
    alice.tun.gone = True
    alice.tun.read_batch = lambda arena, limit: []  # type: ignore[method-assign]
    alice.tun.kernel.send(b"never read")
    await until(lambda: len(alice.plane._watched) == len(alice.bind.filenos()))
    bob.plane.send_control("alice", b"still there")
    await until(lambda: alice.hooks.controls)


async def test_close_leaves_no_reader_and_no_key(sites: Sites) -> None:
    alice, bob = sites
    install(sites)
    alice.close()
    assert alice.plane._watched == set()
    assert alice.plane.stats("bob").epochs == ()
    bob.plane.send_control("alice", b"x")
    await asyncio.sleep(0.02)
    assert alice.hooks.controls == []


async def test_a_tun_that_is_gone_is_told_once(sites: tuple[LoopSite, LoopSite]) -> None:
    alice, _ = sites
    await asyncio.sleep(0)
    assert alice.hooks.tun_gone == 0
    alice.tun.gone = True
    alice.tun.kernel.send(b"wakes the reader")
    await until(lambda: alice.hooks.tun_gone)
    alice.plane._check_tun()
    assert alice.hooks.tun_gone == 1
