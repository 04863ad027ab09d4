"""What several namespace tests use: a tunnel with couriered keys, rules that drop packets, counters that explain.

Loaded by ``conftest``, which hands its parts out as fixtures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from qvpn.demo import lab as topology
from qvpn.demo import sites, toml
from qvpn.demo.lab import Lab
from qvpn.demo.process import program
from qvpn.demo.sites import Daemon

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
long_only = pytest.mark.skipif(not LONG, reason="QVPN_TEST_LONG=1 runs it")


def count(full: int) -> int:
    """The full count in the long run, a tenth otherwise."""
    return full if LONG else max(full // 10, 1)


@dataclass
class Tunnel:
    """Two daemons with keys from ``qvpn init``, in the lab."""

    lab: Lab
    daemons: dict[str, Daemon] = field(default_factory=dict)

    def configure(self, *options: str, outer: dict[str, str] | None = None, **peer: object) -> None:
        """Run ``qvpn init``, add IPv6 inside, and set keys of the ``[[peer]]`` table on both sites."""
        sites.init(self.lab, *options, outer=outer or topology.WAN4)
        for site in topology.SITES:
            sites.with_ipv6_inside(self.lab, site)
            self.set(site, **peer)
            self.daemons[site] = Daemon(self.lab, site)

    def set(self, site: str, **peer: object) -> None:
        def edit(table: toml.Table) -> None:
            table["peer"][0].update(peer)

        sites.change(self.lab, site, edit)

    def start(self) -> None:
        for daemon in self.daemons.values():
            daemon.start()

    def up(self, *, within: float = 20.0) -> None:
        """Start both daemons and wait until both have an epoch that rests on a key."""
        self.start()
        self.wait(within=within)

    def wait(self, state: str = "qkd", *, within: float = 20.0) -> None:
        for daemon in self.daemons.values():
            daemon.wait_state(state, within=within)

    def rekeys(self) -> int:
        """Epochs confirmed after the first, the smaller of both sites' counts."""
        return min(int(daemon.peer()["rekeys"]) for daemon in self.daemons.values())

    def drops(self) -> dict[str, dict[str, object]]:
        """Every counter that names a lost packet, the daemons' and the kernel's, to explain a failure."""
        return {
            site: {
                "daemon": daemon.status()["drops"],
                "peer": daemon.peer()["drops"],
                "send_errors": daemon.status()["send_errors"],
                "interfaces": {
                    name: {
                        key: value for key, value in counters.items() if value and key[3:] in ("dropped", "errors")
                    }
                    for name, counters in self.lab[site].interfaces().items()
                },
            }
            for site, daemon in self.daemons.items()
        }

    def tails(self) -> str:
        return "\n".join(
            line for daemon in self.daemons.values() if daemon.process for line in daemon.process.tail(10)
        )


def add_lan(lab: Lab) -> None:
    """A host behind bob, on a link without any offload: what bob forwards has finished checksums or wrong ones."""
    lab.add("host")
    lab.link("bob", "lan", "host", "lan")
    lab["bob"].address("lan", "10.77.0.1/24", "fd77::1/64")
    lab["host"].address("lan", "10.77.0.2/24", "fd77::2/64")
    for name in ("bob", "host"):
        off = ("tx", "off", "rx", "off", "sg", "off", "tso", "off", "gso", "off", "gro", "off")
        lab[name].run(["ethtool", "-K", "lan", *off])
    lab["bob"].sysctl("ipv4/ip_forward", "1")
    lab["bob"].sysctl("ipv6/conf/all/forwarding", "1")
    for gateway in ("10.77.0.1", "fd77::1"):
        lab["host"].default_route(gateway)


def drop_in_the_net(lab: Lab, percent: int) -> None:
    """Let the untrusted network lose that share of all packets at random (0 takes the rule away)."""
    lab["net"].run(["nft", "flush", "ruleset"])
    if percent:
        rule = f"numgen random mod 100 < {percent} drop"
        table = f"table inet lossy {{\n chain forward {{\n type filter hook forward priority 0;\n {rule}\n }}\n}}\n"
        lab["net"].run(["nft", "-f", "-"], text=table)


def new_identity(lab: Lab, site: str) -> None:
    """Give a site a new identity that its peer does not know."""
    file = lab.site_folder(site) / f"{site}.key"
    file.unlink()
    pem = lab[site].run([*program("qvpn"), "genkey"])
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(pem)


def confirmed_keys(lab: Lab, site: str, name: str = "qvpn") -> list[str]:
    """Hashes of the key_IDs of all epochs that a site's daemons confirmed in their lives, from their logs."""
    events = (event for event in _events(lab, f"{site}-{name}") if event.get("event") == "epoch confirmed")
    return [event["key_id_hash"] for event in events if event.get("key_id_hash")]


def _events(lab: Lab, prefix: str) -> Iterator[dict[str, str]]:
    for log in sorted(lab.logs.glob(f"{prefix}*.log")):
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("{") and line.endswith("}"):  # a killed process may leave half a line
                yield json.loads(line)


def tracebacks(lab: Lab) -> list[str]:
    """Logs in which a program of the lab showed a traceback."""
    return [log.name for log in lab.logs.glob("*.log") if "Traceback" in log.read_text(errors="replace")]
