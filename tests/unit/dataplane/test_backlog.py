"""What a TUN holds that one turn cannot empty: read ahead, in fair order, and nothing of it changed."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator

import pytest

from qvpn.dataplane import arrivals, backlog, outbound
from qvpn.dataplane.arrivals import BULK, Arrivals
from qvpn.dataplane.outbound import SUPERPACKETS
from qvpn.lanes.relay import RelayInlet, RelayOutlet, relay_pair
from qvpn.netio.base import MAX_READ, Address, Received
from qvpn.netio.memory import MemoryBind
from qvpn.netio.udp import UdpBind
from qvpn.tunnel import ecn
from qvpn.tunnel.drops import DropReason, Drops
from tests.unit.dataplane.segments import Big, checksum, finish
from tests.unit.dataplane.support import ALICE, FROM_ALICE, FROM_BOB, PLAIN, Pair, numbered

CE = 3
PAYLOAD, CHUNKS = 1000, 40


def superpacket(number: int, port: int = 4000, bits: int = 0, version: int = 4) -> bytes:
    return Big(
        FROM_ALICE[version],
        FROM_BOB[version],
        number.to_bytes(2, "big") * (PAYLOAD * CHUNKS // 2),
        PAYLOAD,
        traffic_class=bits,
        source_port=port,
    ).virtio()


def number_of(written: bytes) -> int:
    return int.from_bytes(written[-2:], "big")


class SlowPair(Pair):
    """Alice's turns are made by hand, so what a turn leaves is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.established()
        self.bob.tun.taken.clear()
        self.alice.tun.on_readable(None)
        self.now = 100.0

    def turn(self) -> int:
        count = self.alice.plane._outbound.pump(self.now)
        self.run()
        return count

    @property
    def backlog(self) -> backlog.Backlog:
        return self.alice.plane._outbound.backlog

    def arrived(self) -> list[bytes]:
        taken, self.bob.tun.taken = self.bob.tun.taken, []
        return taken


def test_what_one_turn_takes_never_waits() -> None:
    pair = SlowPair()
    pair.alice.tun.inject([superpacket(number) for number in range(SUPERPACKETS - 1)])
    assert pair.turn() == SUPERPACKETS - 1
    assert len(pair.backlog) == 0
    assert pair.alice.plane.queues.longest == 0.0


def test_what_is_left_is_read_ahead_and_arrives_as_it_was_in_its_order() -> None:
    pair = SlowPair()
    packets = [superpacket(number, version=4 + 2 * (number & 1)) for number in range(30)]
    pair.alice.tun.inject(packets)
    pair.turn()
    assert len(pair.backlog) == 30 - SUPERPACKETS
    assert pair.alice.plane.queues.packets == 30 - SUPERPACKETS
    assert pair.alice.tun.read_batch(memoryview(bytearray(1 << 17)), 1) == []
    turns = 1
    while pair.backlog:
        pair.turn()
        turns += 1
    assert turns == 4
    arrived = pair.arrived()
    for version in (4, 6):
        mine = [packet for packet in packets if packet[10] >> 4 == version]
        sent = [piece for packet in mine for piece in finish(packet)]
        got = [piece for packet in arrived if packet[10] >> 4 == version for piece in finish(packet)]
        assert got == sent
    assert pair.drops() == {}


def test_an_echo_request_overtakes_a_transfer_but_no_packet_of_its_own_flow_does() -> None:
    pair = SlowPair()
    pair.alice.tun.inject([superpacket(number) for number in range(40)])
    pair.turn()
    pair.arrived()
    short = PLAIN + finish(superpacket(99))[0]  # one plain packet of the transfer, as its last one may be
    pair.alice.tun.inject([short, numbered(7, FROM_ALICE[4], FROM_BOB[4])])
    pair.turn()
    arrived = pair.arrived()
    echo = next(place for place, packet in enumerate(arrived) if packet[19] == 253)
    assert echo <= CHUNKS  # at first the transfer is as new a flow as the echo
    while pair.backlog:
        pair.turn()
    assert number_of(pair.arrived()[-1]) == 99
    assert pair.drops() == {}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("bits", [0, 2])
