"""What a virtio-net header may say, line by line, and the corners of settling that chance hardly finds."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.netio import offload
from tests.property.kernel_model import kernel
from tests.unit.dataplane.segments import ACK, CWR, TCP, UDP, Big
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, ip_packet

RST, SYN = 0x04, 0x02
ENDS: dict[int, Callable[[int], tuple[str, str]]] = {
    4: lambda last: ("10.90.0.1", f"10.90.{last >> 8}.{last & 255}"),
    6: lambda last: ("fd90::1", f"fd90::{last:x}"),
}
"""Source, and a destination that adds ``last`` to the pseudo-header's sum."""


def settled(big: Big, place: int, chunks: int) -> bytes:
    """A run of chunks, joined and settled."""
    whole = big.virtio()
    head = len(whole) - len(big.payload)
    payload = big.payload[place * big.segment : (place + chunks) * big.segment]
    run = memoryview(bytearray(whole[:head] + payload))
    packet = offload.parse_superpacket(run, 0, len(run))
    assert packet is not None
    offload.settle(run, 0, packet, place, len(payload))
    return bytes(run)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_partial_checksum_is_never_zero(version: int, protocol: int) -> None:
    """UDP over IPv6 with 0 in the field is dropped on arrival, whatever the virtio header says of it."""
    length = (20 if protocol == TCP else 8) + 1000
    big = Big(*ENDS[version](0), bytes(range(250)) * 12, 1000, protocol=protocol)
    words = struct.unpack(f">{len(big.pseudo(length)) // 2}H", big.pseudo(length))
    big = replace(big, destination=ENDS[version](-sum(words) % 0xFFFF)[1])
    frame = settled(big, 1, 1)
    place = 10 + (20 if version == 4 else 40) + (16 if protocol == TCP else 6)
    assert frame[place : place + 2] == b"\xff\xff"
    assert kernel(frame) == [big.segments()[1]]


BIG = Big(FROM_ALICE[4], FROM_BOB[4], bytes(4000), 1000)


def parse(big: Big, at: int = 0, value: bytes = b"") -> offload.Superpacket | None:
    data = bytearray(big.virtio())
    data[at : at + len(value)] = value
    return offload.parse_superpacket(memoryview(data), 0, len(data))


@pytest.mark.parametrize("flags", [SYN, SYN | ACK, RST, RST | ACK])
def test_segments_that_cannot_be_repeated_are_no_superpacket(flags: int) -> None:
    assert parse(Big(FROM_ALICE[4], FROM_BOB[4], bytes(4000), 1000, flags=flags)) is None


@pytest.mark.parametrize("length", [0, 7, 8, 4007, 4009, 0xFFFF])
@pytest.mark.parametrize("version", [4, 6])
def test_a_udp_length_that_is_not_the_packets_is_malformed(length: int, version: int) -> None:
    big = Big(FROM_ALICE[version], FROM_BOB[version], bytes(4000), 1000, protocol=UDP)
    assert parse(big) is not None
    at = 10 + (20 if version == 4 else 40) + 4
    assert parse(big, at, length.to_bytes(2, "big")) is None


def test_a_chunk_behind_the_end_is_none() -> None:
    """4000 bytes in chunks of 1000: number 4 would be empty, and those after it less than that."""
    packet = parse(BIG)
    assert packet is not None
    assert [offload.chunk_fits(packet, place, packet.header + 1000) for place in range(4)] == [True] * 4
    assert not any(offload.chunk_fits(packet, place, packet.header) for place in range(6))


def plain(flags: int, packet: bytes, start: int = 20, offset: int = 6) -> bool:
    frame = offload.VIRTIO.pack(flags, 0, 0, 0, start, offset) + packet
    return offload.plain_ok(memoryview(frame), 0, len(packet))


