"""Outer datagrams over UDP sockets.

One unconnected *listener* takes datagrams from anyone.  Each peer endpoint that :meth:`UdpBind.connect` names gets a
*connected* socket on the same port (SO_REUSEPORT): sending on it is cheaper, and ICMP errors come back on it.  Which
socket a datagram arrives on means nothing: between bind and connect a socket takes foreign datagrams too.

Whole batches go through the kernel at once where it can: UDP_SEGMENT cuts one send into datagrams, UDP_GRO joins
received ones.  A socket whose device cannot is found out by the error of its first send, and sends one by one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from qvpn.netio.base import Address, Received
from qvpn.netio.errors import BindError, reason
from qvpn.netio.route import link_mtu

_UDP_SEGMENT, _UDP_GRO = 103, 104
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_DONT, _PMTUDISC_PROBE = 0, 3
"""Fragments allowed; never any, and no belief in ICMP: only the first link's MTU counts (ip(7))."""
_IP_RECVTOS, _IPV6_RECVTCLASS, _IPV6_TCLASS = 13, 66, 67
_ECN = 3
_SINGLE = [(socket.IPPROTO_IP, socket.IP_TOS, b"\0")]
"""Ancillary data of the commonest receive that was not joined."""
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("qq")
_MAX_WAIT = 10.0
"""Seconds; what claims to have waited for longer came before the wall clock was set."""

MAX_SEGMENTS = 64
"""Datagrams per segmented send that every kernel with UDP_SEGMENT takes."""

MAX_SEND = 65_507
"""Bytes per send over IPv4; IPv6 allows 20 more."""

ROOM = 65_536
"""What a receive may need: nobody knows before whether the kernel joined datagrams."""

HALF = MAX_SEND // 2
"""Bytes of each send of a superpacket that takes two, at least: behind such a receive its other half may wait."""

GATHERED = 64
"""Datagrams gathered into one buffer where the kernel joins none: as many as a block has counters."""

ANCILLARY = 128
"""Bytes of ancillary data that one receive may bring: time, ECN bits, length of each datagram."""

RECEIVE_BYTES = 2 * ROOM
SOCKET_BUFFER = 4 << 20
FALLBACK_PAYLOAD = 1280 - 48
"""Where the route's MTU cannot be read: what every IPv6 link carries."""

KNOWN_ADDRESSES = 4096
DRAINED = 64
"""Receives kept from a socket that is closed."""

_HEADERS = {4: 28, 6: 48}
_NO_SEGMENTATION = frozenset({errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP})
_STALE_ROUTE = frozenset(
    {errno.EINVAL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENETDOWN}
)

_SAID_BY_ICMP = frozenset({errno.ECONNREFUSED, errno.EMSGSIZE})
"""May be about a datagram sent long ago, or forged; what is true of this one is said again at the next try."""
_STALE_ERRORS = 2

SocketFactory = Callable[[int], socket.socket]
"""``factory(family)`` makes a datagram socket, as :func:`open_socket`."""


def open_socket(family: int) -> socket.socket:
    """A UDP socket of this family.  Raises OSError."""
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


class _UdpSocket:
    """A socket and what is known about it."""

    __slots__ = ("address", "ecn", "family", "receive", "segment", "segments", "send", "socket", "stamped")

    def __init__(self, sock: socket.socket, family: int, address: Address | None) -> None:
        self.socket = sock
        self.family = family
        self.address = address
        """Where it is connected to; None for the listener."""
        self.receive = sock.recvmsg_into
        self.send = sock.send if address is not None else None
        """Where there is one address to send to."""
        self.segments = True
        """UDP_SEGMENT has not failed on it."""
        self.segment = 0
        """What UDP_SEGMENT is set to."""
        self.ecn = 0
        """ECN bits that the outer headers get now."""
        self.stamped = False
        """Each receive says when it came."""

    def set_ecn(self, ecn: int) -> None:
        """One call when the bits change, none while they stay; a kernel that refuses leaves them as they are."""
        if self.family == socket.AF_INET6:
            _try_option(self.socket, socket.IPPROTO_IPV6, _IPV6_TCLASS, ecn)
        if self.family == socket.AF_INET or self.address is None:
            _try_option(self.socket, socket.IPPROTO_IP, socket.IP_TOS, ecn)
        self.ecn = ecn

    def set_segment(self, segment: int) -> None:
        self.socket.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, segment)
        self.segment = segment


