"""The virtio-net header: what it may say, and how chunks of a superpacket become packets again.

A data record's plaintext begins with the ten bytes of ``struct virtio_net_hdr`` (virtio 1.2, 5.1.6; little-endian)
that the sender's TUN put before the packet.  They were written by the peer and are given to this host's kernel, so
every field is checked against the bytes that are there.

A **superpacket** (``gso_type`` not 0) is one IP packet far beyond the MTU that the kernel would cut into segments of
``gso_size`` payload bytes.  On the wire it travels as **chunks**: its unmodified header (virtio, IP, TCP or UDP) and
one slice of its payload.  A run of chunks that follow one another is a smaller superpacket once its header is
*settled*: lengths, IPv4 identification and checksum, TCP sequence number and flags are set to what segmentation would
have given, and the transport checksum is left to the kernel (``NEEDS_CSUM`` with the pseudo-header's sum).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from qvpn.tunnel import ip

VIRTIO = struct.Struct("<BBHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""

LENGTH = VIRTIO.size
MAX_HEADER = 512
"""Longest header of a superpacket: 130 bytes with all options of IPv4 and TCP, and room for IPv6 extensions."""

NEEDS_CSUM = 1
DATA_VALID = 2
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80

_PLAIN_FLAGS = frozenset({0, NEEDS_CSUM, DATA_VALID})
_TCP_HEADER = 20
_UDP_HEADER = 8
_CSUM_OFFSET = {ip.TCP: 16, ip.UDP: 6}
_IP_VERSION_OF = {GSO_TCPV4: 4, GSO_TCPV6: 6}
_TCP_FIN, _TCP_SYN, _TCP_RST, _TCP_PSH, _TCP_CWR = 0x01, 0x02, 0x04, 0x08, 0x80
_U16 = struct.Struct(">H")
_LITTLE_U16 = struct.Struct("<H")
_U32 = struct.Struct(">I")


SIMPLE = struct.Struct(">10sBBH2xHxB2x4s4s13xB")
"""Virtio header, then of an IPv4 packet without options: version and header length, TOS, length, fragment, protocol,
source, destination, and the flags that it has if it is TCP."""

SIMPLE_IPV4 = 0x45
"""Version and header length of a packet that :data:`SIMPLE` reads."""

_NO_OFFLOAD = bytes(LENGTH)
_FINISHED_LATER = frozenset(VIRTIO.pack(NEEDS_CSUM, GSO_NONE, 0, 0, ip.IPV4_HEADER, at) for at in (16, 6))
"""What a kernel puts before TCP and UDP whose checksum it left open."""

_CHECKSUM_END = ip.IPV4_HEADER + 16 + 2


def simple_ok(virtio: bytes, length: int, fragment: int) -> bool:
    """Quick look before :func:`plain_ok` at what :data:`SIMPLE` read: True for most, and only for what is ok."""
    if virtio == _NO_OFFLOAD:
        return True
    return length >= _CHECKSUM_END and not fragment & 0x3FFF and virtio in _FINISHED_LATER


def plain_ok(data: memoryview | bytes, start: int, length: int) -> bool:
    """True if the virtio header at ``start`` is fit for the kernel, before an IP packet of ``length`` bytes."""
    flags, gso_type, hdr_len, _, csum_start, csum_offset = VIRTIO.unpack_from(data, start)
    if flags not in _PLAIN_FLAGS or gso_type != GSO_NONE or hdr_len > length:
        return False
    if flags != NEEDS_CSUM:
        return True
    inner = start + LENGTH
    if data[inner] == 0x45:  # as nearly always
        whole = not (data[inner + 6] & 0x3F or data[inner + 7])
        return whole and csum_start >= ip.IPV4_HEADER and csum_start + csum_offset + 2 <= length
    header = ip.header_length(data, inner)
    if not (header <= csum_start and csum_start + csum_offset + 2 <= length):
        return False
    return not ip.is_fragment(data, inner)  # a part of a packet has no checksum that could be finished


class Superpacket(NamedTuple):
    """What the unmodified header of a superpacket says, checked."""

    header: int
    """Bytes of virtio, IP and transport header together."""
    segment: int
    """``gso_size``: payload bytes of each chunk but the last."""
    payload: int
    """Payload bytes of the whole superpacket."""
    transport: int
    """Where the transport header begins, counted from the virtio header."""
    protocol: int

    @property
    def chunks(self) -> int:
        return -(-self.payload // self.segment)


_V4 = struct.Struct("14s2x2sxB2x4s4s12x2s")
"""Of TCP over IPv4 without options: all to the total length; fragment; protocol; source; destination; TCP's length
and flags."""

_V6 = struct.Struct("11s3x3sx16s16s12x2s")
"""Of TCP over IPv6: all to the version; length and next header; source; destination; TCP's length and flags."""

