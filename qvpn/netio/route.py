"""What the first link to an address carries: its device's MTU, and one that the administrator gave the route.

``getsockopt(IP_MTU)`` is no answer, for it has in it what ICMP messages said, which anybody can send.  So the
routing table is asked (rtnetlink(7), RTM_GETROUTE), which takes no rights and some 20 microseconds.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import sys
from collections.abc import Iterator

from qvpn.netio.base import Address

_NLMSG = struct.Struct("=IHHII")
_RTMSG = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_IFREQ_INDEX = struct.Struct("16si20x")
_RTM_NEWROUTE, _RTM_GETROUTE, _NLM_F_REQUEST, _NLMSG_ERROR = 24, 26, 1, 2
_RTM_F_FIB_MATCH = 0x2000
_RTA_DST, _RTA_OIF, _RTA_METRICS, _RTAX_MTU = 1, 4, 8, 2
_SIOCGIFNAME, _SIOCGIFMTU = 0x8910, 0x8921
_NESTED = 0x3FFF
"""Mask of an attribute's type without the flags in its upper bits."""


def link_mtu(netlink: socket.socket, address: Address) -> int:
    """MTU of the device that datagrams to this address leave by, or of the route where that is less.

    ``netlink``: an AF_NETLINK socket of NETLINK_ROUTE; it has the answer when the question is sent.

    Raises OSError: no route.
    """
    found = dict(_attributes(_ask(netlink, address, 0)))
    if _RTA_OIF not in found:
        raise OSError(errno.ENETUNREACH, "the route names no device")
    mtu = _device_mtu(netlink, int.from_bytes(found[_RTA_OIF], sys.byteorder))
    return min(mtu, _configured(netlink, address) or mtu)


def _configured(netlink: socket.socket, address: Address) -> int:
    """The MTU metric in the routing table itself, where nothing from outside can be; 0 for none."""
    try:
        found = dict(_attributes(_ask(netlink, address, _RTM_F_FIB_MATCH)))
    except OSError:
        return 0
    metrics = dict(_attributes(found.get(_RTA_METRICS, b"")))
    return int.from_bytes(metrics.get(_RTAX_MTU, b""), sys.byteorder)


def _ask(netlink: socket.socket, address: Address, flags: int) -> bytes:
    """The attributes of the answer."""
    family = socket.AF_INET if address.ip.version == 4 else socket.AF_INET6
    packed = address.ip.packed
    body = _RTMSG.pack(family, len(packed) * 8, 0, 0, 0, 0, 0, 0, flags) + _attribute(_RTA_DST, packed)
    if address.scope:
        body += _attribute(_RTA_OIF, struct.pack("=I", address.scope))
    netlink.send(_NLMSG.pack(_NLMSG.size + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + body)
    answer = netlink.recv(65_536)
    length, kind, *_ = _NLMSG.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        raise OSError(-struct.unpack_from("=i", answer, _NLMSG.size)[0], "no route")
    if kind != _RTM_NEWROUTE:
        raise OSError(errno.EPROTO, "the kernel's answer is no route")
    return answer[_NLMSG.size + _RTMSG.size : length]


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NESTED, data[position + _ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3


def _device_mtu(asker: socket.socket, index: int) -> int:
    name = _IFREQ_INDEX.unpack(fcntl.ioctl(asker, _SIOCGIFNAME, _IFREQ_INDEX.pack(b"", index)))[0]
    return int(_IFREQ_INDEX.unpack(fcntl.ioctl(asker, _SIOCGIFMTU, _IFREQ_INDEX.pack(name, 0)))[1])
