"""The answer to an inner packet that is too long for its peer's path: ICMP, to its sender, through the TUN.

IPv4: destination unreachable, fragmentation needed, with the MTU (RFC 1191, 4).  IPv6: packet too big (RFC 4443,
3.2).  Sent only about packets that a peer's allowed IPs route into the tunnel, and never about an ICMP error, a
later fragment, or anything to or from an address that is not one host's (RFC 1122, 3.2.2; RFC 4443, 2.4 e).

The answer comes from the packet's own destination: Linux takes no IPv4 packet from a device whose source is an
address of its own (the tunnel's), and a strict reverse path filter none whose source is not routed to that device.

Answers are limited by a token bucket for each of 256 groups of senders and one for all (RFC 4443, 2.4 f).
"""

from __future__ import annotations

import struct

from qvpn.netio.base import VNET_HEADER, Tun
from qvpn.netio.offload import ones_sum
from qvpn.tunnel import ip

RATE, BURST = 10.0, 10.0
"""Answers per second, and at once, to one group of senders."""

ALL_RATE, ALL_BURST = 200.0, 200.0
GROUPS = 256

_V4_TOTAL, _V6_TOTAL = 576, 1280
"""Longest answers (RFC 1812, 4.3.2.3; RFC 4443, 2.4 c)."""

_LEAST = 68
"""What each IPv4 link carries (RFC 791, 3.2): no less is told, whatever the records' own bytes leave of one."""

_ICMP, _ICMPV6, _FRAGMENT = 1, 58, 44
_V4_ERRORS = frozenset({3, 4, 5, 11, 12})
_HOPS = 64
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_IPV6 = struct.Struct(">IHBB16s16s")


class _Bucket:
    __slots__ = ("_burst", "_rate", "_time", "_tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._time = burst, 0.0

    def take(self, now: float) -> bool:
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._time) * self._rate)
        self._time = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class TooBig:
    """Answers senders, as often as the limits allow."""

    def __init__(self, tun: Tun) -> None:
        self._tun = tun
        self._groups: dict[int, _Bucket] = {}
        self._all = _Bucket(ALL_RATE, ALL_BURST)
        self.answered = 0

    def answer(self, packet: memoryview, mtu: int, now: float) -> bool:
        """Tell the sender of this packet (virtio header before it) what its path carries; False: no answer."""
        inner = packet[VNET_HEADER:]
        if not answerable(inner):
            return False
        group = hash(ip.source(inner, 0)) % GROUPS
        bucket = self._groups.setdefault(group, _Bucket(RATE, BURST))
        if not bucket.take(now) or not self._all.take(now):
            return False
        answer = v4_answer(inner, mtu) if inner[0] >> 4 == 4 else v6_answer(inner, mtu)
        if not self._tun.write_batch([memoryview(bytes(VNET_HEADER) + answer)]):
            return False
        self.answered += 1
        return True


def answerable(inner: memoryview) -> bool:
    """Whether an ICMP error may be sent about this well-formed packet."""
    source, destination = ip.source(inner, 0), ip.destination(inner, 0)
    if len(source) == 4:
        if not _v4_host(source) or not _v4_host(destination) or (inner[6] & 0x1F or inner[7]):
            return False
        return not (inner[9] == _ICMP and _byte(inner, ip.header_length(inner, 0)) in _V4_ERRORS)
    if not any(source) or source[0] == 0xFF or destination[0] == 0xFF:
        return False
    return not _v6_error(inner)


def _v4_host(address: bytes) -> bool:
    return 0 < address[0] < 224 and address[0] != 127


def _v6_error(inner: memoryview) -> bool:
    """An ICMPv6 error, or a first fragment of one; a packet whose headers cannot be followed counts as one."""
    found = ip.transport(inner, 0, len(inner))
    if found is None:
        return True
    protocol, offset = found
    if protocol == _FRAGMENT:
        if len(inner) < offset + 9 or inner[offset + 2] or inner[offset + 3] & 0xF8:
            return len(inner) < offset + 9  # of a later fragment nobody can tell; it may be answered
        protocol, offset = inner[offset], offset + 8
    return protocol == _ICMPV6 and _byte(inner, offset) < 128


def _byte(data: memoryview, place: int) -> int:
    return data[place] if place < len(data) else 0


def v4_answer(inner: memoryview, mtu: int) -> bytes:
    """Type 3, code 4, with as much of the packet as fits."""
    quote = bytes(inner[: _V4_TOTAL - 28])
    icmp = _sealed(struct.pack(">BBHHH", 3, 4, 0, 0, min(max(mtu, _LEAST), 0xFFFF)) + quote)
    total = ip.IPV4_HEADER + len(icmp)
    fields = (0x45, 0xC0, total, 0, 0, _HOPS, _ICMP)
    addresses = (ip.destination(inner, 0), ip.source(inner, 0))
    checksum = ~ones_sum(memoryview(_IPV4.pack(*fields, 0, *addresses))) & 0xFFFF
    return _IPV4.pack(*fields, checksum, *addresses) + icmp


def v6_answer(inner: memoryview, mtu: int) -> bytes:
    """Type 2, with as much of the packet as fits."""
    quote = bytes(inner[: _V6_TOTAL - 48])
    body = struct.pack(">BBHI", 2, 0, 0, max(mtu, _LEAST)) + quote
    ends = ip.destination(inner, 0) + ip.source(inner, 0)
    icmp = _sealed(body, ends + struct.pack(">II", len(body), _ICMPV6))
    return _IPV6.pack(6 << 28, len(icmp), _ICMPV6, _HOPS, ends[:16], ends[16:]) + icmp


def _sealed(body: bytes, pseudo: bytes = b"") -> bytes:
    """The message with its checksum, which stands in bytes 2 and 3."""
    covered = pseudo + body + bytes(len(body) & 1)
    return body[:2] + (~ones_sum(memoryview(covered)) & 0xFFFF).to_bytes(2, "big") + body[4:]