_SHAPE_BYTES = 64
_SHAPES = 1024
"""Shapes remembered; at this number the memory starts afresh."""

_shapes: dict[tuple[object, ...], Superpacket] = {}


def parse_superpacket(data: memoryview, start: int, end: int) -> Superpacket | None:
    """Read the header of a superpacket, of which ``data[start:end]`` holds at least the header; None if malformed."""
    found = addressed(data[start:end], end - start)
    return None if found is None else found[0]


def addressed(data: memoryview, size: int) -> tuple[Superpacket, bytes, bytes] | None:
    """As :func:`parse_superpacket` of the first ``size`` bytes, with source and destination address.

    Superpackets of one TCP connection differ in addresses, numbers and sums, of which the answer does not depend; it
    is remembered by those bytes that it does depend on.
    """
    if size >= _SHAPE_BYTES:
        first, fragment, protocol, source, destination, flags = _V4.unpack_from(data)
        shape: tuple[object, ...] = (size, first, fragment, protocol, flags)
        found = _shapes.get(shape)
        if found is not None:
            return found, source, destination
        if first[10] == 0x45 and protocol == ip.TCP:
            return _remember(data, size, shape)
        if first[10] >> 4 == 6 and data[16] == ip.TCP:
            first, length, source, destination, flags = _V6.unpack_from(data)
            shape = (size, first, length, flags)
            found = _shapes.get(shape)
            return _remember(data, size, shape) if found is None else (found, source, destination)
    return _remember(data, size, None)


def _remember(
    data: memoryview, size: int, shape: tuple[object, ...] | None
) -> tuple[Superpacket, bytes, bytes] | None:
    packet = _parse(data, 0, size)
    if packet is None:
        return None
    if shape is not None:
        if len(_shapes) >= _SHAPES:
            _shapes.clear()
        _shapes[shape] = packet
    return packet, ip.source(data, LENGTH), ip.destination(data, LENGTH)


def _parse(data: memoryview, start: int, end: int) -> Superpacket | None:
    if end - start < LENGTH + ip.IPV4_HEADER:
        return None
    flags, gso_type, _, segment, csum_start, csum_offset = VIRTIO.unpack_from(data, start)
    inner = start + LENGTH
    total = _claimed_length(data, inner, end)
    found = ip.transport(data, inner, end) if total else None
    if found is None or flags != NEEDS_CSUM or not segment:
        return None
    protocol, offset = found
    if offset != csum_start or _CSUM_OFFSET.get(protocol) != csum_offset:
        return None
    if not _type_fits(gso_type, protocol, data[inner] >> 4):
        return None
    size = _transport_length(data, inner + offset, end, protocol, total - offset)
    payload = total - offset - size
    header = LENGTH + offset + size
    if not size or payload <= 0 or header > min(MAX_HEADER, end - start):
        return None
    return Superpacket(header, segment, payload, LENGTH + offset, protocol)


def chunk_fits(packet: Superpacket, place: int, length: int) -> bool:
    """True if ``length`` bytes (header and slice) are exactly what chunk number ``place`` has, which is some."""
    rest = packet.payload - place * packet.segment
    return rest > 0 and length - packet.header == min(packet.segment, rest)


def settle(data: memoryview, start: int, packet: Superpacket, place: int, payload: int) -> None:
    """Rewrite the header at ``start`` for ``payload`` bytes that begin at chunk ``place``.

    The bytes after the header are those of the chunks ``place`` onwards, one behind the other.  A run that is the
    whole superpacket need not be settled.
    """
    inner, transport = start + LENGTH, start + packet.transport
    length = packet.header - LENGTH + payload
    if data[inner] >> 4 == 4:
        _settle_ipv4(data, inner, place, length)
    else:
        _U16.pack_into(data, inner + 4, length - ip.IPV6_HEADER)
    ends_packet = place * packet.segment + payload == packet.payload
    if packet.protocol == ip.TCP:
        _settle_tcp(data, transport, place, place * packet.segment, ends_packet)
    else:
        _U16.pack_into(data, transport + 4, _UDP_HEADER + payload)
    _settle_checksum(data, transport + _CSUM_OFFSET[packet.protocol], packet.payload, payload)
    if payload <= packet.segment:
        data[start + 1] = GSO_NONE
        data[start + 4 : start + 6] = b"\0\0"
    elif place:
        data[start + 1] &= ~GSO_ECN & 0xFF
    set_header_length(data, start, packet)


