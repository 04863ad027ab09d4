"""Just enough of IPv4 (RFC 791) and IPv6 (RFC 8200) to route and check inner packets.

What is parsed here was written by the peer or by anyone behind it.  Functions take a buffer and offsets, never copy
more than an address, and answer 0 or None for what is not a well-formed header; they never raise on any bytes as long
as ``0 <= start <= end <= len(data)``.
"""

from __future__ import annotations

IPV4_HEADER = 20
IPV6_HEADER = 40
TCP = 6
UDP = 17
FRAGMENT = 44
"""Next header of IPv6 (RFC 8200 4.5)."""

_EXTENSIONS = frozenset({0, 43, 60})
"""Next headers that can stand before a transport header in an unfragmented packet: hop-by-hop, routing, options."""


def packet_length(data: memoryview | bytes, start: int, end: int) -> int:
    """Length of the IP packet at ``data[start]`` as its header says; 0 if malformed or ending after ``end``."""
    room = end - start
    if room < IPV4_HEADER:
        return 0
    first = data[start]
    if first >> 4 == 4:
        length = data[start + 2] << 8 | data[start + 3]
        header = (first & 15) * 4
        return length if IPV4_HEADER <= header <= length <= room else 0
    if first >> 4 == 6 and room >= IPV6_HEADER:
        length = IPV6_HEADER + (data[start + 4] << 8 | data[start + 5])
        return length if length <= room else 0
    return 0


def source(data: memoryview | bytes, start: int) -> bytes:
    """Source address (4 or 16 bytes) of a packet that :func:`packet_length` accepted."""
    if data[start] >> 4 == 4:
        return bytes(data[start + 12 : start + 16])
    return bytes(data[start + 8 : start + 24])


def destination(data: memoryview | bytes, start: int) -> bytes:
    """Destination address (4 or 16 bytes) of a packet that :func:`packet_length` accepted."""
    if data[start] >> 4 == 4:
        return bytes(data[start + 16 : start + 20])
    return bytes(data[start + 24 : start + 40])


def header_length(data: memoryview | bytes, start: int) -> int:
    """Length of the IPv4 header with options, or of the fixed IPv6 header."""
    first = data[start]
    return (first & 15) * 4 if first >> 4 == 4 else IPV6_HEADER


def is_fragment(data: memoryview | bytes, start: int) -> bool:
    """True for a fragment (IPv6: where its header comes first); of a packet that :func:`packet_length` accepted."""
    if data[start] >> 4 == 4:
        return bool(data[start + 6] & 0x3F or data[start + 7])
    return data[start + 6] == FRAGMENT


def transport(data: memoryview, start: int, end: int) -> tuple[int, int] | None:
    """(protocol, offset from ``start``) of the transport header of an unfragmented packet, or None.

    ``end`` is the end of what can be read, which may be less than the packet.
    """
    if data[start] >> 4 == 4:
        fragment = (data[start + 6] << 8 | data[start + 7]) & 0x3FFF
        return None if fragment else (data[start + 9], header_length(data, start))
    return _after_extensions(data, start, end)


def _after_extensions(data: memoryview, start: int, end: int) -> tuple[int, int] | None:
    following, offset = data[start + 6], IPV6_HEADER
    while following in _EXTENSIONS:
        if start + offset + 2 > end:
            return None
        following, length = data[start + offset], data[start + offset + 1]
        offset += 8 * (length + 1)
    return (following, offset) if start + offset <= end else None
