"""What a kernel may be given: ``virtio-net header + IP packet`` by the rules of virtio 1.2 5.1.6 and of Linux.

Linux refuses some of this itself (include/linux/virtio_net.h), has learnt to refuse more of it over the years, and
makes garbage of the rest; the packet path must not rely on it.  Independent of the code under test.
"""

from __future__ import annotations

import struct

TCP, UDP = 6, 17
SYN_OR_RST = 0x06
TYPES = {1: (TCP, 4), 4: (TCP, 6), 0x81: (TCP, 4), 0x84: (TCP, 6), 5: (UDP, None)}
CHECKSUM_AT = {TCP: 16, UDP: 6}
MAX_DATAGRAMS = 64
"""UDP_MAX_SEGMENTS of kernels before 6.9."""


def objection(frame: bytes, sources: set[bytes]) -> str | None:
    """Why a kernel should not get this frame, or None."""
    if len(frame) < 30:
        return "shorter than any packet"
    flags, kind, hdr_len, segment, start, offset = struct.unpack_from("<BBHHHH", frame)
    packet = frame[10:]
    ip = _ip(packet)
    if isinstance(ip, str):
        return ip
    version, header, source = ip
    if source not in sources:
        return "source is not the peer's"
    if flags not in (0, 1, 2):
        return "unknown flags"
    if hdr_len > len(packet):
        return "hdr_len beyond the packet"
    if flags != 1:
        return "segmentation without a checksum" if kind else None
    if start < header or start + offset + 2 > len(packet):
        return "checksum not within the packet behind the IP header"
    if _is_fragment(packet):
        return "checksum of a fragment"
    return _segmentation(packet, version, kind, segment, start, offset) if kind else None


def _ip(packet: bytes) -> tuple[int, int, bytes] | str:
    version = packet[0] >> 4
    if version == 4:
        header = packet[0] % 16 * 4
        if not 20 <= header <= len(packet):
            return "IPv4 header length"
        if struct.unpack_from(">H", packet, 2)[0] != len(packet):
            return "IPv4 total length"
        return 4, header, packet[12:16]
    if version != 6 or len(packet) < 40:
        return "no IP packet"
    if struct.unpack_from(">H", packet, 4)[0] != len(packet) - 40:
        return "IPv6 payload length"
    return 6, 40, packet[8:24]


def _is_fragment(packet: bytes) -> bool:
    if packet[0] >> 4 == 4:
        return struct.unpack_from(">H", packet, 6)[0] & 0x3FFF != 0
    return packet[6] == 44


def _transport(packet: bytes) -> tuple[int, int]:
    if packet[0] >> 4 == 4:
        return packet[9], packet[0] % 16 * 4
    following, at = packet[6], 40
    while following in (0, 43, 60) and at + 2 <= len(packet):
        following, at = packet[at], at + 8 + 8 * packet[at + 1]
    return following, at


def _segmentation(packet: bytes, version: int, kind: int, segment: int, start: int, offset: int) -> str | None:
    if kind not in TYPES:
        return "unknown segmentation"
    protocol, wanted = TYPES[kind]
    if wanted not in (None, version):
        return "segmentation of the other IP version"
    if _transport(packet) != (protocol, start):
        return "checksum does not begin at the transport header"
    if offset != CHECKSUM_AT[protocol]:
        return "checksum field of another protocol"
    if not segment:
        return "segments of no bytes"
    if protocol == UDP:
        return _udp(packet, segment, start)
    if start + 20 > len(packet) or not 20 <= packet[start + 12] // 16 * 4 <= len(packet) - start:
        return "TCP header length"
    if packet[start + 13] & SYN_OR_RST:
        return "SYN or RST would be repeated"
    return None if len(packet) - start - packet[start + 12] // 16 * 4 > segment else "one segment"


def _udp(packet: bytes, segment: int, start: int) -> str | None:
    payload = len(packet) - start - 8
    if payload <= segment:
        return "one segment"
    if struct.unpack_from(">H", packet, start + 4)[0] != payload + 8:
        return "UDP length"
    return "too many datagrams" if payload > segment * MAX_DATAGRAMS else None