def set_header_length(data: memoryview, start: int, packet: Superpacket) -> None:
    """``hdr_len`` is a hint how much the kernel should copy; the peer's may be anything, so it gets ours."""
    _LITTLE_U16.pack_into(data, start + 2, packet.header - LENGTH)


def narrow(data: memoryview, start: int, packet: Superpacket, segment: int) -> Superpacket:
    """Have a TCP superpacket cut into smaller segments, for a path narrower than its sender knew."""
    _LITTLE_U16.pack_into(data, start + 4, segment)
    return packet._replace(segment=segment)


def _claimed_length(data: memoryview, inner: int, end: int) -> int:
    """The IP packet's own length, which may reach beyond ``end``; 0 if the header is malformed."""
    version = data[inner] >> 4
    if version == 4:
        header = ip.header_length(data, inner)
        return _u16(data, inner + 2) if header >= ip.IPV4_HEADER and inner + header <= end else 0
    if version == 6 and end - inner >= ip.IPV6_HEADER:
        return ip.IPV6_HEADER + _u16(data, inner + 4)
    return 0


def _type_fits(gso_type: int, protocol: int, version: int) -> bool:
    if protocol == ip.UDP:
        return gso_type == GSO_UDP_L4
    return _IP_VERSION_OF.get(gso_type & ~GSO_ECN) == version


def _transport_length(data: memoryview, offset: int, end: int, protocol: int, room: int) -> int:
    """Length of the transport header, where ``room`` bytes of the whole packet begin; 0 if malformed.

    SYN and RST are refused: segmentation would repeat them, and no kernel puts them into a superpacket.
    """
    if protocol == ip.UDP:
        return _UDP_HEADER if offset + _UDP_HEADER <= end and _u16(data, offset + 4) == room else 0
    if offset + _TCP_HEADER > end or data[offset + 13] & (_TCP_SYN | _TCP_RST):
        return 0
    length = (data[offset + 12] >> 4) * 4
    return length if length >= _TCP_HEADER else 0


def _settle_ipv4(data: memoryview, inner: int, place: int, length: int) -> None:
    _U16.pack_into(data, inner + 2, length)
    _U16.pack_into(data, inner + 4, (_u16(data, inner + 4) + place) & 0xFFFF)
    data[inner + 10 : inner + 12] = b"\0\0"
    header = data[inner : inner + ip.header_length(data, inner)]
    _U16.pack_into(data, inner + 10, ~ones_sum(header) & 0xFFFF)


def _settle_tcp(data: memoryview, offset: int, place: int, sent: int, ends_packet: bool) -> None:
    sequence = _U32.unpack_from(data, offset + 4)[0]
    _U32.pack_into(data, offset + 4, (sequence + sent) & 0xFFFFFFFF)
    if not ends_packet:
        data[offset + 13] &= ~(_TCP_FIN | _TCP_PSH) & 0xFF
    if place:
        data[offset + 13] &= ~_TCP_CWR & 0xFF


def _settle_checksum(data: memoryview, offset: int, old_payload: int, new_payload: int) -> None:
    """The field holds the pseudo-header's sum, which the length is part of: replace one length by the other.

    Of the two zeros it gets 0xFFFF, as from a kernel: UDP over IPv6 with 0 in the field is dropped on arrival.
    """
    change = new_payload - old_payload
    _U16.pack_into(data, offset, (_u16(data, offset) + change - 1) % 0xFFFF + 1)


def ones_sum(data: memoryview) -> int:
    """Sum of 16-bit words with end-around carry (RFC 1071); ``data`` has an even length."""
    total: int = sum(word for (word,) in _U16.iter_unpack(data))
    return (total - 1) % 0xFFFF + 1 if total else 0


def _u16(data: memoryview, offset: int) -> int:
    return data[offset] << 8 | data[offset + 1]
