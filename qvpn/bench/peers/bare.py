"""No tunnel: the link itself, as the ceiling of what this machine can carry."""

from __future__ import annotations

from qvpn.bench.link import OUTER, LinkKind
from qvpn.bench.peers.base import Pair, Running
from qvpn.demo.lab import Lab


class Bare:
    name = "no tunnel"
    cipher = "none"

    def version(self) -> str:
        return "bare veth"

    def absent(self) -> str | None:
        return None

    def start(self, lab: Lab, kind: LinkKind) -> Running:
        return Pair([], OUTER)
