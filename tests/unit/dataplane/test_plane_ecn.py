"""ECN from TUN to TUN: outer bits are the inner ones, a mark on the way comes out inside, one send per mark."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import replace

import pytest

from qvpn.netio.base import Received
from qvpn.netio.memory import Impairments
from qvpn.tunnel.drops import DropReason
from tests.unit.dataplane.segments import ACK, CWR, ECE, PSH, TCP, UDP, Big, checksum, finish
from tests.unit.dataplane.support import ALICE, FROM_ALICE, FROM_BOB, PLAIN, Pair

NOT_ECT, ECT_1, ECT_0, CE = range(4)


def packet(ecn: int, version: int = 4, number: int = 0, size: int = 40) -> bytes:
    """A plain packet with these bits and DSCP 46."""
    source, destination = (ipaddress.ip_address(end[version]) for end in (FROM_ALICE, FROM_BOB))
    payload = number.to_bytes(8, "big") * (size // 8)
    if version == 6:
        head = struct.pack(">IHBB", 6 << 28 | (0xB8 | ecn) << 20, len(payload), 253, 64)
        return PLAIN + head + source.packed + destination.packed + payload
    ends = source.packed + destination.packed
    head = struct.pack(">BBHHHBB", 0x45, 0xB8 | ecn, 20 + len(payload), 7, 0, 64, 253)
    return PLAIN + head + checksum(head + b"\0\0" + ends).to_bytes(2, "big") + ends + payload


def watch(pair: Pair) -> list[tuple[int, int]]:
    """(datagrams, ECN bits) of each of Alice's sends from now on."""
    sends: list[tuple[int, int]] = []
    original = pair.alice.bind.send_segments

    def counted(buffer: memoryview, segment: int, address: object, ecn: int = 0) -> int:
        sends.append((-(-len(buffer) // segment), ecn))
        return original(buffer, segment, address, ecn)  # type: ignore[arg-type]

    pair.alice.bind.send_segments = counted  # type: ignore[method-assign, assignment]
    return sends


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("bits", [NOT_ECT, ECT_1, ECT_0, CE])
def test_the_outer_header_has_the_inner_bits(bits: int, version: int) -> None:
    pair = Pair()
    pair.established()
    sends = watch(pair)
    pair.alice.tun.inject([packet(bits, version)])
    pair.alice.tun.inject(
        [Big(FROM_ALICE[version], FROM_BOB[version], bytes(5000), 1000, traffic_class=bits).virtio()]
    )
    pair.run()
    assert sends == [(1, bits), (5, bits)]
    assert len([each for written in pair.bob.tun.taken for each in finish(written)]) == 6
    assert pair.drops() == {}


def test_packets_with_other_bits_share_no_record_and_keep_their_order() -> None:
    pair = Pair()
    pair.established()
    sends = watch(pair)
    bits = [0, 0, 0, 2, 2, 0, 3, 3, 2, 2]
    packets = [packet(each, number=number) for number, each in enumerate(bits)]
    pair.alice.tun.inject(packets)
    pair.run()
    assert sends == [(1, 0), (1, 2), (1, 0), (1, 3), (1, 2)]
    assert pair.bob.tun.taken == packets


@pytest.mark.parametrize("bits", [NOT_ECT, ECT_0])
def test_equal_bits_cost_no_further_send(bits: int) -> None:
    pair = Pair()
    pair.established()
    sends = watch(pair)
    pair.alice.tun.inject([packet(bits, number=number, size=1000) for number in range(40)])
    pair.run()
    assert sum(count for count, _ in sends) == 40
    assert len(sends) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_a_mark_on_the_way_comes_out_inside_or_the_packet_is_dropped(version: int) -> None:
    pair = Pair(impairments=Impairments(mark=1.0))
    pair.established()
    for number, bits in enumerate([ECT_0, ECT_1, CE]):
        pair.alice.tun.inject([packet(bits, version, number)])
    pair.run()
    assert pair.bob.tun.taken == [packet(CE, version, number) for number in range(3)]
    assert pair.drops() == {}


@pytest.mark.parametrize("version", [4, 6])
def test_a_marked_packet_whose_sender_cannot_hear_it_is_dropped_and_counted(version: int) -> None:
    pair = Pair()
    pair.established()
    records: list[bytes] = []
    pair.network.tap = lambda source, destination, datagram: records.append(datagram)
    pair.network.impair_all(Impairments(loss=1.0))
    whole = Big(FROM_ALICE[version], FROM_BOB[version], bytes(5000), 1000)
    pair.alice.tun.inject([packet(NOT_ECT, version), packet(NOT_ECT, version)])
    pair.alice.tun.inject([whole.virtio()])
    for record in records:
        pair.network.inject(ALICE, pair.bob.bind.local, record, CE)
    pair.run()
    assert pair.bob.tun.taken == []
    assert pair.drops() == {DropReason.ECN_NOT_CAPABLE: 7}


def records_of(big: Big) -> tuple[Pair, list[bytes]]:
    pair = Pair()
    pair.established()
    records: list[bytes] = []
    pair.network.tap = lambda source, destination, datagram: records.append(datagram)
    pair.network.impair_all(Impairments(loss=1.0))
    pair.alice.tun.inject([big.virtio()])
    return pair, records


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_marks_within_a_superpacket_hit_exactly_their_segments(version: int, protocol: int) -> None:
    """A router marks some chunks: those come out marked and all others not, CWR stays on the first alone."""
    big = Big(
        FROM_ALICE[version],
        FROM_BOB[version],
        bytes(range(250)) * 120,
        1000,
        protocol=protocol,
        flags=ACK | PSH | CWR | ECE,
        traffic_class=46 << 2 | ECT_0,
    )
    pair, records = records_of(big)
    marks = [3, 3, 2, 2, 2, 3, 2, 1, 1, 0, 0, 2, 3] + [2] * 16 + [3]
    assert len(records) == len(marks) == 30
    first = 0
    while first < len(marks):  # as GRO: only equal bits share a receive
        last = first
        while last < len(marks) and marks[last] == marks[first]:
            last += 1
        batch = b"".join(records[first:last])
        received = Received(memoryview(batch), len(batch), len(records[0]), ALICE, marks[first])
        pair.bob.plane._inbound.process(received, 0.0)
        first = last
    pair.bob.plane._inbound.flush()
    becomes = {0: ECT_0, 1: ECT_1, 2: ECT_0, 3: CE}
    expected = [
        replace(big, traffic_class=46 << 2 | becomes[mark]).segments()[place] for place, mark in enumerate(marks)
    ]
    assert [each for written in pair.bob.tun.taken for each in finish(written)] == expected
    assert pair.drops() == {}


def test_a_superpacket_marked_as_a_whole_is_still_one_write() -> None:
    big = Big(FROM_ALICE[4], FROM_BOB[4], bytes(30_000), 1000, traffic_class=ECT_0)
    pair, records = records_of(big)
    for part in (records[:11], records[11:]):
        batch = b"".join(part)
        pair.bob.plane._inbound.process(Received(memoryview(batch), len(batch), len(records[0]), ALICE, CE), 0.0)
    assert len(pair.bob.tun.taken) == 1
    assert finish(pair.bob.tun.taken[0]) == replace(big, traffic_class=CE).segments()