@pytest.mark.parametrize("fragment", [0x2000, 0x0001, 0x00FF, 0x1FFF, 0x3000])
def test_no_checksum_is_finished_in_a_fragment(fragment: int) -> None:
    packet = bytearray(ip_packet(FROM_ALICE[4], FROM_BOB[4], bytes(40), UDP))
    assert plain(1, bytes(packet))
    packet[6:8] = (0x4000).to_bytes(2, "big")  # don't fragment
    assert plain(1, bytes(packet))
    packet[6:8] = fragment.to_bytes(2, "big")
    assert not plain(1, bytes(packet))
    assert plain(0, bytes(packet))
    assert plain(2, bytes(packet))


def test_no_checksum_is_finished_in_an_ipv6_fragment() -> None:
    packet = ip_packet(FROM_ALICE[6], FROM_BOB[6], bytes([UDP, 0, 0, 1, 0, 0, 0, 9]) + bytes(40), 44)
    assert not plain(1, packet, 48)
    assert plain(0, packet)


def test_cwr_stays_on_the_first_segment_alone() -> None:
    big = Big(FROM_ALICE[4], FROM_BOB[4], bytes(4000), 1000, flags=ACK | CWR)
    assert settled(big, 0, 3)[1] == offload.GSO_TCPV4 | offload.GSO_ECN
    assert settled(big, 1, 3)[1] == offload.GSO_TCPV4
    assert settled(big, 0, 1)[1] == offload.GSO_NONE


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_what_is_remembered_of_one_header_is_not_said_of_another(version: int, protocol: int) -> None:
    """Every value of every byte of a header, and every end, right after the header that differs from it in that."""
    options = bytes(12) if protocol == TCP else b""
    whole = Big(*ENDS[version](1), bytes(300), 100, protocol=protocol, tcp_options=options).virtio()
    packet, end = memoryview(bytearray(whole)), len(whole)
    assert offload.parse_superpacket(packet, 0, end) is not None
    for place in range(84):
        for value in range(256):
            packet[place] = value
            assert offload.parse_superpacket(packet, 0, end) == offload._parse(packet, 0, end), (place, value)
        packet[place] = whole[place]
    for shorter in range(end):
        assert offload.parse_superpacket(packet, 0, shorter) == offload._parse(packet, 0, shorter), shorter


def test_shapes_that_are_remembered_are_bounded() -> None:
    for length in range(200, 200 + offload._SHAPES + 10):
        packet = memoryview(bytearray(Big(*ENDS[4](1), bytes(length), 100).virtio()))
        assert offload.parse_superpacket(packet, 0, len(packet)) is not None
    assert len(offload._shapes) <= offload._SHAPES


@given(
    st.sampled_from([b"\1\0\0\0\0\0\x14\0\x10\0", b"\1\0\0\0\0\0\x14\0\6\0", bytes(10)])
    | st.binary(min_size=10, max_size=10),
    st.integers(20, 70),
    st.sampled_from([0, 0x4000]) | st.integers(0, 0xFFFF),
)
def test_the_quick_look_accepts_nothing_that_the_close_one_refuses(virtio: bytes, length: int, fragment: int) -> None:
    packet = bytearray(virtio + bytes(length))
    packet[10:18] = struct.pack(">BBHHH", 0x45, 0, length, 0, fragment)
    assert not offload.simple_ok(virtio, length, fragment) or offload.plain_ok(bytes(packet), 0, length)


def test_the_quick_look_accepts_what_kernels_send() -> None:
    for protocol, offset in ((TCP, 16), (UDP, 6)):
        assert offload.simple_ok(struct.pack("<BBHHHH", 1, 0, 0, 0, 20, offset), 60, 0x4000), protocol
    assert offload.simple_ok(bytes(10), 20, 0x2000)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_addresses_come_with_what_is_remembered(version: int, protocol: int) -> None:
    """Twice: what is taken apart, and what is remembered of one flow and asked of another."""
    for _ in range(2):
        for last in (2, 3):
            source, destination = ENDS[version](last)
            packet = Big(source, destination, bytes(3000), 1000, protocol=protocol).virtio()
            found = offload.addressed(memoryview(packet), len(packet))
            assert found is not None
            assert found[1:] == tuple(ipaddress.ip_address(each).packed for each in (source, destination))
            assert found[0] == offload.parse_superpacket(memoryview(packet), 0, len(packet))
