"""Traffic of every kind that a TUN can hand over, as ``virtio-net header + IP packet``, for hypothesis."""

from __future__ import annotations

import ipaddress
import random
import struct

from hypothesis import strategies as st

from tests.property.kernel_model import (
    ACK,
    CWR,
    DATA_VALID,
    ECE,
    FIN,
    FRAGMENT,
    GSO_ECN,
    NEEDS_CSUM,
    PSH,
    SYN,
    TCP,
    TCPV4,
    TCPV6,
    UDP,
    UDP_L4,
    URG,
    VIRTIO,
    _finished,
    ones_complement,
    pseudo_header,
)
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB

TIMESTAMPS = b"\1\1\x08\x0a" + bytes(range(8))
SACK = {blocks: b"\1\1\5" + bytes([2 + 8 * blocks]) + bytes(range(8 * blocks)) for blocks in (1, 2, 3, 4)}
TCP_OPTIONS = (b"", TIMESTAMPS, TIMESTAMPS + SACK[1], TIMESTAMPS + SACK[3], SACK[4] + b"\1" * 4, b"\1" * 40)
IPV4_OPTIONS = (b"", b"", b"", b"\1" * 4, b"\x94\4\0\0", b"\x07\x27\4" + bytes(36) + b"\0")
IPV6_EXTENSIONS: tuple[tuple[int, ...], ...] = ((), (), (), (0,), (60,), (0, 60), (0, 43, 60))
"""Hop-by-hop options, routing (nothing left), destination options."""


def extension(kind: int, following: int, units: int) -> bytes:
    body = bytes([4, 0, 0, 0, 0, 0]) if kind == 43 else bytes([1, 4, 0, 0, 0, 0])  # routing type 4, or PadN
    more = b"\1\6" + bytes(6) if kind != 43 else bytes(8)
    return bytes([following, units]) + body + more * units


