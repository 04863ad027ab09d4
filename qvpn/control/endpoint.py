"""Where a peer is: names looked up without blocking, and no address that the tunnel itself would carry."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable

from qvpn.config.units import HostPort, IPNetwork
from qvpn.netio.base import Address

LOOKUP_LIMIT = 5.0


class NoAddress(Exception):
    """The endpoint has no usable address now; one sentence."""


async def resolve(endpoint: HostPort, *, forbidden: Iterable[IPNetwork], ipv6: bool = True) -> list[Address]:
    """All usable addresses of an endpoint, in the system's order of preference.

    ``forbidden``: networks routed into tunnels.  ``ipv6``: whether the bind reaches IPv6.

    Raises:
        NoAddress: the name is not known now, or every address lies inside a tunnel.
    """
    found = [literal(endpoint)] if endpoint.ip is not None else await _look_up(endpoint)
    usable = [address for address in found if ipv6 or address.ip.version == 4]
    if not usable:
        raise NoAddress(f"{endpoint} has no IPv4 address, and this site listens on IPv4 only")
    networks = tuple(forbidden)
    outside = [a for a in usable if not any(a.ip.version == net.version and a.ip in net for net in networks)]
    if not outside:
        raise NoAddress(f"{endpoint} is {usable[0].ip}, which lies inside a peer's allowed_ips")
    return outside


def literal(endpoint: HostPort) -> Address:
    """The address of an endpoint that is written as one."""
    ip = ipaddress.ip_address(endpoint.host)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return Address(ip, endpoint.port)


async def _look_up(endpoint: HostPort) -> list[Address]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(LOOKUP_LIMIT):
            found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)
    except TimeoutError:
        raise NoAddress(f"{endpoint.host}: the name was not found within {LOOKUP_LIMIT:g} s") from None
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise NoAddress(f"{endpoint.host}: {(reason or 'cannot be looked up').lower()}") from None
    # (host, port) for IPv4, (host, port, flow, scope) for IPv6
    places = [entry[4] for entry in found if entry[0] in (socket.AF_INET, socket.AF_INET6)]
    return list(
        dict.fromkeys(
            Address(ipaddress.ip_address(str(place[0]).partition("%")[0]), int(place[1]), _scope(place))
            for place in places
        )
    )


def _scope(place: tuple[object, ...]) -> int:
    return int(str(place[3])) if len(place) > 3 else 0
