"""Addresses, MTU and routes of the tunnel interface, over rtnetlink.

pyroute2 is imported when first needed: it is slow to load, and only a daemon with its own interface needs it.  It
brings an event loop of its own, so every call here runs in a short-lived thread and may be made from inside asyncio.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from qvpn.netio.errors import LinkError
from qvpn.tunnel.allowedips import IPNetwork

IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
T = TypeVar("T")

QUEUE_PACKETS = 5000
"""``txqueuelen``: packets that may wait for the tunnel; the kernel drops beyond."""

FENCE_METRIC = 0x7FFF_FFFF
"""Metric of the fence's routes: any other route to the same network is better."""

IPV6_MINIMUM_MTU = 1280
_IFA_F_NODAD = 0x02


def configure(
    name: str, *, addresses: Sequence[IPInterface], mtu: int, routes: Sequence[IPNetwork], up: bool = True
) -> None:
    """Set the interface's MTU and addresses, bring it up, and route these networks into it.

    A route that an address already gives, or that is there, is no error.  Raises :class:`LinkError`.
    """
    _with_netlink(lambda ipr: _configure(ipr, name, addresses, mtu, routes, up))


def set_mtu(name: str, mtu: int) -> None:
    """Change the MTU of an interface.  Raises :class:`LinkError`."""

    def change(ipr: Any) -> None:
        _call(f"MTU {mtu} for interface {name}", partial(ipr.link, "set", index=_index(ipr, name), mtu=mtu))

    _with_netlink(change)


def fence(routes: Sequence[IPNetwork]) -> None:
    """Make these networks unreachable wherever no better route stands.

    The tunnel's own routes are better.  They go with the interface when the daemon dies; the fence stays, so that
    nothing of what belongs into the tunnel takes the default route in clear.  Raises :class:`LinkError`.
    """

    def add(ipr: Any) -> None:
        for network in routes:
            _call(f"fence around {network}", partial(ipr.route, "replace", **_fence(network)))

    _with_netlink(add)


def unfence(routes: Sequence[IPNetwork]) -> None:
    """Take the fence away, after an orderly stop.  What is gone already is no error.  Raises :class:`LinkError`."""

    def remove(ipr: Any) -> None:
        for network in routes:
            _call(
                f"fence around {network}",
                partial(ipr.route, "del", **_fence(network)),
                tolerate=(errno.ESRCH, errno.ENOENT),
            )

    _with_netlink(remove)


def _fence(network: IPNetwork) -> dict[str, object]:
    return {"dst": str(network), "type": "unreachable", "priority": FENCE_METRIC, "family": _family(network)}


def _configure(
    ipr: Any, name: str, addresses: Sequence[IPInterface], mtu: int, routes: Sequence[IPNetwork], up: bool
) -> None:
    index = _index(ipr, name)
    if mtu < IPV6_MINIMUM_MTU and any(address.version == 6 for address in addresses):
        raise LinkError(f"interface {name} with IPv6 addresses needs an MTU of {IPV6_MINIMUM_MTU}, not {mtu}")
    _call(f"MTU {mtu} for interface {name}", partial(ipr.link, "set", index=index, mtu=mtu, txqlen=QUEUE_PACKETS))
    for address in addresses:
        _add_address(ipr, name, index, address)
    if not up:
        return
    _call(f"bringing interface {name} up", partial(ipr.link, "set", index=index, state="up"))
    _add_routes(ipr, name, index, routes)


def _add_address(ipr: Any, name: str, index: int, address: IPInterface) -> None:
    settings: dict[str, object] = {"address": str(address.ip), "prefixlen": address.network.prefixlen}
    if address.version == 6:
        # No duplicate address detection on a link that has no neighbours: the address is usable at once.
        settings["flags"] = _IFA_F_NODAD
    _call(
        f"address {address} for interface {name}",
        partial(ipr.addr, "add", index=index, family=_family(address.network), **settings),
        tolerate=(errno.EEXIST,),
    )


def _add_routes(ipr: Any, name: str, index: int, routes: Sequence[IPNetwork]) -> None:
    for network in routes:
        _call(
            f"route to {network} through interface {name}",
            partial(ipr.route, "replace", dst=str(network), oif=index, family=_family(network)),
            tolerate=(errno.EEXIST,),
        )


def _family(network: IPNetwork) -> int:
    return socket.AF_INET if network.version == 4 else socket.AF_INET6


def _index(ipr: Any, name: str) -> int:
    found = ipr.link_lookup(ifname=name)
    if not found:
        raise LinkError(f"there is no interface named {name}")
    return int(found[0])


def _call(what: str, call: Callable[[], object], *, tolerate: Sequence[int] = ()) -> None:
    """Run one request; say in one sentence what the kernel refused."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        call()
    except NetlinkError as error:
        if error.code not in tolerate:
            raise LinkError(f"{what}: {_explain(error.code)}") from None


def _explain(code: int) -> str:
    if code == errno.EPERM:
        return "operation not permitted (CAP_NET_ADMIN is needed)"
    if code == errno.EACCES:
        return "permission denied (is IPv6 switched off on this interface?)"
    return os.strerror(code).lower()


def _with_netlink(work: Callable[[Any], T]) -> T:
    """Run ``work`` with a netlink socket, in a thread without an event loop; the caller waits."""

    def run() -> T:
        try:
            from pyroute2 import IPRoute
        except ImportError:
            raise LinkError("pyroute2 is not installed, so interfaces cannot be set up") from None
        with IPRoute() as ipr:
            return work(ipr)

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(run).result()