def test_a_transfer_that_stands_too_long_is_marked_or_loses_a_superpacket(bits: int, version: int) -> None:
    """20 superpackets behind, 8 a turn of 10 ms: each waits 20 ms and more."""
    pair, number = SlowPair(), 0
    for _ in range(24):
        while len(pair.backlog) < 20 or number < 20:
            pair.alice.tun.inject([superpacket(number, bits=bits, version=version)])
            pair.backlog.fill(pair.now)
            number += 1
        pair.now += 0.010
        pair.turn()
    arrived = pair.arrived()
    second = 11  # the byte of the IP header that has the bits
    marked = len(
        {number_of(packet) for packet in arrived if (packet[second] >> (0 if version == 4 else 4)) & 3 == CE}
    )
    drops = pair.drops()
    if bits:
        assert marked == pair.alice.plane.queues.marked >= 2
        assert drops == {}
        assert all(checksum(packet[10:30]) == 0 for packet in arrived if version == 4)
    else:
        assert marked == 0
        assert drops[DropReason.SEND_QUEUE] >= 2 * CHUNKS
        assert drops[DropReason.SEND_QUEUE] % CHUNKS == 0
        gone = set(range(number)) - {number_of(packet) for packet in arrived}
        assert len(gone) - len(pair.backlog) == drops[DropReason.SEND_QUEUE] // CHUNKS
    assert 0.01 <= pair.alice.plane.queues.longest < 0.1


def test_a_flood_is_bounded_and_the_drops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = SlowPair()
    pair.backlog.queue._max_bytes = 1_000_000
    for number in range(200):
        pair.alice.tun.inject([superpacket(number)])
    while pair.alice.tun._queue:
        pair.backlog.fill(pair.now)
    kept = len(pair.backlog)
    assert kept == 1_000_000 // len(superpacket(0))
    assert pair.drops() == {DropReason.QUEUE_FULL: (200 - kept) * CHUNKS}
    while pair.backlog:
        pair.turn()
    assert list(dict.fromkeys(number_of(packet) for packet in pair.arrived())) == list(range(200 - kept, 200))
    assert len(pair.backlog._free) <= backlog.KEPT


def test_of_frames_that_come_in_one_read_none_is_lost() -> None:
    """As from a lane, which hands over several in one datagram (:mod:`qvpn.lanes.relay`)."""
    ours, theirs = relay_pair()
    inlet, outlet = RelayInlet(ours, "lane 1"), RelayOutlet(theirs)
    packets = [numbered(number, FROM_ALICE[4], FROM_BOB[4]) for number in range(12)]
    waits = backlog.Backlog(inlet, Drops())
    assert all(outlet(memoryview(b"".join(packets[first : first + 4]))) for first in (0, 4, 8))
    waits.fill(1.0)
    arena = memoryview(bytearray(4 * MAX_READ))
    found = [bytes(arena[at : at + size]) for at, size in waits.read_batch(arena, 64, 1.0)]
    theirs.close()
    inlet.close()
    assert sorted(found) == sorted(packets)


def test_rubbish_in_the_backlog_is_counted_and_harms_nobody() -> None:
    pair = SlowPair()
    rubbish = [bytes(12), bytes(29), bytes(10) + b"\x45" + bytes(40), bytes(10) + b"\x60" + bytes(25), bytes(9)]
    big = bytearray(superpacket(5))
    big[10] = 0x4F  # a header that is longer than it says
    pair.alice.tun.inject([superpacket(number) for number in range(20)])
    pair.turn()
    pair.alice.tun.inject([*rubbish[:4], bytes(big), superpacket(20)])
    while pair.backlog:
        pair.turn()
    assert {number_of(packet) for packet in pair.arrived()} >= set(range(21))
    assert pair.drops()[DropReason.MALFORMED] >= 4


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (superpacket(1), superpacket(2), True),
        (superpacket(1), superpacket(1, port=4001), False),
        (superpacket(1, version=6), superpacket(1, version=6, port=4001), False),
        (superpacket(1), numbered(1, FROM_ALICE[4], FROM_BOB[4]), False),
        (numbered(1, FROM_ALICE[6], FROM_BOB[6]), numbered(2, FROM_ALICE[6], FROM_BOB[6]), True),
    ],
)
def test_packets_of_one_flow_have_one_key(one: bytes, other: bytes, same: bool) -> None:
    keys = {backlog.flow_key(memoryview(packet), 10, len(packet)) for packet in (one, other)}
    assert (len(keys) == 1) is same