class UdpBind:
    """UDP at one port, IPv4 and IPv6 where the listen address allows both (``::``)."""

    def __init__(
        self, listen: Address, *, factory: SocketFactory = open_socket, listener: socket.socket | None = None
    ) -> None:
        """Listen.  Port 0 takes any free one.  ``::`` falls back to ``0.0.0.0`` on a host without IPv6.

        ``listener``: a socket that listens there already and is taken over; then :meth:`connect` does nothing, for
        a socket on the same port, with buffers as large, may need rights that whoever takes over has not.

        Raises :class:`BindError`.
        """
        self._factory = factory
        self._errors: Counter[str] = Counter()
        self._known: dict[tuple[object, ...], Address] = {}
        self._drained: deque[Received] = deque(maxlen=DRAINED)
        self._buffers: list[memoryview] = []
        self._on_filenos: Callable[[], None] | None = None
        self._turn = 0
        self._connected: dict[Address, _UdpSocket] = {}
        self._connects = listener is None
        self._listener = self._listen(listen) if listener is None else _UdpSocket(listener, listener.family, None)
        port = self._listener.socket.getsockname()[1]
        ip = listen.ip if self._listener.family == _family(listen) else ipaddress.IPv4Address(0)
        self._local = Address(ip, port, listen.scope)
        self._closed = False
        self._ancillary: list[tuple[int, int, bytes]] = []
        self._said = (0, 0)
        """The last ancillary data other than the commonest, and what it says: the next is most often the same."""
        self._by_descriptor = {self._listener.socket.fileno(): self._listener}
        self._last_address: Address | None = None
        self._last_socket = self._listener

    # receiving

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

    def _receive_from(self, sock: _UdpSocket, batch: list[Received], limit: int) -> None:
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

    def _gather(self, sock: _UdpSocket, first: Received, batch: list[Received]) -> bool:
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

    def _gather_half(self, sock: _UdpSocket, first: Received, batch: list[Received]) -> bool:
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

    def _receive(self, sock: _UdpSocket, buffer: memoryview) -> Received | None:
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
            sock.stamped = _try_option(sock.socket, socket.SOL_SOCKET, _SO_TIMESTAMPNS, int(on)) and on

    def _buffer(self, number: int) -> memoryview:
        while number >= len(self._buffers):
            self._buffers.append(memoryview(bytearray(RECEIVE_BYTES)))
        return self._buffers[number]

    def _address_of(self, source: tuple[object, ...]) -> Address:
        address = self._known.get(source)
        if address is None:
            if len(self._known) >= KNOWN_ADDRESSES:
                self._known.clear()
            address = self._known[source] = _address(source)
        return address

    # sending

    def send_batch(self, datagrams: Sequence[memoryview], address: Address) -> int:
        sock = self._socket_for(address)
        if sock.ecn:
            sock.set_ecn(0)
        for sent, datagram in enumerate(datagrams):
            if not self._send_one(sock, datagram, address):
                return sent
        return len(datagrams)

    def send_fragmentable(self, datagrams: Sequence[memoryview], address: Address) -> int:
        sock, version = self._socket_for(address), address.ip.version
        try:
            _may_fragment(sock.socket, version, True)
        except OSError as error:
            return self._failed(sock, error)
        try:
            return self.send_batch(datagrams, address)
        finally:
            with contextlib.suppress(OSError):  # a failed send may have closed the socket
                _may_fragment(sock.socket, version, False)

    def send_segments(self, buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        sock = self._last_socket if address is self._last_address else self._socket_for(address)
        if ecn != sock.ecn:
            sock.set_ecn(ecn)
        length = len(buffer)
        if 0 < length <= segment:
            return int(self._send_one(sock, buffer, address))
        count = -(-length // segment)
        if length <= MAX_SEND and 0 < count <= MAX_SEGMENTS:
            return self._send_part(sock, buffer, segment, count, address)
        step = segment * _evenly(count, max(1, min(MAX_SEGMENTS, MAX_SEND // segment)))
        sent = 0
        for start in range(0, length, step):
            part = buffer[start : start + step]
            count = -(-len(part) // segment)
            taken = self._send_part(sock, part, segment, count, address)
            sent += taken
            if taken < count:
                break
        return sent

    def _send_part(self, sock: _UdpSocket, part: memoryview, segment: int, count: int, address: Address) -> int:
        """One system call if possible, else one per datagram."""
        if segment == sock.segment and sock.send is not None:  # as nearly always
            try:
                sock.send(part)
                return count
            except OSError as error:
                self._said_before(error)
        if count > 1 and sock.segments:
            try:
                if segment != sock.segment:
                    sock.set_segment(segment)
                self._send_retrying(sock, part, address)
                return count
            except OSError as error:
                if error.errno in _NO_SEGMENTATION:
                    sock.segments = False
                elif error.errno != errno.EINVAL:
                    return self._failed(sock, error)
        cuts = range(0, len(part), segment)
        for number, cut in enumerate(cuts):
            if not self._send_one(sock, part[cut : cut + segment], address):
                return number
        return count

    def _send_one(self, sock: _UdpSocket, datagram: memoryview, address: Address) -> bool:
        if not sock.segment and sock.send is not None:
            try:
                sock.send(datagram)
                return True
            except OSError as error:
                self._said_before(error)
        try:
            if sock.segment:
                sock.set_segment(0)
            self._send_retrying(sock, datagram, address)
        except OSError as error:
            self._failed(sock, error)
            return False
        return True

    def _said_before(self, error: OSError) -> None:
        """A first try failed: what is true of this datagram is said again at the next, and counted there."""
        if error.errno == errno.ECONNREFUSED:
            self._count(error)

    def _send_retrying(self, sock: _UdpSocket, data: memoryview, address: Address) -> None:
        """A connected socket first reports what ICMP said of an earlier datagram, without sending this one."""
        target = None if sock.address is not None else _sockaddr(address, sock.family)
        for tries in range(_STALE_ERRORS, -1, -1):
            try:
                if target is None:
                    sock.socket.send(data)
                else:
                    sock.socket.sendto(data, target)
                return
            except OSError as error:
                if not tries or error.errno not in _SAID_BY_ICMP:
                    raise
                if error.errno == errno.ECONNREFUSED:
                    self._count(error)

    def _failed(self, sock: _UdpSocket, error: OSError) -> int:
        """Count; a connected socket whose route or source address is gone is replaced at the next connect."""
        self._count(error)
        if sock.address is not None and error.errno in _STALE_ROUTE:
            self._drop(sock.address)
        return 0

    def _socket_for(self, address: Address) -> _UdpSocket:
        """Most sends go where the one before went, and hashing an address costs as much as a small send."""
        if address is not self._last_address:
            self._last_address, self._last_socket = address, self._connected.get(address, self._listener)
        return self._last_socket

    # connected sockets

    def connect(self, address: Address) -> None:
        if address in self._connected or self._closed or not self._connects:
            return
        try:
            self._connected[address] = self._connect(address)
        except OSError as error:
            self._count(error)
            return
        self._changed()

    def disconnect(self, address: Address) -> None:
        self._drop(address)

    def _connect(self, address: Address) -> _UdpSocket:
        family = _family(address)
        local = self._local
        ip = local.ip if local.ip.version == address.ip.version else None
        if ip is None and not (local.ip.version == 6 and local.ip.is_unspecified):
            raise OSError(errno.EAFNOSUPPORT, f"listening on {local} only")
        source = Address(ip or ipaddress.IPv4Address(0), local.port, local.scope)
        sock = self._factory(family)
        try:
            _prepare(sock, family, dual=False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(_sockaddr(source, family))
            sock.connect(_sockaddr(address, family))
        except OSError:
            sock.close()
            raise
        return _UdpSocket(sock, family, address)

    def _drop(self, address: Address) -> None:
        gone = self._connected.pop(address, None)
        if gone is None:
            return
        while (received := self._receive(gone, memoryview(bytearray(RECEIVE_BYTES)))) is not None:
            self._drained.append(received)
            if len(self._drained) == DRAINED:
                break
        self._changed()
        gone.socket.close()

    def _changed(self) -> None:
        self._last_address = None
        self._by_descriptor = {sock.socket.fileno(): sock for sock in (self._listener, *self._connected.values())}
        if self._on_filenos is not None:
            self._on_filenos()

    # the rest of Bind

    def max_payload(self, address: Address) -> int:
        """From the MTU of the first link now."""
        try:
            with self._factory(socket.AF_NETLINK) as netlink:
                mtu = link_mtu(netlink, address)
        except OSError as error:
            self._count(error)
            return FALLBACK_PAYLOAD
        return min(mtu - _HEADERS[address.ip.version], MAX_SEND)

    def release(self) -> socket.socket:
        """Give the listening socket away, open, and close all else."""
        self._closed = True
        self._changed()
        for sock in self._connected.values():
            sock.socket.close()
        self._connected.clear()
        return self._listener.socket

    def filenos(self) -> list[int]:
        if self._closed:
            return []
        return [sock.socket.fileno() for sock in (self._listener, *self._connected.values())]

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        """The event loop watches :meth:`filenos` instead."""

    def on_filenos(self, callback: Callable[[], None] | None) -> None:
        self._on_filenos = callback

    @property
    def errors(self) -> dict[str, int]:
        return dict(self._errors)

    @property
    def local(self) -> Address:
        return self._local

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._changed()
        for sock in (self._listener, *self._connected.values()):
            sock.socket.close()
        self._connected.clear()

    def _listen(self, listen: Address) -> _UdpSocket:
        family = _family(listen)
        dual = listen.ip.version == 6 and listen.ip.is_unspecified
        try:
            try:
                return self._open_listener(listen, family, dual)
            except OSError as error:
                if not dual or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                anywhere = Address(ipaddress.IPv4Address(0), listen.port)
                return self._open_listener(anywhere, socket.AF_INET, dual=False)
        except OSError as error:
            raise BindError(f"cannot listen on {listen} (UDP): {reason(error)}") from None

    def _open_listener(self, listen: Address, family: int, dual: bool) -> _UdpSocket:
        sock = self._factory(family)
        try:
            _prepare(sock, family, dual)
            sock.bind(_sockaddr(listen, family))
            # Only now: with the option set before, two daemons on one port would share it without a word.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            sock.close()
            raise
        return _UdpSocket(sock, family, None)

    def _count(self, error: OSError) -> None:
        if isinstance(error, socket.gaierror):  # an address of the other family, in the words of getaddrinfo
            self._errors["EAFNOSUPPORT"] += 1
        else:
            self._errors[errno.errorcode.get(error.errno or 0, "unknown")] += 1


def _evenly(count: int, limit: int) -> int:
    """How many of ``count`` datagrams go into each send, of at most ``limit``: no send carries an odd one."""
    return -(-count // -(-count // limit)) if count else 1


def _family(address: Address) -> int:
    return socket.AF_INET if address.ip.version == 4 else socket.AF_INET6


@functools.lru_cache(maxsize=KNOWN_ADDRESSES)
def _sockaddr(address: Address, family: int) -> tuple[object, ...]:
    if family == socket.AF_INET:
        return (str(address.ip), address.port)
    prefix = "::ffff:" if address.ip.version == 4 else ""
    return (f"{prefix}{address.ip}", address.port, 0, address.scope)


def _address(source: tuple[object, ...]) -> Address:
    ip = ipaddress.ip_address(str(source[0]).partition("%")[0])
    scope = int(str(source[3])) if len(source) == 4 else 0
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return Address(ip.ipv4_mapped, int(str(source[1])))
    return Address(ip, int(str(source[1])), scope)


def _prepare(sock: socket.socket, family: int, dual: bool) -> None:
    """Options of every socket.  Datagrams are not fragmented: what the path carries is found by asking the peer."""
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        _try_option(sock, socket.IPPROTO_IPV6, _IPV6_RECVTCLASS, 1)
    if family == socket.AF_INET or dual:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        _try_option(sock, socket.IPPROTO_IP, _IP_RECVTOS, 1)
    _try_option(sock, socket.IPPROTO_UDP, _UDP_GRO, 1)
    for forced, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        if not _try_option(sock, socket.SOL_SOCKET, forced, SOCKET_BUFFER):
            _try_option(sock, socket.SOL_SOCKET, plain, SOCKET_BUFFER)


def _try_option(sock: socket.socket, level: int, option: int, value: int) -> bool:
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True


def _may_fragment(sock: socket.socket, version: int, allowed: bool) -> None:
    """Let IPv4 datagrams be cut on the way.  Raises OSError.

    For IPv6 there is nothing to set: routers never cut, and Linux does not cut what its first link carries.
    """
    if version == 4:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT if allowed else _PMTUDISC_PROBE)


def _since(stamp: bytes) -> float:
    """Seconds since the kernel took a datagram, at least a little; 0 if that cannot be told."""
    seconds, nanoseconds = _TIMESPEC.unpack(stamp)
    waited = time.time() - seconds - nanoseconds * 1e-9
    return max(waited, 1e-9) if waited < _MAX_WAIT else 0.0


def _ancillary(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, int]:
    """(length of each datagram, 0 if nothing was joined; ECN bits) of one receive."""
    segment = ecn = 0
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
            segment = int(struct.unpack_from("i", data)[0])
        elif level == socket.IPPROTO_IP and kind == socket.IP_TOS:
            ecn = data[0] & _ECN
        elif level == socket.IPPROTO_IPV6 and kind == _IPV6_TCLASS:
            ecn = int(struct.unpack_from("i", data)[0]) & _ECN
    return segment, ecn
