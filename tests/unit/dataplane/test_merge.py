"""Equal UDP packets written as one superpacket: what the kernel cuts from it is what was sent, in that order."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qvpn.netio.base import Received
from qvpn.netio.memory import Impairments
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.records import OVERHEAD
from tests.unit.dataplane.segments import UDP, Big, finish
from tests.unit.dataplane.support import ALICE, FROM_ALICE, FROM_BOB, Pair, numbered
from tests.unit.dataplane.test_chunks import watch_calls

DF = 0x40


def udp(
    number: int, *, version: int = 4, size: int = 64, ident: int | None = None, source: str = "", atomic: bool = False
) -> bytes:
    """A UDP packet whose checksum the kernel left open, as a TUN gives it; ``number`` fills it."""
    payload = random.Random(number).randbytes(size)
    model = Big(source or FROM_ALICE[version], FROM_BOB[version], payload, size, protocol=UDP, dont_fragment=atomic)
    packet = bytearray(replace(model, identification=(number if ident is None else ident) & 0xFFFF).virtio())
    packet[1] = 0
    packet[2:6] = bytes(4)
    return bytes(packet)


@pytest.fixture
def pair() -> Pair:
    made = Pair()
    made.bob.tun.merges_udp = True
    made.established()
    return made


def send(pair: Pair, packets: list[bytes]) -> list[bytes]:
    """From Alice's TUN to Bob's as one GRO batch where that can be; returns what Bob's TUN got."""
    records: list[bytes] = []
    pair.network.tap = lambda _source, _destination, datagram: records.append(datagram)
    pair.network.block(pair.alice.bind.local, pair.bob.bind.local)
    pair.alice.tun.inject(packets)
    pair.network.tap = None
    before = len(pair.bob.tun.taken)
    while records:
        count = next((n for n, record in enumerate(records) if len(record) != len(records[0])), len(records))
        data = memoryview(b"".join(records[:count]))
        pair.bob.plane._inbound.process(Received(data, len(data), len(records[0]), ALICE), pair.network.now)
        del records[:count]
    pair.bob.plane._inbound.flush()
    traffic = pair.bob.plane.stats("alice")
    assert traffic.source_checks == traffic.tun_writes + traffic.tun_refused
    return pair.bob.tun.taken[before:]


def cut(written: list[bytes]) -> list[bytes]:
    return [packet for each in written for packet in finish(each)]


def without_id(packet: bytes) -> bytes:
    """An atomic datagram's identification means nothing (RFC 6864), nor does the checksum that covers it."""
    return packet[:4] + packet[6:10] + packet[12:] if packet[0] >> 4 == 4 and packet[6] & DF else packet


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [1, 64, 500, 1200])
def test_equal_packets_are_one_write(pair: Pair, version: int, size: int) -> None:
    packets = [udp(n, version=version, size=size) for n in range(40)]
    written = send(pair, packets)
    assert cut(written) == cut(packets)
    assert len(written) == 1
    assert pair.bob.plane.stats("alice").received_packets == 40


def test_at_most_64_in_one_write_and_none_too_long(pair: Pair) -> None:
    packets = [udp(n) for n in range(150)]
    written = send(pair, packets)
    assert cut(written) == cut(packets)
    assert len(written) <= 4
    packets = [udp(n, size=1300) for n in range(60)]
    written = send(pair, packets)
    assert cut(written) == cut(packets)
    assert len(written) == 2
    assert all(len(each) <= 65_545 for each in written)


def test_ids_that_do_not_count_up_are_not_joined_unless_atomic(pair: Pair) -> None:
    packets = [udp(n, ident=7) for n in range(30)]
    assert send(pair, packets) == packets
    atomic = [udp(n, ident=7, atomic=True) for n in range(30)]
    written = send(pair, atomic)
    assert len(written) == 1
    assert [without_id(packet) for packet in cut(written)] == [without_id(packet) for packet in cut(atomic)]


def test_a_finished_or_absent_checksum_is_never_replaced(pair: Pair) -> None:
    finished = [bytes(10) + finish(udp(n))[0] for n in range(10)]
    assert send(pair, finished) == finished
    vouched = [b"\x02" + packet[1:] for packet in finished]
    written = send(pair, vouched)
    assert len(written) == 1
    assert cut(written) == [packet[10:] for packet in finished]
    absent = [packet[:36] + b"\0\0" + packet[38:] for packet in vouched]
    assert send(pair, absent) == absent