def test_the_queue_costs_one_copy_and_no_read_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per superpacket: one read, one put, one take; none is parsed or looked up twice."""
    pair = SlowPair()
    reads = 0
    original = pair.alice.tun.read_batch

    def counted(arena: memoryview, limit: int) -> list[tuple[int, int]]:
        nonlocal reads
        reads += 1
        return original(arena, limit)

    monkeypatch.setattr(pair.alice.tun, "read_batch", counted)
    pair.alice.tun.inject([superpacket(number) for number in range(40)])
    while pair.turn() or pair.backlog:
        pass
    turns = 5
    assert reads <= 40 + 2 * turns
    assert outbound.SUPERPACKETS == 8


# the receiving end


class WatchedBind(MemoryBind):
    def __init__(self) -> None:
        self.watched: dict[int, bool] = {}

    def watch_waits(self, descriptor: int, on: bool) -> None:
        self.watched[descriptor] = on


def received(waited: float, length: int = 40_000) -> Received:
    return Received(memoryview(bytes(length)), length, 1000, ALICE, 0, waited)


def test_a_socket_is_watched_while_turns_do_not_empty_it() -> None:
    bind = WatchedBind()
    watch = Arrivals(bind)
    watch.behind(5)
    watch.settle()
    assert bind.watched == {5: True}
    watch.settle()
    assert bind.watched == {5: False}


def test_only_bulk_is_chosen_and_only_after_an_interval_of_waiting() -> None:
    watch = Arrivals(WatchedBind())
    watch.behind(5)
    now, chosen = 0.0, []
    while now < 1.0:
        for each in (received(0.01, 100), received(0.01, 40_000)):
            watch.look(5, each, now)
            if each.ecn:
                chosen.append((now, each.length, each.ecn))
        now += 0.001
    assert chosen[0][0] == pytest.approx(arrivals.INTERVAL, abs=0.002)
    assert {length for _, length, _ in chosen} == {40_000}
    assert {mark for _, _, mark in chosen} == {ecn.WAITED}
    assert watch.marked == len(chosen)
    assert watch.longest == 0.01
    assert BULK < 40_000


def test_waits_that_fall_below_the_target_once_in_an_interval_choose_nothing() -> None:
    watch = Arrivals(WatchedBind())
    watch.behind(5)
    for step in range(2000):
        watch.look(5, received(0.0005 if step % 30 == 0 else 0.02), step * 0.001)
    assert watch.marked == 0


def test_a_socket_that_is_emptied_has_no_standing_queue_however_long_its_datagrams_waited() -> None:
    """A process that gets the processor every 20 ms finds all of them old, and takes all of them."""
    watch = Arrivals(WatchedBind())
    watch.behind(5)
    for turn in range(100):
        for place in range(10):
            watch.look(5, received(0.02), turn * 0.02 + place * 0.0001)
        watch.emptied(5)
    assert watch.marked == 0


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("version", [4, 6])
def test_what_waited_is_marked_inside_or_dropped(bits: int, version: int) -> None:
    """The receiver acts as the last router of the path."""
    pair = Pair()
    pair.established()
    pair.bob.tun.taken.clear()
    original = pair.bob.bind.receive_batch

    def late(limit: int, descriptor: int = -1) -> list[Received]:
        batch = original(limit, descriptor)
        for each in batch:
            each.ecn = ecn.WAITED
        return batch

    pair.bob.bind.receive_batch = late  # type: ignore[method-assign]
    pair.alice.tun.inject([superpacket(1, bits=bits, version=version)])
    pair.run()
    if bits:
        (written,) = {packet[11] >> (0 if version == 4 else 4) & 3 for packet in pair.bob.tun.taken}
        assert written == CE
        assert pair.drops() == {}
    else:
        assert pair.bob.tun.taken == []
        assert pair.drops() == {DropReason.RECEIVE_QUEUE: CHUNKS}


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("waited", [(False, True), (True, False), (True, True)])
def test_a_superpacket_of_two_receives_of_which_one_waited(bits: int, waited: tuple[bool, bool]) -> None:
    """Each half is whole in itself: lost, or marked, as its own receive says."""
    pair = Pair()
    pair.established()
    pair.bob.tun.taken.clear()
    sent: list[bytes] = []
    pair.alice.bind.send_segments = (  # type: ignore[method-assign]
        lambda buffer, segment, address, ecn=0: sent.append(bytes(buffer)) or CHUNKS  # type: ignore[func-returns-value]
    )
    whole = superpacket(1, bits=bits)
    pair.alice.tun.inject([whole])
    (records,) = sent
    size = len(records) // CHUNKS
    for half, late in zip((records[: size * CHUNKS // 2], records[size * CHUNKS // 2 :]), waited, strict=True):
        mark = ecn.WAITED if late else bits
        pair.bob.plane._inbound.process(Received(memoryview(half), len(half), size, ALICE, mark), 1.0)
    pair.bob.plane._inbound.flush()
    got = [piece for packet in pair.bob.tun.taken for piece in finish(packet)]
    wanted = finish(whole)
    halves = zip((wanted[: CHUNKS // 2], wanted[CHUNKS // 2 :]), waited, strict=True)
    if bits:
        assert [piece[20:] for piece in got] == [piece[20:] for piece in wanted]
        assert [piece[1] & 3 for piece in got] == [CE if late else bits for half, late in halves for _ in half]
        assert pair.drops() == {}
    else:
        assert got == [piece for half, late in halves if not late for piece in half]
        assert pair.drops() == {DropReason.RECEIVE_QUEUE: sum(waited) * CHUNKS // 2}


@pytest.mark.parametrize("bits", [0, 2])
def test_of_many_small_packets_that_waited_one_is_chosen(bits: int) -> None:
    pair = Pair()
    pair.established()
    pair.bob.tun.taken.clear()
    original = pair.bob.bind.receive_batch

    def late(limit: int, descriptor: int = -1) -> list[Received]:
        batch = original(limit, descriptor)
        for each in batch:
            each.ecn = ecn.WAITED
        return batch

    pair.bob.bind.receive_batch = late  # type: ignore[method-assign]
    packets = [bytearray(numbered(number, FROM_ALICE[6], FROM_BOB[6])) for number in range(10)]
    for packet in packets:
        packet[11] |= bits << 4
    pair.alice.tun.inject([bytes(packet) for packet in packets])  # one record has them all
    pair.run()
    if bits:
        assert [packet[11] >> 4 & 3 for packet in pair.bob.tun.taken] == [CE, *[bits] * 9]
        assert pair.drops() == {}
    else:
        assert pair.bob.tun.taken == [bytes(packet) for packet in packets[1:]]
        assert pair.drops() == {DropReason.RECEIVE_QUEUE: 1}


@pytest.fixture
def udp() -> Iterator[tuple[UdpBind, socket.socket]]:
    bind = UdpBind(Address(ipaddress.ip_address("127.0.0.1"), 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", bind.local.port))
        yield bind, sender
    bind.close()


def test_a_socket_tells_how_long_a_datagram_waited_when_asked(udp: tuple[UdpBind, socket.socket]) -> None:
    bind, sender = udp
    (descriptor,) = bind.filenos()
    sender.send(b"before")
    assert bind.receive_batch(1, descriptor)[0].waited == 0
    bind.watch_waits(descriptor, True)
    deadline = time.monotonic() + 5
    waited = 0.0
    while waited < 0.02 and time.monotonic() < deadline:  # the kernel begins to stamp a little after it is told to
        sender.send(b"on")
        time.sleep(0.02)
        (got,) = bind.receive_batch(4, descriptor)
        assert (bytes(got.buffer[: got.length]), got.segment, got.ecn) == (b"on", 2, 0)
        waited = got.waited
    assert 0.02 <= waited < 5
    bind.watch_waits(descriptor, False)
    sender.send(b"after")
    assert bind.receive_batch(1, descriptor)[0].waited == 0


def test_the_stamp_comes_beside_the_length_of_joined_datagrams(udp: tuple[UdpBind, socket.socket]) -> None:
    bind, sender = udp
    (descriptor,) = bind.filenos()
    bind.watch_waits(descriptor, True)
    sender.setsockopt(socket.IPPROTO_UDP, 103, 1000)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 2)
    sender.send(bytes(20_500))
    (got,) = bind.receive_batch(1, descriptor)
    assert (got.length, got.segment, got.ecn) == (20_500, 1000, 2)
    assert got.waited > 0