def ip_header(
    version: int, protocol: int, length: int, options: object, traffic_class: int, identification: int
) -> bytes:
    """For ``length`` bytes of transport header and payload; the length field may be patched later."""
    ends = b"".join(ipaddress.ip_address(end[version]).packed for end in (FROM_ALICE, FROM_BOB))
    if version == 4:
        assert isinstance(options, bytes)
        size = 20 + len(options)
        fields = (0x40 | size // 4, traffic_class, size + length, identification, 0x4000, 64, protocol)
        head = struct.pack(">BBHHHBB", *fields)
        check = 0xFFFF - ones_complement(head + bytes(2) + ends + options)
        return head + struct.pack(">H", check) + ends + options
    assert isinstance(options, tuple)
    chain = b""
    for number, kind in enumerate(options):
        following = options[number + 1] if number + 1 < len(options) else protocol
        chain += extension(kind, following, number % 2)
    first = options[0] if options else protocol
    return (
        struct.pack(">IHBB", 6 << 28 | traffic_class << 20 | 0xABCDE, len(chain) + length, first, 63) + ends + chain
    )


def fragmentable(header: bytes) -> bytes:
    """An IPv4 header without "don't fragment"."""
    data = bytearray(header)
    data[6:8] = bytes(2)
    data[10:12] = bytes(2)
    data[10:12] = (0xFFFF - ones_complement(bytes(data))).to_bytes(2, "big")
    return bytes(data)


def with_partial_checksum(packet: bytes, at: int, protocol: int) -> bytes:
    data = bytearray(packet)
    place = at + {TCP: 16, UDP: 6}[protocol]
    data[place : place + 2] = ones_complement(pseudo_header(packet, len(packet) - at)).to_bytes(2, "big")
    return bytes(data)


def tcp_header(sequence: int, flags: int, options: bytes, window: int = 501) -> bytes:
    offset = (20 + len(options)) // 4 << 4
    return struct.pack(">HHIIBBHHH", 4000, 5000, sequence, 77, offset, flags, window, 0, 0) + options


@st.composite
def _ip(draw: st.DrawFn) -> tuple[int, object, int, int]:
    """(version, options, traffic class, identification)."""
    version = draw(st.sampled_from([4, 6]))
    options = draw(st.sampled_from(IPV4_OPTIONS if version == 4 else IPV6_EXTENSIONS))
    traffic_class = draw(st.sampled_from([0, 0, 0, 2, 2, 1, 3, 0xB8, 0xBA]))
    return version, options, traffic_class, draw(st.sampled_from([0, 77, 0xFFFE, 0xFFFF]))


def _payload(draw: st.DrawFn, size: int) -> bytes:
    return random.Random(draw(st.integers(0, 2**32))).randbytes(size)


@st.composite
def superpackets(draw: st.DrawFn, most: int = 64, room: int = 1300) -> bytes:
    """TCP or UDP, two segments at least; segments from 1 byte (shorter than the header) up to ``room``."""
    version, options, traffic_class, identification = draw(_ip())
    protocol = draw(st.sampled_from([TCP, TCP, UDP]))
    flags = ACK | draw(st.sampled_from([0, PSH, FIN | PSH, CWR, CWR | ECE | FIN, URG]))
    sequence = draw(st.sampled_from([0, 1000, 0xFFFF_FF00, 0xFFFF_FFFF]))
    head = tcp_header(sequence, flags, draw(st.sampled_from(TCP_OPTIONS))) if protocol == TCP else bytes(8)
    segment = draw(st.integers(1, 80) | st.integers(500, room - 300))
    chunks = draw(st.integers(2, min(most, 64) if protocol == UDP else most))
    size = min((chunks - 1) * segment + draw(st.sampled_from([1, segment]) | st.integers(1, segment)), 60_000)
    if protocol == UDP:
        head = struct.pack(">HHHH", 4000, 5000, 8 + size, 0)
    start = ip_header(version, protocol, len(head) + size, options, traffic_class, identification)
    packet = with_partial_checksum(start + head + _payload(draw, size), len(start), protocol)
    kind = UDP_L4 if protocol == UDP else {4: TCPV4, 6: TCPV6}[version]
    if protocol == TCP and flags & CWR:
        kind |= GSO_ECN
    hdr_len = draw(st.sampled_from([len(start) + len(head), 0, len(start)]))
    offset = {TCP: 16, UDP: 6}[protocol]
    return VIRTIO.pack(NEEDS_CSUM, kind, hdr_len, segment, len(start), offset) + packet


@st.composite
def plain_transport(draw: st.DrawFn) -> bytes:
    """Pure ACKs, window probes (no byte or one, window 0), SYN, small UDP: checksum partial, finished or verified."""
    version, options, traffic_class, identification = draw(_ip())
    protocol = draw(st.sampled_from([TCP, UDP]))
    size = draw(st.sampled_from([0, 0, 1]) | st.integers(0, 900))
    flags = draw(st.sampled_from([ACK, ACK, ACK | PSH, SYN, SYN | ACK, FIN | ACK, ACK | ECE, ACK | CWR]))
    head = tcp_header(
        draw(st.integers(0, 2**32 - 1)), flags, draw(st.sampled_from(TCP_OPTIONS)), draw(st.sampled_from([0, 501]))
    )
    if protocol == UDP:
        head = struct.pack(">HHHH", 4000, draw(st.sampled_from([53, 5000])), 8 + size, 0)
    start = ip_header(version, protocol, len(head) + size, options, traffic_class, identification)
    packet = start + head + _payload(draw, size)
    flag = draw(st.sampled_from([NEEDS_CSUM, NEEDS_CSUM, 0, DATA_VALID]))
    if flag == NEEDS_CSUM:
        offset = {TCP: 16, UDP: 6}[protocol]
        header = VIRTIO.pack(flag, 0, len(start) + len(head), 0, len(start), offset)
        return header + with_partial_checksum(packet, len(start), protocol)
    return VIRTIO.pack(flag, 0, 0, 0, 0, 0) + _finished(packet)


@st.composite
def other_packets(draw: st.DrawFn) -> bytes:
    """Another protocol, a fragment of IPv4 or IPv6, an empty IP packet."""
    version, options, traffic_class, identification = draw(_ip())
    size = draw(st.sampled_from([0, 8, 100, 700]))
    payload = _payload(draw, size)
    if draw(st.booleans()):
        start = ip_header(
            version, draw(st.sampled_from([1, 58, 50, 132, 253])), size, options, traffic_class, identification
        )
        return VIRTIO.pack(0, 0, 0, 0, 0, 0) + start + payload
    fragment = draw(st.sampled_from([0x2000, 0x2010, 0x0020]))
    if version == 6:
        payload = struct.pack(">BBHI", UDP, 0, (fragment & 0x1FFF) << 3 | fragment >> 13, 99) + payload
        start = ip_header(6, FRAGMENT, len(payload), options, traffic_class, 0)
        return VIRTIO.pack(0, 0, 0, 0, 0, 0) + start + payload
    start = bytearray(ip_header(4, UDP, size, options, traffic_class, identification))
    start[6:8] = fragment.to_bytes(2, "big")
    start[10:12] = bytes(2)
    start[10:12] = (0xFFFF - ones_complement(bytes(start))).to_bytes(2, "big")
    return VIRTIO.pack(0, 0, 0, 0, 0, 0) + bytes(start) + payload


@st.composite
def udp_bursts(draw: st.DrawFn) -> list[bytes]:
    """Small datagrams of one flow, mostly of equal length, as a game or a telephone sends them."""
    version, options, traffic_class, identification = draw(_ip())
    size = draw(st.sampled_from([0, 1, 18, 64, 172]))
    step, atomic = draw(st.sampled_from([0, 1, 1, 7])), draw(st.booleans())
    flag = draw(st.sampled_from([NEEDS_CSUM, NEEDS_CSUM, DATA_VALID, 0]))
    frames = []
    for number in range(draw(st.integers(2, 90))):
        length = size if draw(st.integers(0, 9)) else draw(st.integers(0, 200))
        head = struct.pack(">HHHH", 4000, 5000, 8 + length, 0)
        name = (identification + number * step) & 0xFFFF
        start = ip_header(version, UDP, 8 + length, options, traffic_class, name)
        if version == 4 and not atomic:
            start = fragmentable(start)
        packet = start + head + _payload(draw, length)
        if flag == NEEDS_CSUM:
            packet = with_partial_checksum(packet, len(start), UDP)
            frames.append(VIRTIO.pack(NEEDS_CSUM, 0, len(start) + 8, 0, len(start), 6) + packet)
        else:
            frames.append(VIRTIO.pack(flag, 0, 0, 0, 0, 0) + _finished(packet))
    return frames


def traffic(most_chunks: int = 64) -> st.SearchStrategy[list[bytes]]:
    """A few bursts, each as one callback of the TUN would read it."""
    one = st.one_of(superpackets(most=most_chunks), plain_transport(), other_packets()).map(lambda frame: [frame])
    several = st.lists(one | one | one | udp_bursts(), min_size=1, max_size=8)
    return several.map(lambda bursts: [frame for burst in bursts for frame in burst])