def test_a_foreign_source_is_refused_packet_by_packet(pair: Pair) -> None:
    assert send(pair, [udp(n, source="10.99.0.1") for n in range(20)]) == []
    assert pair.bob.plane.stats("alice").drops == {DropReason.WRONG_SOURCE: 20}
    mixed = [udp(0), udp(1, source="10.99.0.1"), udp(2), udp(3, size=1200), udp(4, size=1200, source="10.99.0.1")]
    assert cut(send(pair, mixed)) == cut([mixed[0], mixed[2], mixed[3]])


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_packet_between_two_equal_ones_is_neither_lost_nor_written_twice(
    pair: Pair, version: int, repeats: int
) -> None:
    """Each alone in its record, as long packets are, and all of one length."""
    header = {4: 20, 6: 40}[version]
    between = numbered(7, FROM_ALICE[version], FROM_BOB[version], 1308)
    assert len(between) == len(udp(1, version=version, size=1300)) == 10 + header + 1308
    packets = [udp(n, version=version, size=1300) for n in range(4)]
    mixed = [packets[0], *[between] * repeats, *packets[1:], between, packets[3]]
    assert cut(send(pair, mixed)) == cut(mixed)
    assert pair.bob.plane.stats("alice").received_packets == len(mixed)


@pytest.mark.parametrize(("size", "ident"), [(1300, 9), (1300, 1)])
def test_what_came_before_two_packets_that_are_not_joined_stays_before_them(
    pair: Pair, size: int, ident: int
) -> None:
    before = numbered(7, FROM_ALICE[4], FROM_BOB[4], size + 8)
    packets = [before, udp(1, size=size, ident=9), udp(2, size=size, ident=ident), before]
    assert cut(send(pair, packets)) == cut(packets)


def test_what_came_before_a_record_of_more_than_one_superpacket_stays_before_it(pair: Pair) -> None:
    """Long datagrams hold more small packets than one write takes."""
    small = [udp(n, size=4) for n in range(200)]
    before = numbered(7, FROM_ALICE[4], FROM_BOB[4], len(b"".join(small)) - 30)
    pair.network.impair_all(Impairments(max_payload=len(before) + OVERHEAD))
    pair.alice.plane.tick()
    assert cut(send(pair, [before, *small])) == cut([before, *small])


def test_a_tun_that_refuses_is_counted_by_packets(pair: Pair) -> None:
    pair.bob.tun.room = 0
    assert send(pair, [udp(n) for n in range(20)]) == []
    traffic = pair.bob.plane.stats("alice")
    assert (traffic.tun_refused, traffic.drops) == (20, {DropReason.TUN_FULL: 20})


def test_a_tun_that_takes_no_superpackets_gets_packets(pair: Pair) -> None:
    pair.bob.tun.merges_udp = False
    packets = [udp(n) for n in range(20)]
    assert send(pair, packets) == packets


@pytest.mark.parametrize("seed", range(60))
def test_mixed_traffic_arrives_as_it_was_sent_and_in_order(pair: Pair, seed: int) -> None:
    """Runs of equal packets among others, superpackets too; every AEAD call once."""
    dice = random.Random(seed)
    packets: list[bytes] = []
    number = 0
    while len(packets) < 120:
        kind, length = dice.randrange(6), dice.choice((1, 2, 3, 15, 40))
        size, version = dice.choice((1, 20, 64, 700, 1300)), dice.choice((4, 6))
        for _ in range(length):
            number += 1
            if kind < 3:
                packets.append(udp(number, version=version, size=size))
            elif kind == 3:
                packets.append(udp(number, size=size, ident=0, atomic=True))
            elif kind == 4:
                packets.append(numbered(number, FROM_ALICE[version], FROM_BOB[version], size))
            elif not packets or packets[-1][1] == 0:
                packets.append(Big(FROM_ALICE[4], FROM_BOB[4], bytes(5000), 1000).virtio())
    calls = watch_calls(pair)
    written = send(pair, packets)
    assert [without_id(packet) for packet in cut(written)] == [without_id(packet) for packet in cut(packets)]
    assert len(calls) == pair.alice.plane.stats("bob").sent_records
    assert pair.bob.plane.stats("alice").drops == {}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("takes", [True, False])
def test_a_kernel_without_udp_segmentation_gets_a_superpacket_in_packets(
    pair: Pair, version: int, takes: bool
) -> None:
    """Its peer's kernel may well make some; so may it itself when only a part of one arrives."""
    big = Big(FROM_ALICE[version], FROM_BOB[version], random.Random(3).randbytes(700 * 9 + 13), 700, protocol=UDP)
    pair.bob.tun.merges_udp = takes
    written = send(pair, [big.virtio()])
    assert cut(written) == big.segments()
    assert len(written) == (1 if takes else 10)
    traffic = pair.bob.plane.stats("alice")
    assert traffic.received_packets == 10
    assert traffic.received_bytes == sum(map(len, big.segments()))
