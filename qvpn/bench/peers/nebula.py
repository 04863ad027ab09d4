"""nebula: an overlay network in Go; AES-256-GCM, two routines, no lighthouse (each end knows the other's address)."""

from __future__ import annotations

import json
from pathlib import Path

from qvpn.bench.install import find, need, package_version
from qvpn.bench.link import ENDS, OUTER, LinkKind
from qvpn.bench.peers.base import INNER, PORT, Pair, Running, wait_until
from qvpn.demo.lab import Lab
from qvpn.demo.process import Process

OVERHEAD = 60
"""Outer IPv4 header, UDP, nebula's header and tag."""
_DEVICE = "nebula1"


class Nebula:
    name = "nebula"
    cipher = "AES-256-GCM"

    def version(self) -> str:
        found = find("nebula")
        return "" if found is None else package_version("nebula", found)

    def absent(self) -> str | None:
        missing = [program for program in ("nebula", "nebula-cert") if find(program) is None]
        return f"{' and '.join(missing)} not installed" if missing else None

    def start(self, lab: Lab, kind: LinkKind) -> Running:
        authority = lab.folder / "nebula-ca"
        authority.mkdir(mode=0o700)
        cert = [need("nebula-cert")]
        ca = ["-out-crt", str(authority / "ca.crt"), "-out-key", str(authority / "ca.key")]
        lab[ENDS[0]].run([*cert, "ca", "-name", "bench", *ca])
        return Pair([self._start_end(lab, name, authority, kind) for name in ENDS])

    def _start_end(self, lab: Lab, name: str, authority: Path, kind: LinkKind) -> Process:
        folder = lab.site_folder(name)
        files = ["-out-crt", str(folder / "end.crt"), "-out-key", str(folder / "end.key")]
        signer = ["-ca-crt", str(authority / "ca.crt"), "-ca-key", str(authority / "ca.key")]
        address = f"{INNER[name]}/24"
        lab[name].run([need("nebula-cert"), "sign", "-name", name, "-ip", address, *signer, *files])
        (folder / "nebula.yml").write_text(config(name, folder, authority, kind.mtu - OVERHEAD))
        process = lab[name].start("nebula", [need("nebula"), "-config", str(folder / "nebula.yml")])
        wait_until(f"{name} has {_DEVICE}", lambda: _DEVICE in lab[name].interfaces(), process)
        return process


def config(name: str, folder: Path, authority: Path, mtu: int) -> str:
    """One end's configuration (JSON, which YAML includes)."""
    other = next(each for each in ENDS if each != name)
    anyone = [{"port": "any", "proto": "any", "host": "any"}]
    settings = {
        "pki": {
            "ca": str(authority / "ca.crt"),
            "cert": str(folder / "end.crt"),
            "key": str(folder / "end.key"),
        },
        "static_host_map": {INNER[other]: [f"{OUTER[other]}:{PORT}"]},
        "lighthouse": {"am_lighthouse": False, "interval": 60, "hosts": []},
        "listen": {"host": "0.0.0.0", "port": PORT},
        "routines": 2,
        "cipher": "aes",
        "tun": {"dev": _DEVICE, "mtu": mtu},
        "firewall": {"outbound": anyone, "inbound": anyone},
    }
    return json.dumps(settings, indent=1) + "\n"
