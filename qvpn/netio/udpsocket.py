"""UDP sockets: how they are made ready, and what of the kernel's options each has set now."""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Callable

from qvpn.netio.base import Address

UDP_SEGMENT, UDP_GRO = 103, 104
IPV6_TCLASS = 67
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_DONT, _PMTUDISC_PROBE = 0, 3
"""Fragments allowed; never any, and no belief in ICMP: only the first link's MTU counts (ip(7))."""
_IP_RECVTOS, _IPV6_RECVTCLASS = 13, 66
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
MAX_SEND = 65_507
"""Bytes per send over IPv4; IPv6 allows 20 more."""
SOCKET_BUFFER = 4 << 20
KNOWN_ADDRESSES = 4096

SocketFactory = Callable[[int], socket.socket]
"""``factory(family)`` makes a datagram socket, as :func:`open_socket`."""


def open_socket(family: int) -> socket.socket:
    """A UDP socket of this family.  Raises OSError."""
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


class UdpSocket:
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
            try_option(self.socket, socket.IPPROTO_IPV6, IPV6_TCLASS, ecn)
        if self.family == socket.AF_INET or self.address is None:
            try_option(self.socket, socket.IPPROTO_IP, socket.IP_TOS, ecn)
        self.ecn = ecn

    def set_segment(self, segment: int) -> None:
        self.socket.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
        self.segment = segment


def family_of(address: Address) -> int:
    """Of the socket that reaches it without another form of the address."""
    return socket.AF_INET if address.ip.version == 4 else socket.AF_INET6


@functools.lru_cache(maxsize=KNOWN_ADDRESSES)
def sockaddr(address: Address, family: int) -> tuple[object, ...]:
    """As a socket of this family wants it."""
    if family == socket.AF_INET:
        return (str(address.ip), address.port)
    prefix = "::ffff:" if address.ip.version == 4 else ""
    return (f"{prefix}{address.ip}", address.port, 0, address.scope)


def address_of(source: tuple[object, ...]) -> Address:
    """From what a socket says; IPv4 addresses without their v4-mapped prefix."""
    ip = ipaddress.ip_address(str(source[0]).partition("%")[0])
    scope = int(str(source[3])) if len(source) == 4 else 0
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return Address(ip.ipv4_mapped, int(str(source[1])))
    return Address(ip, int(str(source[1])), scope)


def prepare(sock: socket.socket, family: int, dual: bool) -> None:
    """Options of every socket.  Datagrams are not fragmented: what the path carries is found by asking the peer."""
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        try_option(sock, socket.IPPROTO_IPV6, _IPV6_RECVTCLASS, 1)
    if family == socket.AF_INET or dual:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        try_option(sock, socket.IPPROTO_IP, _IP_RECVTOS, 1)
    try_option(sock, socket.IPPROTO_UDP, UDP_GRO, 1)
    for forced, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        if not try_option(sock, socket.SOL_SOCKET, forced, SOCKET_BUFFER):
            try_option(sock, socket.SOL_SOCKET, plain, SOCKET_BUFFER)


def try_option(sock: socket.socket, level: int, option: int, value: int) -> bool:
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True


def may_fragment(sock: socket.socket, version: int, allowed: bool) -> None:
    """Let IPv4 datagrams be cut on the way.  Raises OSError.

    For IPv6 there is nothing to set: routers never cut, and Linux does not cut what its first link carries.
    """
    if version == 4:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT if allowed else _PMTUDISC_PROBE)
