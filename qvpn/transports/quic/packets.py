"""Between receives and datagrams, and between packets and sends: what the kernel joins and cuts, done here again.

The first byte of a QUIC packet has bit 0x40 set (RFC 9000, 17), that of our own datagrams never (PROTOCOL.md,
chapters 3 and 10), so each segment that arrives goes one way or the other by that bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from qvpn.netio.base import Address, Bind, Received

QUIC_BIT, LONG_HEADER = 0x40, 0x80

MOST_DATAGRAMS = 64
"""Of one receive or send: as many as a block of records has."""

RECEIVE_BYTES = 1 << 17


class Packet(NamedTuple):
    """A UDP datagram to be sent."""

    data: bytes
    place: Address
    datagrams: int = 0
    """Of ours that are in it, where that is known."""


def which_are_quic(received: Received) -> list[bool] | None:
    """For each segment; None if there is no QUIC packet in it."""
    segment, length = received.segment, received.length
    if not segment or not length:
        return None
    if length <= segment:
        return [True] if received.buffer[0] & QUIC_BIT else None
    found = [bool(byte & QUIC_BIT) for byte in bytes(received.buffer[:length:segment])]
    return found if any(found) else None


def segment_of(received: Received, place: int) -> memoryview:
    """Segment number ``place``."""
    start = place * received.segment
    return received.buffer[start : min(start + received.segment, received.length)]


def alone(received: Received, place: int) -> Received:
    """Segment number ``place`` as a receive of its own."""
    data = segment_of(received, place)
    return Received(data, len(data), len(data), received.address, received.ecn, received.waited)


def copied(received: Received) -> Received:
    """For a later call: what it came in belongs to the next receive."""
    whole = memoryview(bytes(received.buffer[: received.length]))
    return replace(received, buffer=whole)


class Buffers:
    """Memory for what one call hands on; :meth:`reset` before the next."""

    def __init__(self) -> None:
        self._buffers: list[memoryview] = []
        self._used = 0

    def __len__(self) -> int:
        return len(self._buffers)

    def reset(self) -> None:
        self._used = 0

    def _next(self) -> memoryview:
        if self._used >= len(self._buffers):
            self._buffers.append(memoryview(bytearray(RECEIVE_BYTES)))
        self._used += 1
        return self._buffers[self._used - 1]

    def join(self, datagrams: Sequence[bytes], address: Address, waited: float) -> list[Received]:
        """Datagrams of one connection, equal lengths side by side, as the kernel does with UDP."""
        found: list[Received] = []
        first = 0
        while first < len(datagrams):
            size, end = len(datagrams[first]), first + 1
            last = min(len(datagrams), first + MOST_DATAGRAMS, first + RECEIVE_BYTES // size)
            while end < last and len(datagrams[end]) == size:
                end += 1
            if end < last and len(datagrams[end]) < size:
                end += 1
            whole = b"".join(datagrams[first:end])
            buffer = self._next()
            buffer[: len(whole)] = whole
            found.append(Received(buffer, len(whole), size, address, waited=waited))
            first = end
        return found


def send_runs(lower: Bind, packets: Sequence[Packet]) -> list[Packet]:
    """Neighbours of equal length to one address in one system call; returns what was not taken."""
    refused: list[Packet] = []
    first = 0
    while first < len(packets):
        data, place, _ = packets[first]
        size, end = len(data), first + 1
        while end < len(packets) and end - first < MOST_DATAGRAMS and packets[end].place is place:
            length = len(packets[end].data)
            if length > size:
                break
            end += 1
            if length < size:
                break
        whole = data if end == first + 1 else b"".join(packet.data for packet in packets[first:end])
        taken = lower.send_segments(memoryview(whole), size, place)
        refused += packets[first + taken : end]
        first = end
    return refused
