"""Small packets in: equal UDP packets that follow one another are written to the TUN as one superpacket.

A write to the TUN costs as much as everything else that is done for a small packet.  The kernel cuts such a
superpacket (UDP segmentation, Linux 6.2) into the packets that it was made from: same addresses, ports, TOS, TTL,
flow label, flags and length.  Two things it writes anew, so packets whose own would change are not joined: the UDP
checksum (a sum that the sender's kernel finished is never replaced, only one it left open or vouches for), and the
IPv4 identification, which counts up - where "don't fragment" is set it means nothing (RFC 6864).

Only what arrived together is joined, nothing waits.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER, Tun
from qvpn.tunnel import ip
from qvpn.tunnel.drops import DropReason

SEGMENTS = 64
"""Packets in one superpacket that every kernel takes."""

MAX_IP = 65_535
_UDP_HEADER = 8
_CHECKSUM = 6
_JOINABLE_FLAGS = (offload.NEEDS_CSUM, offload.DATA_VALID)
_U16 = struct.Struct(">H")


class _Shape(NamedTuple):
    """What equal UDP packets have in common."""

    size: int
    """Bytes of each, with the virtio header."""
    transport: int
    """Where the UDP header begins, counted from the virtio header."""
    fields: tuple[tuple[int, int], ...]
    """(offset, length) of what must be equal: all but identification and checksums."""
    counted: bool
    """The IPv4 identification matters, and counts up."""


_Fields = tuple[tuple[int, int], ...]

_Candidate = tuple[Peer, _Shape, tuple[bytes, ...], memoryview]
"""A packet, as its shape and key tell it, of this peer."""

_FIELDS_IPV4: _Fields = ((0, 14), (16, 4), (22, 14))
_FIELDS_IPV6: _Fields = ((0, 56),)


def udp_shape(data: memoryview) -> _Shape | None:
    """The shape of the first packet in ``data``, if it may be joined and ``data`` could be packets of its length."""
    if len(data) <= 38 or data[0] not in _JOINABLE_FLAGS or data[1] != offload.GSO_NONE:
        return None
    if data[10] == 0x45 and data[19] == ip.UDP and not data[16] & 0x3F and not data[17]:
        size, transport, fields = VNET_HEADER + (data[12] << 8 | data[13]), 30, _FIELDS_IPV4
        counted = not data[16] & 0x40
    elif data[10] >> 4 == 6 and data[16] == ip.UDP and len(data) > 58:
        size, transport, fields, counted = 50 + (data[14] << 8 | data[15]), 50, _FIELDS_IPV6, False
    else:
        return None
    if (
        size <= transport + _UDP_HEADER
        or len(data) % size
        or data[transport + 4] << 8 | data[transport + 5] != (size - transport)
    ):
        return None
    flags, _, hdr_len, _, start, offset = offload.VIRTIO.unpack_from(data)
    if hdr_len > size - VNET_HEADER:
        return None
    if flags == offload.NEEDS_CSUM and (start != transport - VNET_HEADER or offset != _CHECKSUM):
        return None
    if flags == offload.DATA_VALID and not (data[transport + _CHECKSUM] or data[transport + _CHECKSUM + 1]):
        return None  # none was sent, so none may be made
    return _Shape(size, transport, fields, counted)


class UdpMerger:
    """One growing superpacket.  The caller flushes it before it writes anything else, and at the end of a batch."""

    def __init__(self, table: PeerTable, tun: Tun, write_earlier: Callable[[], None]) -> None:
        """``write_earlier()``: write what was accepted before."""
        self._table = table
        self._write_earlier = write_earlier
        self._tun = tun
        self._buffer = memoryview(bytearray(MAX_IP + VNET_HEADER))
        self._array = np.frombuffer(self._buffer, np.uint8)
        self._peer: Peer | None = None
        self._shape: _Shape | None = None
        self._key: tuple[bytes, ...] = ()
        self._end = 0
        self._next_id = 0
        self.count = 0
        """Packets in the superpacket; 0: there is none."""
        self._candidate: _Candidate | None = None
        """The packet that was accepted last and may begin a superpacket: the last one of ``packets``."""

    def add(self, peer: Peer, plaintext: memoryview, packets: list[memoryview]) -> bool:
        """Take the packets of one record; False, and nothing done, if they do not belong together.

        ``packets`` are accepted ones that are not written yet: the last of them may be taken out of it, and the rest
        is written before anything else.
        """
        candidate, self._candidate = self._candidate, None  # whatever happens now, it is no longer the last
        shape = udp_shape(plaintext)
        if shape is None:
            return False
        key = tuple(bytes(plaintext[at : at + size]) for at, size in shape.fields)
        many = len(plaintext) // shape.size
        if many > 1 and not _equal(plaintext, shape, key, many):
            return False
        if self._table.allowed.lookup(ip.source(plaintext, VNET_HEADER)) is not peer:
            return False
        known = self.count and peer is self._peer and shape == self._shape and key == self._key
        if not known and many == 1:
            if (
                candidate is None
                or candidate[:3] != (peer, shape, key)
                or not _follows(shape, candidate[3], plaintext)
            ):
                self._candidate = (peer, shape, key, plaintext)
                return False
            packets.pop()
            self._write_earlier()
            self._start(peer, shape, key, candidate[3])
            self._append(shape, candidate[3], 1)
        else:
            self._write_earlier()
        peer.source_checks += many
        step = SEGMENTS * shape.size
        for start in range(0, len(plaintext), step):
            self._join(peer, shape, key, plaintext[start : start + step])
        return True

    def forget(self) -> None:
        """What was accepted last is written, or its buffer is used again."""
        self._candidate = None

    def flush(self) -> None:
        """Write the superpacket."""
        peer, shape, count = self._peer, self._shape, self.count
        if not count or peer is None or shape is None:
            return
        self.count = 0
        if count > 1:
            _write_header(self._buffer, shape, self._end)
        if self._tun.write_batch([self._buffer[: self._end]]):
            peer.tun_writes += count
            peer.received_packets += count
            peer.received_bytes += count * (shape.size - VNET_HEADER)
        else:
            peer.tun_refused += count
            peer.drops.count(DropReason.TUN_FULL, count)

    def _join(self, peer: Peer, shape: _Shape, key: tuple[bytes, ...], plaintext: memoryview) -> None:
        many = len(plaintext) // shape.size
        if not (self.count and self._continues(peer, shape, key, plaintext, many)):
            self._start(peer, shape, key, plaintext)
        self._append(shape, plaintext, many)

    def _continues(self, peer: Peer, shape: _Shape, key: tuple[bytes, ...], plaintext: memoryview, many: int) -> bool:
        payload = shape.size - shape.transport - _UDP_HEADER
        return (
            peer is self._peer
            and shape == self._shape
            and key == self._key
            and self.count + many <= SEGMENTS
            and self._end + many * payload <= MAX_IP
            and (not shape.counted or _U16.unpack_from(plaintext, 14)[0] == self._next_id)
        )

    def _start(self, peer: Peer, shape: _Shape, key: tuple[bytes, ...], plaintext: memoryview) -> None:
        """Begin a superpacket with the header of the first packet."""
        self.flush()
        self._peer, self._shape, self._key = peer, shape, key
        self._end = shape.transport + _UDP_HEADER
        self._buffer[: self._end] = plaintext[: self._end]

    def _append(self, shape: _Shape, plaintext: memoryview, many: int) -> None:
        header = shape.transport + _UDP_HEADER
        payload = shape.size - header
        end = self._end + many * payload
        if many == 1:
            self._buffer[self._end : end] = plaintext[header:]
        else:
            source = np.ndarray((many, payload), np.uint8, plaintext, header, (shape.size, 1))
            self._array[self._end : end].reshape(many, payload)[:] = source
        self._end = end
        self.count += many
        if shape.counted:
            self._next_id = (_U16.unpack_from(plaintext, (many - 1) * shape.size + 14)[0] + 1) & 0xFFFF


def _follows(shape: _Shape, before: memoryview, after: memoryview) -> bool:
    """True if two packets of one shape and key fit one superpacket, in this order."""
    if 2 * shape.size > MAX_IP:
        return False
    return not shape.counted or (_U16.unpack_from(after, 14)[0] - _U16.unpack_from(before, 14)[0]) & 0xFFFF == 1


def _equal(data: memoryview, shape: _Shape, key: tuple[bytes, ...], many: int) -> bool:
    """True if all packets of a record have this shape and key.  The first neighbour decides most cases cheaply."""
    size = shape.size
    at, length = shape.fields[-1]
    if data[size + at : size + at + length] != key[-1]:
        return False
    for (at, length), wanted in zip(shape.fields, key, strict=True):
        if np.ndarray((many, length), np.uint8, data, at, (size, 1)).tobytes() != wanted * many:
            return False
    if shape.counted:
        numbers = np.ndarray((many,), ">u2", data, 14, (size,)).tolist()
        if numbers != [(numbers[0] + place) & 0xFFFF for place in range(many)]:
            return False
    sums = np.ndarray((many,), "<u2", data, shape.transport + _CHECKSUM, (size,))
    return data[0] == offload.NEEDS_CSUM or bool(sums.all())


def _write_header(data: memoryview, shape: _Shape, end: int) -> None:
    """Make the header of the first packet that of the superpacket; the kernel finishes the UDP checksums."""
    transport, inner = shape.transport, VNET_HEADER
    header = transport + _UDP_HEADER
    offload.VIRTIO.pack_into(
        data,
        0,
        offload.NEEDS_CSUM,
        offload.GSO_UDP_L4,
        header - inner,
        shape.size - header,
        transport - inner,
        _CHECKSUM,
    )
    if data[inner] >> 4 == 4:
        _U16.pack_into(data, inner + 2, end - inner)
        data[inner + 10 : inner + 12] = b"\0\0"
        _U16.pack_into(data, inner + 10, ~offload.ones_sum(data[inner:transport]) & 0xFFFF)
        addresses = data[inner + 12 : transport]
    else:
        _U16.pack_into(data, inner + 4, end - transport)
        addresses = data[inner + 8 : transport]
    _U16.pack_into(data, transport + 4, end - transport)
    total = offload.ones_sum(addresses) + ip.UDP + end - transport
    _U16.pack_into(data, transport + _CHECKSUM, (total - 1) % 0xFFFF + 1)
