"""What the benchmark asks of a tunnel program, ours or another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from qvpn.bench.errors import BenchError
from qvpn.bench.link import LinkKind
from qvpn.demo.lab import Lab
from qvpn.demo.process import Process

INNER = {"alice": "10.90.0.1", "bob": "10.90.0.2"}
"""Inner addresses, the same for every tunnel."""
PORT = 51840
START_TIMEOUT = 20.0


class Tunnel(Protocol):
    """One tunnel program, not running."""

    @property
    def name(self) -> str:
        """The row's name in tables."""

    @property
    def cipher(self) -> str:
        """What protects its packets."""

    def version(self) -> str: ...

    def absent(self) -> str | None:
        """Why it cannot run here, None if it can."""

    def start(self, lab: Lab, kind: LinkKind) -> Running:
        """Start both ends and return when they have said that they run.  Raises BenchError."""


class Running(Protocol):
    """Both ends of a tunnel."""

    @property
    def addresses(self) -> dict[str, str]:
        """Where the ends are reached through the tunnel."""

    @property
    def pids(self) -> Sequence[int]:
        """The processes whose CPU time is the tunnel's (with all below them)."""

    def check(self) -> dict[str, int]:
        """The tunnel's own counts after a measurement; raises BenchError where they show that it went wrong."""


class Pair:
    """Two processes and nothing to check beyond that they still run."""

    def __init__(self, processes: Sequence[Process], addresses: dict[str, str] = INNER) -> None:
        self.processes = processes
        self.addresses = addresses

    @property
    def pids(self) -> Sequence[int]:
        return [process.pid for process in self.processes]

    def check(self) -> dict[str, int]:
        for process in self.processes:
            if not process.running:
                raise BenchError(f"{process.name} ended with code {process.poll()}{process.last_words()}")
        return {}


def wait_until(
    what: str, probe: Callable[[], bool], process: Process | None = None, within: float = START_TIMEOUT
) -> None:
    """Poll until ``probe()``; raises BenchError after ``within`` seconds, or as soon as ``process`` has ended."""
    deadline = time.monotonic() + within
    while not probe():
        if process is not None and not process.running:
            raise BenchError(f"{process.name} ended with code {process.poll()}{process.last_words()}")
        if time.monotonic() > deadline:
            raise BenchError(f"not within {within:g} s: {what}")
        time.sleep(0.05)
