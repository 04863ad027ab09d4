"""What stands on the demo's stage, and the handles of its faults.

Made by ``qvpn init --key-source etsi014`` and changed only where the demo differs from two real hosts: the fibre
has a namespace of its own, keys live short, and a second pair of daemons with ``prefer-qkd`` runs beside the first
on the same KMEs.  KMEs and link are reached as programs and over their sockets, as an operator would.

::

    sites/alice, sites/bob     qvpn.toml, kme.toml, link.toml, pki/; second pair in prefer/
    sites/fibre                link.toml and the key that seals what the ends tell the fibre
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from qvpn.demo import payload, sites, toml
from qvpn.demo.lab import FIBRE_END4, SITES, WAN4, Lab
from qvpn.demo.launch import SITE
from qvpn.demo.process import Process, environment, program
from qvpn.demo.sites import INNER4, INNER6, OTHER, Daemon
from qvpn.demo.steps import StepFailed

REKEY = 4.0
HARD_END = 12.0
STRICT, TOLERANT = "require-qkd", "prefer-qkd"
INNER_NETWORKS = ("10.90.0.0/24", "10.91.0.0/24", "fd90::/64", "fd91::/64")
_TOLERANT_FOLDER = "prefer"
_TOLERANT_PORT = 51841
_INTERFACES = {STRICT: "qvpn0", TOLERANT: "qvpn1"}
_KME, _LINK, _TUNNEL = "kme.toml", "link.toml", "qvpn.toml"


class Scene:
    """The programs of both sites and the fibre; nothing runs before ``start_...``."""

    def __init__(self, lab: Lab, transport: str = "udp") -> None:
        self.lab = lab
        self.transport = transport
        self.marker = payload.new_marker()
        self.pairs: dict[str, dict[str, Daemon]] = {
            STRICT: {site: Daemon(lab, site) for site in SITES},
            TOLERANT: {site: Daemon(lab, site, f"{_TOLERANT_FOLDER}/{_TUNNEL}", "qvpn-prefer") for site in SITES},
        }
        self.links: dict[str, Process] = {}
        self.kmes: dict[str, Process] = {}

    # setting it up

    def prepare(self) -> None:
        """Write the configurations of ``qvpn init``, with what the demo changes in them."""
        sites.init(self.lab, "--key-source", "etsi014", "--allow-simulated", "--rekey", f"{REKEY:g}s")
        self._lay_the_fibre()
        for site in SITES:
            sites.with_ipv6_inside(self.lab, site)
            sites.change(self.lab, site, self._short_lived)

    def _short_lived(self, table: toml.Table) -> None:
        table["peer"][0].update(hard_end=f"{HARD_END:g}s", transport=self.transport)

    def prepare_second_pair(self) -> None:
        """The second daemon of each site, in its folder ``prefer``."""
        for site in SITES:
            self._second_identity(site)
        for site in SITES:
            self._second_daemon(site)

    def _lay_the_fibre(self) -> None:
        """New link files with the fibre as a process of its own, which ``init`` for two hosts has no place for."""
        for site in SITES:
            for name in (_LINK, "auth.pad"):
                (self.lab.site_folder(site) / name).unlink()
        ends = ["--left-host", WAN4["alice"], "--fibre-host", FIBRE_END4["alice"]]
        _run("qvpn-qkd", "pair", str(self.lab.folder / "sites"), *ends)

        def bobs_side(table: toml.Table) -> None:
            table["fibre"] = table["fibre"].replace(FIBRE_END4["alice"], FIBRE_END4["bob"])

        def both_sides(table: toml.Table) -> None:
            table["listen"] = table["listen"].replace(FIBRE_END4["alice"], "0.0.0.0")

        sites.change(self.lab, "bob", bobs_side, _LINK)
        sites.change(self.lab, "fibre", both_sides, _LINK)

    def _second_identity(self, site: str) -> None:
        """A new identity in the site's ``prefer`` folder; its public half goes to the other site."""
        pem = _run("qvpn", "genkey")
        public = _run("qvpn", "pubkey", text=pem)
        for where in SITES:
            self._tolerant_folder(where).mkdir(mode=0o700, exist_ok=True)
            (self._tolerant_folder(where) / f"{site}.pub").write_text(public)
        secret = self._tolerant_folder(site) / f"{site}.key"
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(pem)

    def _tolerant_folder(self, site: str) -> Path:
        return self.lab.site_folder(site) / _TOLERANT_FOLDER

    def _second_daemon(self, site: str) -> None:
        """The first pair's configuration with another policy, port, device and inner addresses."""
        file = self._tolerant_folder(site) / _TUNNEL
        file.write_text((self.lab.site_folder(site) / _TUNNEL).read_text())
        inner = self.inner(TOLERANT)

        def edit(table: toml.Table) -> None:
            table["site"]["listen"] = f"[::]:{_TOLERANT_PORT}"
            table["tunnel"]["interface"] = _INTERFACES[TOLERANT]
            table["tunnel"]["addresses"] = [f"{inner['ipv4'][site]}/24", f"{inner['ipv6'][site]}/64"]
            for source in table["key_source"].values():
                for name in ("ca", "certificate", "private_key"):
                    source[name] = f"../{source[name]}"
            other = OTHER[site]
            table["peer"][0] |= {
                "policy": TOLERANT,
                "endpoint": f"{WAN4[other]}:{_TOLERANT_PORT}",
                "allowed_ips": [f"{inner['ipv4'][other]}/32", f"{inner['ipv6'][other]}/128"],
            }

        toml.change(file, edit)

    def start_keys(self) -> None:
        """Fibre, both ends of the link, both KMEs."""
        for name in ("fibre", *SITES):
            self.start_link(name)
        for site in SITES:
            self.start_kme(site)

    def start_link(self, name: str) -> None:
        """``qvpn-qkd run link.toml`` at a site, or at the fibre."""
        command = [*program("qvpn-qkd"), "run", str(SITE / _LINK)]
        self.links[name] = self.lab[name].start("qvpn-qkd", command, site=True)

    def start_daemons(self) -> None:
        """Both pairs."""
        for pair in self.pairs.values():
            for daemon in pair.values():
                daemon.start()

    # what stands there

    def inner(self, pair: str) -> dict[str, dict[str, str]]:
        """Inner addresses by family and site."""
        if pair == STRICT:
            return {"ipv4": INNER4, "ipv6": INNER6}
        return {
            "ipv4": {site: address.replace("10.90.", "10.91.") for site, address in INNER4.items()},
            "ipv6": {site: address.replace("fd90:", "fd91:") for site, address in INNER6.items()},
        }

    def interface(self, pair: str) -> str:
        return _INTERFACES[pair]

    def check_running(self) -> None:
        """StepFailed where a program ended that should run."""
        daemons = [daemon.process for pair in self.pairs.values() for daemon in pair.values()]
        for process in [*self.links.values(), *self.kmes.values(), *daemons]:
            if process is not None and not process.running:
                last = " | ".join(process.tail(3))
                raise StepFailed(f"{process.name} ended with code {process.poll()}: {last}")

    def tails(self) -> dict[str, list[str]]:
        """The last log lines of every program of the scene."""
        daemons = [daemon.process for pair in self.pairs.values() for daemon in pair.values()]
        running = [*self.links.values(), *self.kmes.values(), *(process for process in daemons if process)]
        return {process.name: process.tail(8) for process in running}

    # KMEs

    def start_kme(self, site: str) -> None:
        command = [*program("qvpn-kme"), "serve", str(SITE / _KME)]
        self.kmes[site] = self.lab[site].start("qvpn-kme", command, site=True)

    def stop_kme(self, site: str) -> None:
        self.kmes[site].stop()

    def set_fault(self, site: str, name: str) -> None:
        """``qvpn-kme fault kme.toml NAME`` at that site."""
        self._operate(site, "qvpn-kme", "fault", _KME, name)

    def kme(self, site: str) -> dict[str, Any]:
        """What the KME says of its only link; empty where nobody answers (yet)."""
        try:
            answer = sites.ask(self.lab.site_folder(site) / "kme-state" / "control.sock", {"op": "status"})
        except OSError:
            return {}
        return dict(answer["links"][0])

    def stored_keys(self, site: str) -> int:
        """Keys in a KME's store that nobody has drawn."""
        link = self.kme(site)
        return int(link["own_free"]) + int(link["peer_free"]) if link else 0

    # the link

    def link(self, site: str) -> dict[str, Any]:
        """What an end of the link says of itself."""
        return sites.ask(self.lab.site_folder(site) / "link-state" / "status.sock", {})

    def link_facts(self) -> dict[str, Any]:
        said = self.link("alice")
        return {"origin": said["origin"], "link": said["about"], "qber": said["qber"], "key_rate": said["key_rate"]}

    def link_alarm(self, site: str) -> str | None:
        """The alarm that an end of the link raises now."""
        alarm = self.link(site)["alarm"]
        return None if alarm is None else str(alarm)

    def delivered_blocks(self) -> int:
        """Blocks of keys that passed privacy amplification, the larger of both ends' counts."""
        return max(int(self.link(site)["blocks_passed"]) for site in SITES)

    def set_eve(self, *, on: bool) -> None:
        """``qvpn-qkd eve link.toml on|off`` at the fibre: nobody else is told."""
        self._operate("fibre", "qvpn-qkd", "eve", _LINK, "on" if on else "off")

    def _operate(self, where: str, name: str, verb: str, file: str, *arguments: str) -> None:
        command = [*program(name), verb, str(SITE / file), *arguments]
        process = self.lab[where].start(f"{name}-{verb}", command, site=True)
        if process.wait(15) != 0:
            raise StepFailed(f"{process.name} ended with code {process.poll()}: {' | '.join(process.tail(3))}")


def _run(name: str, *arguments: str, text: str | None = None) -> str:
    """Run one of our programs to its end and return its output."""
    return subprocess.run(
        [*program(name), *arguments],
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=environment(),
    ).stdout
