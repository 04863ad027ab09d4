"""A third site, carol: a second peer of alice, with keys and a line of its own.  Loaded by ``conftest``."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from typing import Any

from qvpn.demo import lab as topology
from qvpn.demo import sites
from qvpn.demo.lab import Lab
from qvpn.demo.process import environment, program
from qvpn.demo.sites import PORT, Daemon

CAROL, INNER = "100.64.3.2", "10.90.0.3"


def add(tunnel: Any, *, mtu: int = 1300, transport: str = "udp") -> None:
    """After ``tunnel.configure``; carol's daemon is among the tunnel's then.  ``mtu``: of her line."""
    lab: Lab = tunnel.lab
    _line(lab, mtu)
    made = lab.folder / "second"
    ends = ("--left", f"alice@{topology.WAN4['alice']}:{PORT}", "--right", f"carol@{CAROL}:{PORT}")
    subprocess.run(
        [*program("qvpn"), "init", str(made), *ends], check=True, capture_output=True, timeout=60, env=environment()
    )
    alice, carol = lab.site_folder("alice"), lab.site_folder("carol")
    for file in (made / "carol").iterdir():
        shutil.copy2(file, carol / file.name)
    shutil.copy2(alice / "alice.pub", carol / "alice.pub")
    shutil.copy2(made / "alice/carol.pub", alice / "carol.pub")
    shutil.copy2(made / "alice/courier.keys", alice / "carol.keys")
    second = tomllib.loads((made / "alice/qvpn.toml").read_text())
    peer = {**second["peer"][0], "key_source": "carol", "allowed_ips": [f"{INNER}/32"], "transport": transport}
    source = {**second["key_source"]["courier"], "path": "carol.keys"}

    def at_alice(table: dict[str, Any]) -> None:
        table["peer"].append(peer)
        table["key_source"]["carol"] = source

    def at_carol(table: dict[str, Any]) -> None:
        table["tunnel"].update(addresses=[f"{INNER}/24"])
        table["peer"][0].update(transport=transport)

    sites.change(lab, "alice", at_alice)
    sites.change(lab, "carol", at_carol)
    tunnel.daemons["carol"] = Daemon(lab, "carol")


def _line(lab: Lab, mtu: int) -> None:
    lab.add("carol")
    lab.link("carol", "wan", "net", "to-carol")
    lab["net"].address("to-carol", "100.64.3.1/24")
    lab["carol"].address("wan", f"{CAROL}/24")
    lab["carol"].default_route("100.64.3.1")
    for site, interface in (("net", "to-carol"), ("carol", "wan")):
        lab[site].run(["ip", "link", "set", interface, "mtu", str(mtu)])
