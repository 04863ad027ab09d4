"""A slow kernel: what a host makes of ``virtio-net header + IP packet``, byte by byte, one packet at a time.

Reads and computes everything from the bytes and shares nothing with the code under test; ``tests/unit/dataplane/
segments.py`` is a second model, from fields, and a test compares the two.  What a kernel would refuse, or what it
would send on with a wrong checksum, is an AssertionError with the reason.
"""

from __future__ import annotations

import struct

TCP, UDP, FRAGMENT = 6, 17, 44
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
NEEDS_CSUM, DATA_VALID = 1, 2
TCPV4, TCPV6, UDP_L4, GSO_ECN = 1, 4, 5, 0x80
EXTENSIONS = (0, 43, 60)
VIRTIO = struct.Struct("<BBHHHH")


def ones_complement(data: bytes) -> int:
    """The sum of RFC 1071, not complemented, 1 to 0xFFFF unless all bytes are 0."""
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def transport_of(packet: bytes) -> tuple[int, int]:
    """(protocol, offset of the transport header)."""
    if packet[0] >> 4 == 4:
        return packet[9], (packet[0] & 15) * 4
    following, offset = packet[6], 40
    while following in EXTENSIONS:
        following, offset = packet[offset], offset + 8 * (packet[offset + 1] + 1)
    return following, offset


def is_fragment(packet: bytes) -> bool:
    if packet[0] >> 4 == 4:
        return bool(int.from_bytes(packet[6:8], "big") & 0x3FFF)
    return transport_of(packet)[0] == FRAGMENT


def without_free_identification(packet: bytes) -> bytes:
    """IPv4 UDP with "don't fragment": its identification means nothing and may change on the way (RFC 6864 4.1)."""
    if packet[0] >> 4 == 6 or packet[9] != UDP or is_fragment(packet) or not packet[6] & 0x40:
        return packet
    data = bytearray(packet)
    data[4:6] = data[10:12] = bytes(2)
    return bytes(data)


def pseudo_header(packet: bytes, length: int) -> bytes:
    protocol, _ = transport_of(packet)
    if packet[0] >> 4 == 4:
        return packet[12:20] + struct.pack(">BBH", 0, protocol, length)
    return packet[8:40] + struct.pack(">II", length, protocol)


def check_lengths(packet: bytes) -> None:
    """The IP header's length is the packet's, and an IPv4 header's checksum is right."""
    if packet[0] >> 4 == 4:
        header = (packet[0] & 15) * 4
        assert 20 <= header <= len(packet), "IPv4 header length"
        assert int.from_bytes(packet[2:4], "big") == len(packet), "IPv4 total length"
        assert ones_complement(packet[:header]) == 0xFFFF, "IPv4 header checksum"
    else:
        assert packet[0] >> 4 == 6, "IP version"
        assert 40 + int.from_bytes(packet[4:6], "big") == len(packet), "IPv6 payload length"


def kernel(frame: bytes) -> list[bytes]:
    """Finished IP packets, as they would be on a wire without any offload."""
    flags, kind, hdr_len, segment, start, offset = VIRTIO.unpack_from(frame)
    packet = frame[VIRTIO.size :]
    check_lengths(packet)
    assert hdr_len <= len(packet), "hdr_len"
    if flags != NEEDS_CSUM:
        assert flags in (0, DATA_VALID), "flags"
        assert kind == 0, "segmentation without a checksum"
        return [packet]
    assert not is_fragment(packet), "checksum of a fragment"
    protocol, at = transport_of(packet)
    assert (start, offset) == (at, {TCP: 16, UDP: 6}[protocol]), "checksum position"
    partial = int.from_bytes(packet[start + offset : start + offset + 2], "big")
    expected = ones_complement(pseudo_header(packet, len(packet) - start))
    assert partial == expected, f"partial checksum {partial:#x} is not the pseudo-header's sum {expected:#x}"
    if protocol == UDP:
        assert int.from_bytes(packet[start + 4 : start + 6], "big") == len(packet) - start, "UDP length"
    if kind == 0:
        assert segment == 0, "gso_size without segmentation"
        return [_finished(packet)]
    return _segments(packet, kind, segment)


def _segments(packet: bytes, kind: int, segment: int) -> list[bytes]:
    protocol, at = transport_of(packet)
    version = packet[0] >> 4
    kinds = (UDP_L4,) if protocol == UDP else ({4: TCPV4, 6: TCPV6}[version],)
    assert kind & ~GSO_ECN in kinds, "segmentation type"
    assert not kind & GSO_ECN or packet[at + 13] & CWR, "GSO_ECN without CWR"
    assert protocol == UDP or not packet[at + 13] & (SYN | RST), "SYN or RST in a superpacket"
    header = at + (8 if protocol == UDP else (packet[at + 12] >> 4) * 4)
    payload = packet[header:]
    assert segment, "segments of no bytes"
    assert len(payload) > segment, "a superpacket of one segment"
    count = -(-len(payload) // segment)
    assert protocol == TCP or count <= 64, "more segments than older kernels take"
    return [
        _segment(packet[:header], payload[cut : cut + segment], number, cut, cut + segment >= len(payload))
        for number, cut in enumerate(range(0, len(payload), segment))
    ]


def _segment(head: bytes, payload: bytes, number: int, sent: int, last: bool) -> bytes:
    data = bytearray(head + payload)
    protocol, at = transport_of(head)
    if data[0] >> 4 == 4:
        data[2:4] = len(data).to_bytes(2, "big")
        data[4:6] = ((int.from_bytes(head[4:6], "big") + number) & 0xFFFF).to_bytes(2, "big")
        data[10:12] = bytes(2)
        data[10:12] = (0xFFFF - ones_complement(bytes(data[: (data[0] & 15) * 4]))).to_bytes(2, "big")
    else:
        data[4:6] = (len(data) - 40).to_bytes(2, "big")
    if protocol == TCP:
        data[at + 4 : at + 8] = ((int.from_bytes(head[at + 4 : at + 8], "big") + sent) & 0xFFFFFFFF).to_bytes(
            4, "big"
        )
        data[at + 13] &= 0xFF if last else ~(FIN | PSH)
        data[at + 13] &= 0xFF if number == 0 else ~CWR & 0xFF
    else:
        data[at + 4 : at + 6] = (8 + len(payload)).to_bytes(2, "big")
    return _finished(bytes(data))


def _finished(packet: bytes) -> bytes:
    """With the transport checksum over header and payload, computed anew."""
    protocol, at = transport_of(packet)
    place = at + {TCP: 16, UDP: 6}[protocol]
    data = bytearray(packet)
    data[place : place + 2] = bytes(2)
    total = ones_complement(pseudo_header(packet, len(packet) - at) + bytes(data[at:]))
    check = 0xFFFF - total
    if protocol == UDP and check == 0:
        check = 0xFFFF
    data[place : place + 2] = check.to_bytes(2, "big")
    return bytes(data)
