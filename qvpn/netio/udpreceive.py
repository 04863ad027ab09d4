"""Receiving over UDP: one buffer for what the kernel joined, or what is gathered here where it joins nothing."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections import Counter, deque

from qvpn.netio.base import Address, Received
from qvpn.netio.udpsocket import IPV6_TCLASS, KNOWN_ADDRESSES, MAX_SEND, UDP_GRO, UdpSocket, address_of, try_option

_ECN = 3
_SINGLE = [(socket.IPPROTO_IP, socket.IP_TOS, b"\0")]
"""Ancillary data of the commonest receive that was not joined."""
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("qq")
_MAX_WAIT = 10.0
"""Seconds; what claims to have waited for longer came before the wall clock was set."""

ROOM = 65_536
"""What a receive may need: nobody knows before whether the kernel joined datagrams."""

HALF = MAX_SEND // 2
"""Bytes of each send of a superpacket that takes two, at least: behind such a receive its other half may wait."""

GATHERED = 64
"""Datagrams gathered into one buffer where the kernel joins none: as many as a block has counters."""

ANCILLARY = 128
"""Bytes of ancillary data that one receive may bring: time, ECN bits, length of each datagram."""

RECEIVE_BYTES = 2 * ROOM
DRAINED = 64
"""Receives kept from a socket that is closed."""


class UdpReceiver:
    """The receiving side of :class:`~qvpn.netio.udp.UdpBind`."""

    def __init__(self, listener: UdpSocket) -> None:
        self._listener = listener
        self._connected: dict[Address, UdpSocket] = {}
        self._by_descriptor = {listener.socket.fileno(): listener}
        self._errors: Counter[str] = Counter()
        self._known: dict[tuple[object, ...], Address] = {}
        self._drained: deque[Received] = deque(maxlen=DRAINED)
        self._buffers: list[memoryview] = []
        self._turn = 0
        self._ancillary: list[tuple[int, int, bytes]] = []
        self._said = (0, 0)
        """The last ancillary data other than the commonest, and what it says: the next is most often the same."""

    def receive_batch(self, limit: int, descriptor: int = -1) -> list[Received]:
        batch: list[Received] = []
        while self._drained and len(batch) < limit:
            batch.append(self._drained.popleft())
        ready = self._by_descriptor.get(descriptor)
        if ready is not None:
            self._receive_from(ready, batch, limit)
            return batch
        sockets = [self._listener, *self._connected.values()]
        self._turn += 1
        for number in range(len(sockets)):
            self._receive_from(sockets[(self._turn + number) % len(sockets)], batch, limit)
        return batch

    def _receive_from(self, sock: UdpSocket, batch: list[Received], limit: int) -> None:
        """Append what waits on one socket, until ``batch`` has as many as the limit."""
        buffers = self._buffers
        while (number := len(batch)) < limit:
            received = self._receive(sock, buffers[number] if number < len(buffers) else self._buffer(number))
            if received is None:
                return
            batch.append(received)
            length, segment = received.length, received.segment
            if length == segment:
                if number + 1 < limit and not self._gather(sock, received, batch):
                    return
            elif length >= HALF and not length % segment and not self._gather_half(sock, received, batch):
                return

    def _gather(self, sock: UdpSocket, first: Received, batch: list[Received]) -> bool:
        """Receive behind a datagram that came alone, as long as equal ones follow: a batch as the kernel joins them.

        What does not belong to it, which the receive that finds that out has got already, is appended to ``batch``.
        False: nothing more waits.
        """
        buffer, size, end = first.buffer, first.length, first.length
        for _ in range(GATHERED - 1):
            if not size or end > len(buffer) - ROOM:
                break
            received = self._receive(sock, buffer[end:])
            if received is None:
                first.length = end
                return False
            length = received.length
            alike = received.address is first.address and received.ecn == first.ecn
            if not alike or length > size or not length or received.segment != length:
                batch.append(received)
                break
            end += length
            if length < size:
                break
        first.length = end
        return True

    def _gather_half(self, sock: UdpSocket, first: Received, batch: list[Received]) -> bool:
        """Receive once more behind what may be half of a superpacket, which takes two sends; as :meth:`_gather`."""
        end, size = first.length, first.segment
        if end > len(first.buffer) - ROOM:
            return True
        received = self._receive(sock, first.buffer[end:])
        if received is None:
            return False
        if (
            received.address is first.address
            and received.ecn == first.ecn
            and received.length
            and (received.segment == size or received.length == received.segment < size)
        ):
            first.joined, first.length = end // size, end + received.length
        else:  # not part of it: in a buffer of its own, of which views are kept
            held = self._buffer(len(batch))
            held[: received.length] = received.buffer[: received.length]
            received.buffer = held
            batch.append(received)
        return True

    def _receive(self, sock: UdpSocket, buffer: memoryview) -> Received | None:
        for _ in range(2):  # the first error may be an ICMP answer to something sent long ago
            try:
                length, ancillary, _, source = sock.receive((buffer,), ANCILLARY)
            except BlockingIOError:
                return None
            except OSError as error:
                self._count(error)
                continue
            if ancillary == _SINGLE:
                return Received(buffer, length, length, self._known.get(source) or self._address_of(source))
            waited = 0.0
            if sock.stamped and ancillary and ancillary[0][1] == _SO_TIMESTAMPNS:
                waited = _since(ancillary.pop(0)[2])
            if ancillary != self._ancillary:
                self._ancillary, self._said = ancillary, _ancillary(ancillary)
            segment, ecn = self._said
            address = self._known.get(source) or self._address_of(source)
            return Received(buffer, length, segment or length, address, ecn, waited)
        return None

    def watch_waits(self, descriptor: int, on: bool) -> None:
        sock = self._by_descriptor.get(descriptor)
        if sock is not None and sock.stamped != on:
            sock.stamped = try_option(sock.socket, socket.SOL_SOCKET, _SO_TIMESTAMPNS, int(on)) and on

    def _buffer(self, number: int) -> memoryview:
        while number >= len(self._buffers):
            self._buffers.append(memoryview(bytearray(RECEIVE_BYTES)))
        return self._buffers[number]

    def _address_of(self, source: tuple[object, ...]) -> Address:
        address = self._known.get(source)
        if address is None:
            if len(self._known) >= KNOWN_ADDRESSES:
                self._known.clear()
            address = self._known[source] = address_of(source)
        return address

    def _drain(self, gone: UdpSocket) -> None:
        """Keep what waits on a socket that is to be closed."""
        while (received := self._receive(gone, memoryview(bytearray(RECEIVE_BYTES)))) is not None:
            self._drained.append(received)
            if len(self._drained) == DRAINED:
                break

    def _count(self, error: OSError) -> None:
        if isinstance(error, socket.gaierror):  # an address of the other family, in the words of getaddrinfo
            self._errors["EAFNOSUPPORT"] += 1
        else:
            self._errors[errno.errorcode.get(error.errno or 0, "unknown")] += 1


def _since(stamp: bytes) -> float:
    """Seconds since the kernel took a datagram, at least a little; 0 if that cannot be told."""
    seconds, nanoseconds = _TIMESPEC.unpack(stamp)
    waited = time.time() - seconds - nanoseconds * 1e-9
    return max(waited, 1e-9) if waited < _MAX_WAIT else 0.0


def _ancillary(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, int]:
    """(length of each datagram, 0 if nothing was joined; ECN bits) of one receive."""
    segment = ecn = 0
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_UDP and kind == UDP_GRO:
            segment = int(struct.unpack_from("i", data)[0])
        elif level == socket.IPPROTO_IP and kind == socket.IP_TOS:
            ecn = data[0] & _ECN
        elif level == socket.IPPROTO_IPV6 and kind == IPV6_TCLASS:
            ecn = int(struct.unpack_from("i", data)[0]) & _ECN
    return segment, ecn
