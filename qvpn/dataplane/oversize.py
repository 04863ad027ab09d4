"""Inner packets that are longer than what one datagram to their peer can carry: what becomes of them.

TCP superpackets never come here, for they are cut smaller where they are sealed.  Of the rest:

- IPv4 that may be fragmented is fragmented, as a router does (RFC 791, 3.2);
- while the path is being searched, and so its size is not final, a packet goes as it is, in an outer datagram that
  the network may cut: an answer now would be remembered by its sender for minutes;
- IPv6 of up to 1280 bytes goes like this at all times, for IPv6 senders need not send less (RFC 8200, 5);
- outside over IPv6 nothing can be cut on the way, nor does Linux cut what fits its first link: then IPv6 packets of
  up to 1280 bytes are fragmented inside, in their sender's name.  RFC 8200 leaves that to the sender, but the only
  other way is to lose them, and whoever gets the fragments joins them (:func:`fragments6`).  Longer ones are dropped
  without an answer while the path is searched;
- all else is dropped, counted as ``too_big``, and its sender is told (:mod:`qvpn.dataplane.toobig`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from qvpn.dataplane.peers import Peer
from qvpn.dataplane.toobig import TooBig
from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER, Tun
from qvpn.netio.offload import NEEDS_CSUM, Superpacket, ones_sum
from qvpn.tunnel import ip
from qvpn.tunnel.drops import DropReason

IPV6_LEAST = 1280
_DONT_FRAGMENT, _MORE = 0x4000, 0x2000
_COPIED = 0x80
_U16 = struct.Struct(">H")
_FRAGMENT = struct.Struct(">BBH4s")
"""Next header, reserved, offset and flags, identification."""
_NEXT = 6
_HOP_BY_HOP, _ROUTING, _OPTIONS = 0, 43, 60
_EXTENSIONS = (_HOP_BY_HOP, _ROUTING, _OPTIONS)
_PER_FRAGMENT = (_HOP_BY_HOP, _ROUTING)
"""Routers read these, so each fragment has them, with all before them."""


class Oversize:
    """Decides, and answers senders."""

    def __init__(self, tun: Tun) -> None:
        self.answers = TooBig(tun)

    def take(self, peer: Peer, packet: memoryview, now: float) -> tuple[list[memoryview], bool]:
        """(plain packets to send instead, each behind its virtio header; whether they may be cut outside).

        ``packet``: one plain packet behind its virtio header, too long for the peer's path.
        """
        inner, mtu = packet[VNET_HEADER:], peer.inner_mtu
        cut_outside = peer.endpoint is not None and peer.endpoint.cuts
        if inner[0] >> 4 == 4:
            if not _U16.unpack_from(inner, 6)[0] & _DONT_FRAGMENT and mtu >= ip.header_length(inner, 0) + 8:
                return [memoryview(part) for part in fragments(packet, mtu)], False
        elif len(inner) > IPV6_LEAST:
            mtu = max(mtu, IPV6_LEAST)
        elif cut_outside:
            return [packet], True
        elif parts := fragments6(packet, mtu, os.urandom(4)):
            return [memoryview(part) for part in parts], False
        if peer.provisional and cut_outside:
            return [packet], True
        peer.drops.count(DropReason.TOO_BIG)
        if not peer.provisional:
            self.answers.answer(packet, mtu, now)
        return [], False


def datagrams(data: memoryview, packet: Superpacket) -> Iterator[memoryview]:
    """Cut the superpacket at the start of ``data`` into plain packets, each behind its virtio header."""
    for place in range(packet.chunks):
        first = packet.header + place * packet.segment
        size = min(packet.segment, packet.header + packet.payload - first)
        part = memoryview(bytearray(data[: packet.header]) + data[first : first + size])
        offload.settle(part, 0, packet, place, size)
        yield part


def fragments(packet: memoryview, mtu: int) -> list[bytes]:
    """An IPv4 packet of which each fragment is at most ``mtu`` bytes, each behind an empty virtio header.

    A checksum that was left to the network card is finished first, for it covers all fragments.
    """
    whole = bytearray(packet)
    if whole[0] == NEEDS_CSUM:
        _finish_checksum(whole)
    inner = memoryview(whole)[VNET_HEADER:]
    header = ip.header_length(inner, 0)
    head, payload = bytes(inner[:header]), inner[header:]
    flags = _U16.unpack_from(head, 6)[0]
    parts, done = [], 0
    while done < len(payload):
        room = mtu - len(head)
        size = len(payload) - done if len(payload) - done <= room else room & ~7
        more = _MORE if done + size < len(payload) else flags & _MORE
        field = (flags & ~0x3FFF & 0xFFFF) | more | ((flags & 0x1FFF) + done // 8)
        parts.append(bytes(VNET_HEADER) + _headed(head, size, field) + bytes(payload[done : done + size]))
        if not done:
            head = _later_head(head)
        done += size
    return parts


def fragments6(packet: memoryview, mtu: int, identification: bytes) -> list[bytes]:
    """An IPv6 packet in fragments of at most ``mtu`` bytes (RFC 8200, 4.5), each behind an empty virtio header.

    ``identification``: four bytes that nobody can guess (RFC 7739); a packet that is a fragment already is cut
    smaller and keeps its own.  Empty where its headers are malformed, or leave no room.  A checksum that was left to
    the network card is finished first.
    """
    whole = bytearray(packet)
    if whole[0] == NEEDS_CSUM:
        _finish_checksum(whole)
    inner = memoryview(whole)[VNET_HEADER:]
    place, following = _before_fragment(inner)
    room = (mtu - place - _FRAGMENT.size) & ~7
    if not place or room < 8:
        return []
    first, more, rest = 0, 0, inner[place:]
    if inner[following] == ip.FRAGMENT:
        if len(rest) < _FRAGMENT.size:
            return []
        kind, _, field, identification = _FRAGMENT.unpack_from(rest)
        first, more, rest = field & ~7, field & 1, rest[_FRAGMENT.size :]
    else:
        kind = inner[following]
    head = bytearray(inner[:place])
    head[following] = ip.FRAGMENT
    parts = []
    for start in range(0, len(rest), room):
        piece = rest[start : start + room]
        last = start + room >= len(rest)
        _U16.pack_into(head, 4, place - ip.IPV6_HEADER + _FRAGMENT.size + len(piece))
        field = first + start | (more if last else 1)
        parts.append(bytes(VNET_HEADER) + head + _FRAGMENT.pack(kind, 0, field, identification) + piece)
    return parts


def _before_fragment(inner: memoryview) -> tuple[int, int]:
    """(where a fragment header has its place, where the header before it names what follows); (0, 0): malformed.

    Before it stand hop-by-hop options, and a routing header with the options in front of that (RFC 8200, 4.1, 4.5).
    """
    place, following = ip.IPV6_HEADER, _NEXT
    end, named = ip.IPV6_HEADER, _NEXT
    while inner[named] in _EXTENSIONS:
        if end + 8 > len(inner):
            return 0, 0
        kind, here = inner[named], end
        end += 8 * (inner[here + 1] + 1)
        named = here
        if kind in _PER_FRAGMENT:
            place, following = end, named
    return (place, following) if end <= len(inner) else (0, 0)


def _headed(head: bytes, size: int, field: int) -> bytes:
    made = bytearray(head)
    _U16.pack_into(made, 2, len(made) + size)
    _U16.pack_into(made, 6, field)
    made[10:12] = bytes(2)
    _U16.pack_into(made, 10, ~ones_sum(memoryview(made)) & 0xFFFF)
    return bytes(made)


def _later_head(head: bytes) -> bytes:
    """The header of all fragments but the first: only options with the copied flag (RFC 791, 3.1)."""
    kept, position = bytearray(), ip.IPV4_HEADER
    while position < len(head) and head[position] != 0:
        length = 1 if head[position] == 1 else head[position + 1] if position + 1 < len(head) else 0
        if not 0 < length <= len(head) - position:
            break
        if head[position] & _COPIED:
            kept += head[position : position + length]
        position += length
    kept += bytes(-len(kept) % 4)
    return bytes([0x40 | (ip.IPV4_HEADER + len(kept)) // 4]) + head[1 : ip.IPV4_HEADER] + bytes(kept)


def _finish_checksum(packet: bytearray) -> None:
    """What ``NEEDS_CSUM`` asks for: the field holds the pseudo-header's sum, the rest is added."""
    start, offset = struct.unpack_from("<HH", packet, 6)
    covered = packet[VNET_HEADER + start :]
    covered += bytes(len(covered) & 1)
    checksum = ~ones_sum(memoryview(covered)) & 0xFFFF
    place = VNET_HEADER + start + offset
    if place + 2 <= len(packet):
        _U16.pack_into(packet, place, checksum or 0xFFFF)
