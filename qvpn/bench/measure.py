"""Take the figures of one case: bring the tunnel up in a lab of its own, measure, check, take everything down."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qvpn.bench import cpu, link, tools, udprate
from qvpn.bench.cases import Case
from qvpn.bench.errors import BenchError
from qvpn.bench.link import ENDS
from qvpn.bench.peers.base import Running, wait_until
from qvpn.demo.lab import Lab
from qvpn.demo.process import ProcessFailed

WARM_UP = 1
"""Seconds of traffic before the first figure: sockets, caches and TCP's slow start are not compared."""

Figures = dict[str, float]


@dataclass
class Session:
    """A running tunnel in its lab."""

    lab: Lab
    running: Running
    seconds: float
    iperf: tools.Iperf
    figures: Figures = field(default_factory=dict)

    @property
    def target(self) -> str:
        return self.running.addresses[ENDS[1]]


def take(case: Case, folder: Path, seconds: float) -> tuple[Figures, dict[str, int]]:
    """The figures of one case and the tunnel's own counts.  Raises BenchError (Unbalanced where counts disagree)."""
    try:
        with link.make(folder, case.link) as lab:
            running = case.tunnel.start(lab, case.link)
            wait_until(f"{case.tunnel.name} answers a ping", lambda: tools.answers(lab, running.addresses[ENDS[1]]))
            session = Session(lab, running, seconds, tools.Iperf(lab, running.addresses[ENDS[1]]))
            session.iperf.run(seconds=WARM_UP, streams=1)
            for measure in case.measures:
                MEASURES[measure](session)
            session.iperf.stop()
            _wait_quiet(running)
            return session.figures, running.check()
    except ProcessFailed as error:
        raise BenchError(str(error)) from None
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{error.cmd[-4:]}: {str(error.stderr).strip()}") from None
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{error.cmd[-4:]} still ran after {error.timeout:g} s") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_quiet(running: Running, step: float = 0.1, limit: float = 3.0) -> None:
    """Until the tunnel has nothing more to do, so that its counters stand still when they are read."""
    deadline = time.monotonic() + limit
    before = cpu.seconds(running.pids)
    while time.monotonic() < deadline:
        time.sleep(step)
        now = cpu.seconds(running.pids)
        if now - before <= 0.02:
            return
        before = now


def _tcp1(session: Session) -> None:
    before = cpu.seconds(session.running.pids)
    got = session.iperf.run(seconds=session.seconds, streams=1)
    used = cpu.seconds(session.running.pids) - before
    session.figures["tcp1_gbits"] = got.gbits
    session.figures["tcp1_retransmits"] = got.retransmits
    if session.running.pids:
        session.figures["cpu_s_per_gb"] = used / (got.bytes / 1e9)


def _tcp4(session: Session) -> None:
    session.figures["tcp4_gbits"] = session.iperf.run(seconds=session.seconds, streams=4).gbits


def _udp(session: Session) -> None:
    with udprate.Generator(session.lab, session.running.addresses) as generator:
        session.figures["udp_pps"] = udprate.search(generator.attempt)


def _idle(session: Session) -> None:
    trips = tools.ping(session.lab, session.target, "-i", "0.02", "-c", "50", seconds=1.0)
    session.figures["idle_us"] = trips.median


def _hot(session: Session) -> None:
    """Back to back: the next request leaves when the answer is there."""
    trips = tools.ping(session.lab, session.target, "-A", "-c", "2000", "-w", "2", seconds=2.0)
    session.figures["hot_us"] = trips.median


def _load(session: Session) -> None:
    """Round trips while four connections fill the tunnel."""
    seconds = max(session.seconds, 1.5)
    process = session.iperf.start(seconds=seconds, streams=4)
    time.sleep(0.4)  # the connections must be there before the first request leaves
    count = str(int((seconds - 0.6) / 0.01))
    trips = tools.ping(session.lab, session.target, "-i", "0.01", "-c", count, "-W", "1", seconds=seconds)
    session.iperf.result(process, seconds)
    session.figures["load_p99_us"] = trips.p99
    session.figures["load_lost"] = trips.sent - trips.received


MEASURES: dict[str, Callable[[Session], None]] = {
    "tcp1": _tcp1,
    "tcp4": _tcp4,
    "udp": _udp,
    "idle": _idle,
    "hot": _hot,
    "load": _load,
}
