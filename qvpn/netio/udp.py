"""Outer datagrams over UDP sockets.

One unconnected *listener* takes datagrams from anyone.  Each peer endpoint that :meth:`UdpBind.connect` names gets a
*connected* socket on the same port (SO_REUSEPORT): sending on it is cheaper, and ICMP errors come back on it.  Which
socket a datagram arrives on means nothing: between bind and connect a socket takes foreign datagrams too.

Whole batches go through the kernel at once where it can: UDP_SEGMENT cuts one send into datagrams, UDP_GRO joins
received ones.  A socket whose device cannot is found out by the error of its first send, and sends one by one.

Receiving is in :mod:`~qvpn.netio.udpreceive`, the sockets' options are in :mod:`~qvpn.netio.udpsocket`.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence

from qvpn.netio.base import Address
from qvpn.netio.errors import BindError, reason
from qvpn.netio.route import link_mtu
from qvpn.netio.udpreceive import UdpReceiver
from qvpn.netio.udpsocket import (
    MAX_SEND,
    SocketFactory,
    UdpSocket,
    family_of,
    may_fragment,
    open_socket,
    prepare,
    sockaddr,
)

MAX_SEGMENTS = 64
"""Datagrams per segmented send that every kernel with UDP_SEGMENT takes."""

FALLBACK_PAYLOAD = 1280 - 48
"""Where the route's MTU cannot be read: what every IPv6 link carries."""

_HEADERS = {4: 28, 6: 48}
_NO_SEGMENTATION = frozenset({errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP})
_STALE_ROUTE = frozenset(
    {errno.EINVAL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENETDOWN}
)

_SAID_BY_ICMP = frozenset({errno.ECONNREFUSED, errno.EMSGSIZE})
"""May be about a datagram sent long ago, or forged; what is true of this one is said again at the next try."""
_STALE_ERRORS = 2


class UdpBind(UdpReceiver):
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
        self._on_filenos: Callable[[], None] | None = None
        self._connects = listener is None
        super().__init__(self._listen(listen) if listener is None else UdpSocket(listener, listener.family, None))
        port = self._listener.socket.getsockname()[1]
        ip = listen.ip if self._listener.family == family_of(listen) else ipaddress.IPv4Address(0)
        self._local = Address(ip, port, listen.scope)
        self._closed = False
        self._last_address: Address | None = None
        self._last_socket = self._listener

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
            may_fragment(sock.socket, version, True)
        except OSError as error:
            return self._failed(sock, error)
        try:
            return self.send_batch(datagrams, address)
        finally:
            with contextlib.suppress(OSError):  # a failed send may have closed the socket
                may_fragment(sock.socket, version, False)

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

    def _send_part(self, sock: UdpSocket, part: memoryview, segment: int, count: int, address: Address) -> int:
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

    def _send_one(self, sock: UdpSocket, datagram: memoryview, address: Address) -> bool:
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

    def _send_retrying(self, sock: UdpSocket, data: memoryview, address: Address) -> None:
        """A connected socket first reports what ICMP said of an earlier datagram, without sending this one."""
        target = None if sock.address is not None else sockaddr(address, sock.family)
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

    def _failed(self, sock: UdpSocket, error: OSError) -> int:
        """Count; a connected socket whose route or source address is gone is replaced at the next connect."""
        self._count(error)
        if sock.address is not None and error.errno in _STALE_ROUTE:
            self._drop(sock.address)
        return 0

    def _socket_for(self, address: Address) -> UdpSocket:
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

    def _connect(self, address: Address) -> UdpSocket:
        family = family_of(address)
        local = self._local
        ip = local.ip if local.ip.version == address.ip.version else None
        if ip is None and not (local.ip.version == 6 and local.ip.is_unspecified):
            raise OSError(errno.EAFNOSUPPORT, f"listening on {local} only")
        source = Address(ip or ipaddress.IPv4Address(0), local.port, local.scope)
        sock = self._factory(family)
        try:
            prepare(sock, family, dual=False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(sockaddr(source, family))
            sock.connect(sockaddr(address, family))
        except OSError:
            sock.close()
            raise
        return UdpSocket(sock, family, address)

    def _drop(self, address: Address) -> None:
        gone = self._connected.pop(address, None)
        if gone is None:
            return
        self._drain(gone)
        self._changed()
        gone.socket.close()

    def _changed(self) -> None:
        self._last_address = None
        self._by_descriptor = {sock.socket.fileno(): sock for sock in (self._listener, *self._connected.values())}
        if self._on_filenos is not None:
            self._on_filenos()

    # the rest of Bind

    def waiting(self, address: Address) -> tuple[int, int]:
        """The kernel has what was taken."""
        return 0, 0

    def unsent(self) -> list[tuple[Address, int, int]]:
        """Nothing is kept, so nothing is dropped later."""
        return []

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

    def _listen(self, listen: Address) -> UdpSocket:
        family = family_of(listen)
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

    def _open_listener(self, listen: Address, family: int, dual: bool) -> UdpSocket:
        sock = self._factory(family)
        try:
            prepare(sock, family, dual)
            sock.bind(sockaddr(listen, family))
            # Only now: with the option set before, two daemons on one port would share it without a word.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            sock.close()
            raise
        return UdpSocket(sock, family, None)


def _evenly(count: int, limit: int) -> int:
    """How many of ``count`` datagrams go into each send, of at most ``limit``: no send carries an odd one."""
    return -(-count // -(-count // limit)) if count else 1
