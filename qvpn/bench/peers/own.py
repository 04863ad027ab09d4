"""qvpn as it ships: ``qvpn up`` on the files that ``qvpn init --rekey 5s`` wrote; nothing is switched off."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from qvpn import __version__, uapi
from qvpn.bench import balance
from qvpn.bench.errors import BenchError
from qvpn.bench.link import ENDS, OUTER, LinkKind
from qvpn.bench.peers.base import INNER, Running, wait_until
from qvpn.demo import sites, toml
from qvpn.demo.lab import Lab
from qvpn.demo.process import ProcessFailed, program
from qvpn.demo.sites import Daemon

CIPHERS = {1: "AES-256-GCM", 2: "ChaCha20-Poly1305", 3: "AES-256-GCM"}
HANDSHAKES = {1: "ML-KEM-768, ML-DSA-65", 2: "ML-KEM-768, ML-DSA-65", 3: "ML-KEM-1024, ML-DSA-87"}
"""The post-quantum half; X25519 and Ed25519 go with it in every suite."""
STRONGEST = 3
"""The suite whose signatures need identities of another level than ``qvpn init`` makes."""
_CARRYING = ("qkd", "chained", "pqc")


class Qvpn:
    """``rekey`` in seconds; ``suite`` 1, 2 or 3; more than one ``lanes`` where the daemon has them."""

    def __init__(
        self, name: str = "qvpn", *, suite: int = 1, rekey: float = 5.0, lanes: int = 1, transport: str = "udp"
    ) -> None:
        self.name = name
        self.cipher = CIPHERS[suite]
        self._suite = suite
        self._rekey = rekey
        self._lanes = lanes
        self._transport = transport

    def version(self) -> str:
        suite = f"suite {self._suite:02d} ({HANDSHAKES[self._suite]})"
        over = "" if self._transport == "udp" else f", over {self._transport}"
        return f"{__version__}, {suite}, rekey {self._rekey:g} s, lanes {self._lanes}{over}"

    def absent(self) -> str | None:
        return None

    def start(self, lab: Lab, kind: LinkKind) -> Running:
        try:
            sites.init(lab, "--rekey", f"{self._rekey:g}s", outer=OUTER)
        except subprocess.CalledProcessError as error:
            raise BenchError(f"qvpn init: {str(error.stderr).strip()}") from None
        if self._suite == STRONGEST:
            _new_identities(lab)
        daemons = [Daemon(lab, name) for name in ENDS]
        for daemon in daemons:
            sites.change(lab, daemon.site, self._adapt)
            daemon.start()
        for daemon in daemons:
            self._wait(daemon)
        return _Daemons(daemons)

    def _adapt(self, table: toml.Table) -> None:
        """Only what differs from the file as ``init`` wrote it."""
        if self._suite != 1:
            table["peer"][0]["suites"] = [self._suite]
        if self._transport != "udp":
            table["peer"][0]["transport"] = self._transport
        if self._lanes != 1:
            table["tunnel"]["lanes"] = self._lanes

    def _wait(self, daemon: Daemon) -> None:
        try:
            wait_until(f"{daemon.site} has an epoch", lambda: daemon.running() and daemon.state() in _CARRYING)
            if self._lanes > 1:
                wait_until(f"{daemon.site} has {self._lanes} lanes", lambda: self._lanes_up(daemon) == self._lanes)
        except ProcessFailed as error:
            raise BenchError(str(error)) from None

    @staticmethod
    def _lanes_up(daemon: Daemon) -> int:
        """Lanes whose path is proved, so that packets leave on them."""
        return sum(bool(lane["up"]) for lane in daemon.peer().get("lanes", ()))


def _new_identities(lab: Lab) -> None:
    """Both sites' keys made anew with ``qvpn genkey --level 5``, and told to each other."""
    folders = {name: lab.site_folder(name) for name in ENDS}
    for name, folder in folders.items():
        private = lab[name].run([*program("qvpn"), "genkey", "--level", "5"])
        (folder / f"{name}.key").write_text(private)  # the file is there, and stays 0600
        public = lab[name].run([*program("qvpn"), "pubkey"], text=private)
        for each in folders.values():
            (each / f"{name}.pub").write_text(public)


class _Daemons:
    """Both daemons, asked over their control sockets."""

    def __init__(self, daemons: Sequence[Daemon]) -> None:
        self._daemons = daemons
        self.addresses = INNER

    @property
    def pids(self) -> Sequence[int]:
        return [daemon.process.pid for daemon in self._daemons if daemon.process is not None]

    @property
    def logs(self) -> list[Path]:
        return [daemon.process.log for daemon in self._daemons if daemon.process is not None]

    def check(self) -> dict[str, int]:
        """Rekeys and balanced counters, or an error; returns the counts of both ends together."""
        total = {"rekeys": 0}
        for daemon in self._daemons:
            try:
                daemon.running()
                status = daemon.status()
            except (ProcessFailed, uapi.UapiError) as error:
                raise BenchError(str(error)) from None
            found = balance.counts(status)
            balance.check(daemon.site, found)
            for name, value in found.items():
                total[name] = total.get(name, 0) + value
            total["rekeys"] += sum(int(peer["rekeys"]) for peer in status["peers"])
        return total
