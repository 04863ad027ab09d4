"""What is measured: tunnels, links, and which figures are taken where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvpn.bench.link import LINKS, LinkKind
from qvpn.bench.peers.bare import Bare
from qvpn.bench.peers.base import Tunnel
from qvpn.bench.peers.nebula import Nebula
from qvpn.bench.peers.openvpn import OpenVpn
from qvpn.bench.peers.own import Qvpn
from qvpn.bench.peers.tinc import Tinc
from qvpn.bench.peers.wireguard import WireGuardGo

PEERS: dict[str, type[Tunnel]] = {
    "wireguard-go": WireGuardGo,
    "openvpn": OpenVpn,
    "nebula": Nebula,
    "tinc": Tinc,
}
EVERYTHING = ("tcp1", "tcp4", "udp", "idle", "hot", "load")
THROUGHPUT = ("tcp1", "tcp4")
ON_EVERY_LINK = ("wireguard-go",)
"""Peers that are measured on all links, for the targets there are against them."""


OFTEN, RARELY = "qvpn rekey 1s", "qvpn rekey 60s"
OVER_QUIC, OVER_TCP = "qvpn over quic", "openvpn over tcp"


@dataclass(frozen=True)
class Case:
    """One tunnel on one link, and the figures to take."""

    tunnel: Tunnel
    link: LinkKind
    measures: Sequence[str]

    @property
    def key(self) -> str:
        return f"{self.tunnel.name}@{self.link.name}"


def plan(
    peers: Sequence[str],
    links: Sequence[str],
    measures: Sequence[str] = EVERYTHING,
    *,
    extras: bool = True,
    carriers: bool = False,
) -> list[Case]:
    """All cases of one round: the bare link, ours, and each peer; with ``extras`` the variants of ours too.

    ``carriers``: ours over QUIC and OpenVPN over TCP, which are among the extras.
    """
    tunnels: list[Tunnel] = [Bare(), Qvpn(), *(PEERS[name]() for name in peers)]
    cases: list[Case] = []
    for name in links:
        some = measures if name == "default" else [each for each in measures if each in THROUGHPUT]
        here = [each for each in tunnels if name == "default" or each.name in ("qvpn", *ON_EVERY_LINK)]
        cases += [Case(tunnel, LINKS[name], some) for tunnel in here]
    if extras and "default" in links:
        cases += _variants(measures)
    if (extras or carriers) and "default" in links:
        cases += _carriers(measures)
    return [case for case in cases if case.measures]


def _carriers(measures: Sequence[str]) -> list[Case]:
    """Where UDP does not pass: ours over QUIC, beside OpenVPN over TCP."""
    wanted = [each for each in measures if each in (*THROUGHPUT, "idle", "load")]
    tunnels: list[Tunnel] = [Qvpn(OVER_QUIC, transport="quic"), OpenVpn(OVER_TCP, tcp=True)]
    return [Case(tunnel, LINKS["default"], wanted) for tunnel in tunnels]


def _variants(measures: Sequence[str]) -> list[Case]:
    """The other suites, two lanes, and what a rekey costs: every second against every minute."""
    wanted = [each for each in measures if each in THROUGHPUT]
    variants = (
        Qvpn("qvpn suite 02", suite=2),
        Qvpn("qvpn suite 03", suite=3),
        Qvpn("qvpn 2 lanes", lanes=2),
        Qvpn(OFTEN, rekey=1),
        Qvpn(RARELY, rekey=60),
    )
    return [Case(variant, LINKS["default"], wanted) for variant in variants]
