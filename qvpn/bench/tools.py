"""iperf3 and ping in a lab, and what they printed."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvpn.bench.errors import BenchError
from qvpn.bench.install import need
from qvpn.bench.link import CONGESTION, ENDS
from qvpn.bench.stats import percentile
from qvpn.demo.lab import Lab
from qvpn.demo.process import Process

PORT = 5201
_SLACK = 15.0
"""Seconds beyond its own time that a program has to end."""
LOST = 1e6
_LISTEN = "0A"
"""State of a listening socket in proc_net_tcp(5)."""


@dataclass(frozen=True)
class Transfer:
    """What the receiver of an iperf3 run got."""

    bytes: int
    seconds: float
    retransmits: int

    @property
    def gbits(self) -> float:
        return self.bytes * 8 / self.seconds / 1e9


@dataclass(frozen=True)
class Trips:
    """Round trips, microseconds."""

    sent: int
    received: int
    median: float
    p99: float
    worst: float


def parse_iperf(text: str) -> Transfer:
    """The totals of ``iperf3 --json``.  Raises BenchError with iperf3's own reason."""
    try:
        said = json.loads(text)
    except ValueError:
        raise BenchError(f"iperf3 printed no JSON: {text.strip()[:200]!r}") from None
    if "error" in said or "sum_received" not in said.get("end", {}):
        raise BenchError(f"iperf3: {said.get('error', 'no totals in its output')}")
    return _totals(said["end"])


def _totals(end: dict[str, Any]) -> Transfer:
    received, sent = end["sum_received"], end["sum_sent"]
    if received["bytes"] <= 0 or received["seconds"] <= 0:
        raise BenchError("iperf3: nothing was received")
    return Transfer(int(received["bytes"]), float(received["seconds"]), int(sent.get("retransmits", 0)))


def parse_ping(text: str) -> Trips:
    """Every ``time=`` of a ping that printed each answer.  Raises BenchError where none came.

    In the tail (``p99``, ``worst``) a request without an answer counts as one of :data:`LOST` microseconds: a tunnel
    that drops what it is late with shall not look quick.
    """
    times = sorted(float(each) * 1000 for each in re.findall(r"time=([0-9.]+) ms", text))
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    if not times or counts is None:
        raise BenchError("ping: no answer came back")
    sent, received = int(counts[1]), int(counts[2])
    tail = [*times, *[LOST] * (sent - received)]
    return Trips(sent, received, statistics.median(times), percentile(tail, 0.99), tail[-1])


class Iperf:
    """An iperf3 server at the second end, for any number of runs from the first."""

    def __init__(self, lab: Lab, address: str) -> None:
        self._lab = lab
        self._address = address
        self._server = lab[ENDS[1]].start("iperf3-server", [need("iperf3"), "-s", "-B", address, "-p", str(PORT)])
        self._wait()

    def run(self, *, seconds: float, streams: int) -> Transfer:
        """Send for so long over so many TCP connections, congestion control named."""
        process = self.start(seconds=seconds, streams=streams)
        return self.result(process, seconds)

    def start(self, *, seconds: float, streams: int) -> Process:
        options = ["-c", self._address, "-p", str(PORT), "-t", f"{seconds:g}", "-P", str(streams), "-C", CONGESTION]
        return self._lab[ENDS[0]].start("iperf3", [need("iperf3"), "--json", *options])

    def result(self, process: Process, seconds: float) -> Transfer:
        process.wait(seconds + _SLACK)
        return parse_iperf(process.out.read_text())

    def stop(self) -> None:
        self._server.kill()

    def _wait(self) -> None:
        table = Path(f"/proc/{self._server.pid}/net/tcp")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._server.running:
            rows = [row.split() for row in table.read_text().splitlines()[1:]]
            if any(row[1].endswith(f":{PORT:04X}") and row[3] == _LISTEN for row in rows):
                return
            time.sleep(0.02)
        raise BenchError(f"iperf3 does not listen{self._server.last_words()}")


def ping(lab: Lab, address: str, *options: str, seconds: float) -> Trips:
    """Ping from the first end; ``options`` are iputils' (interval, count)."""
    command = [need("ping"), "-n", *options, address]
    try:
        text = lab[ENDS[0]].run(command, timeout=seconds + _SLACK)
    except subprocess.CalledProcessError as error:
        text = str(error.stdout)  # exit code 1: some were not answered
    except subprocess.TimeoutExpired:
        raise BenchError(f"ping still ran after {seconds + _SLACK:g} s") from None
    return parse_ping(text)


def answers(lab: Lab, address: str) -> bool:
    """True if one ping comes back within a second."""
    try:
        return ping(lab, address, "-c", "1", "-W", "1", seconds=1).received == 1
    except BenchError:
        return False
