"""The programs of a site, seen from the lab: configurations made by ``qvpn init``, daemons and what they say.

Nothing here knows a key or a state of its own: what a daemon is doing is asked over its control socket.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvpn import uapi
from qvpn.demo import toml
from qvpn.demo.lab import SITES, WAN4, Lab
from qvpn.demo.launch import SITE
from qvpn.demo.process import Process, ProcessFailed, environment, program
from qvpn.demo.steps import wait_for

PORT = 51840
INNER4 = {"alice": "10.90.0.1", "bob": "10.90.0.2"}
INNER6 = {"alice": "fd90::1", "bob": "fd90::2"}
OTHER = {"alice": "bob", "bob": "alice"}


def init(lab: Lab, *options: str, outer: dict[str, str] = WAN4) -> None:
    """Run ``qvpn init`` for both sites of the lab; raises subprocess.CalledProcessError with what it said."""
    ends = []
    for option, site in zip(("--left", "--right"), SITES, strict=True):
        host = f"[{outer[site]}]" if ":" in outer[site] else outer[site]
        ends += [option, f"{site}@{host}:{PORT}"]
    subprocess.run(
        [*program("qvpn"), "init", str(lab.folder / "sites"), *ends, *options],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=environment(),
    )


def change(lab: Lab, site: str, edit: Callable[[toml.Table], None], file: str = "qvpn.toml") -> None:
    """Change one of a site's configurations (see :mod:`qvpn.demo.toml`)."""
    toml.change(lab.site_folder(site) / file, edit)


def with_ipv6_inside(lab: Lab, site: str, file: str = "qvpn.toml") -> None:
    """Give the tunnel an inner IPv6 address beside the IPv4 one that ``init`` wrote."""

    def edit(table: toml.Table) -> None:
        table["tunnel"]["addresses"].append(f"{INNER6[site]}/64")
        table["peer"][0]["allowed_ips"].append(f"{INNER6[OTHER[site]]}/128")

    change(lab, site, edit, file)


def ask(socket_path: Path, request: toml.Table, timeout: float = 5.0) -> dict[str, Any]:
    """One JSON line to a control socket of a KME or a link, and its answer.

    Raises OSError where nobody answers and ValueError where the answer is not an object or an error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(str(socket_path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as lines:
            answer = json.loads(lines.readline() or b"null")
    if not isinstance(answer, dict) or "error" in answer:
        raise ValueError(f"{socket_path}: {answer.get('error') if isinstance(answer, dict) else 'no answer'}")
    return answer


class Daemon:
    """A ``qvpn up FILE`` in a site, and what its control socket says."""

    def __init__(self, lab: Lab, site: str, file: str = "qvpn.toml", name: str = "qvpn") -> None:
        self.site = site
        self.name = name
        self._lab = lab
        self._file = file
        self.process: Process | None = None

    def start(self) -> None:
        command = [*program("qvpn"), "up", str(SITE / self._file)]
        self.process = self._lab[self.site].start(self.name, command, site=True)

    @property
    def control(self) -> Path:
        return (self._lab.site_folder(self.site) / self._file).parent / "state" / "control.sock"

    def status(self) -> dict[str, Any]:
        """The daemon's status (``qvpn.status``); raises uapi.UapiError where it does not answer."""
        answer = uapi.ask(self.control, "status")["status"]
        if not isinstance(answer, dict):
            raise uapi.UapiError(f"{self.control}: no status")
        return answer

    def peer(self) -> dict[str, Any]:
        """What it says of its only peer."""
        return self._only("peers")

    def source(self) -> dict[str, Any]:
        """What it says of its only key source."""
        return self._only("key_sources")

    def _only(self, what: str) -> dict[str, Any]:
        found = self.status()[what]
        if not found:  # it answers before everything has started
            raise uapi.UapiError(f"{self.control}: the daemon has no {what} yet")
        return dict(found[0])

    def answers(self) -> bool:
        try:
            self.peer()
        except uapi.UapiError:
            return False
        return True

    def state(self) -> str:
        """The policy word for its peer now, ``down`` where the daemon does not answer."""
        try:
            return str(self.peer()["state"])
        except uapi.UapiError:
            return "down"

    def wait_state(self, *wanted: str, within: float) -> float:
        """Wait until the peer is in one of these states; StepFailed otherwise.  Returns the seconds it took."""
        what = f"{self.site} ({self.name}) in state {' or '.join(wanted)}"
        return wait_for(what, lambda: self.running() and self.state() in wanted, within=within)

    def wait_epochs(self, count: int, *, within: float) -> float:
        """Wait until at least ``count`` epochs were confirmed since the daemon's start."""
        what = f"{count} epochs at {self.site} ({self.name})"
        return wait_for(what, lambda: self.running() and self.answers() and self._epochs() >= count, within=within)

    def _epochs(self) -> int:
        return int(self.peer()["epochs"])

    def running(self) -> bool:
        """True; ProcessFailed where its process has ended, for then nothing is to be waited for."""
        if self.process is not None and not self.process.running:
            raise ProcessFailed(
                f"{self.process.name} ended with code {self.process.poll()}{self.process.last_words()}"
            )
        return True
