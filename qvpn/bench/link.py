"""Two namespaces joined by one veth pair, with the offloads that the benchmark asks for.

Three kinds of link, because a veth pair with everything on passes a batch of segments whole from socket to socket,
which a real network card does not do:

- ``default``: everything as the kernel sets it up.
- ``tx-off``: no checksum and no segmentation offload at the sender, so batches are cut and summed in software; GRO on
  at the receiver puts them together again.
- ``no-uso``: only UDP segmentation is off and there is no GRO: every datagram arrives alone.
- ``jumbo``: as ``default``, with an MTU of 9000.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from qvpn.bench.install import need
from qvpn.demo import kernel
from qvpn.demo.lab import Lab

ENDS = ("alice", "bob")
OUTER = {"alice": "192.0.2.1", "bob": "192.0.2.2"}
INTERFACE = "wan"
CONGESTION = "cubic"


@dataclass(frozen=True)
class LinkKind:
    """``features`` are ethtool's names, set at both ends."""

    name: str
    about: str
    features: tuple[tuple[str, str], ...] = ()
    mtu: int = 1500


LINKS = {
    kind.name: kind
    for kind in (
        LinkKind("default", "veth as it is, MTU 1500"),
        LinkKind("tx-off", "tx off, gro on", (("tx", "off"), ("gro", "on"))),
        LinkKind("no-uso", "tx-udp-segmentation off", (("tx-udp-segmentation", "off"),)),
        LinkKind("jumbo", "veth as it is, MTU 9000", mtu=9000),
    )
}


def make(folder: Path, kind: LinkKind) -> Lab:
    """A lab of two ends joined by this link.  Raises subprocess.CalledProcessError where ethtool refuses."""
    lab = Lab(folder)
    for name in ENDS:
        lab.add(name)
    lab.link(*(part for name in ENDS for part in (name, INTERFACE)))
    for name in ENDS:
        lab[name].address(INTERFACE, f"{OUTER[name]}/30")
        _set_mtu(lab, name, kind.mtu)
        for feature, state in kind.features:
            lab[name].run([need("ethtool"), "-K", INTERFACE, feature, state])
    return lab


def _set_mtu(lab: Lab, name: str, mtu: int) -> None:
    with kernel.inside(lab[name].descriptor), IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=INTERFACE)[0], mtu=mtu)


def configure_device(lab: Lab, name: str, device: str, address: str, mtu: int) -> None:
    """Give a tunnel's device its inner address and MTU and set it up, for programs that leave that to others."""
    with kernel.inside(lab[name].descriptor), IPRoute() as route:
        index = route.link_lookup(ifname=device)[0]
        route.addr("add", index=index, address=address, prefixlen=24)
        route.link("set", index=index, mtu=mtu, state="up")


def has_device(lab: Lab, name: str, device: str) -> bool:
    with kernel.inside(lab[name].descriptor), IPRoute() as route:
        return bool(route.link_lookup(ifname=device))


def udp_sent(lab: Lab, name: str) -> int:
    """UDP datagrams (with segmentation offload: sends) that left one end so far."""
    with kernel.inside(lab[name].descriptor):
        return parse_udp_sent(Path("/proc/thread-self/net/snmp").read_text())


def parse_udp_sent(snmp: str) -> int:
    """``OutDatagrams`` of a ``/proc/net/snmp``."""
    names, values = (line.split() for line in snmp.splitlines() if line.startswith("Udp:"))
    return int(dict(zip(names, values, strict=True))["OutDatagrams"])
