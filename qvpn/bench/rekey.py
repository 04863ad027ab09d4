"""``qvpn bench rekey``: what a rekey costs, and what one each second takes from a transfer.

Real daemons with the handshake and the keys that ``qvpn init`` sets up, once with a rekey each second and once with
one each minute, in turn.  Two figures tell the same in two ways.  The CPU time that both daemons use while nothing
else happens, divided by the rekeys in it, hardly depends on what else the machine does.  The throughput of a transfer
beside the rekeys is what one wants to know, but differs by some per cent from run to run anyway.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qvpn.bench import cpu, link, output, tools
from qvpn.bench.errors import BenchError
from qvpn.bench.link import ENDS
from qvpn.bench.peers.base import wait_until
from qvpn.bench.peers.own import Qvpn
from qvpn.bench.run import say
from qvpn.bench.stats import ratio, spread
from qvpn.demo import sandbox
from qvpn.demo.process import ProcessFailed, module

OFTEN, RARELY = 1.0, 60.0
"""Seconds from rekey to rekey."""
QUIET_SECONDS = 5.0
WARM_UP = 1


@dataclass
class Rounds:
    """What was measured with one interval, round by round."""

    interval: float
    """Seconds."""
    gbits: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)
    quiet_ms: list[float] = field(default_factory=list)
    """CPU milliseconds of both daemons in a second without traffic."""


def measure(rounds: int, seconds: int, folder: Path, say: Callable[[str], None]) -> tuple[Rounds, Rounds]:
    """(often, rarely), interleaved, each first in every second round.  Inside a sandbox.  Raises BenchError."""
    pair = Rounds(OFTEN), Rounds(RARELY)
    for number in range(rounds):
        for one in pair if number % 2 else pair[::-1]:
            _take(one, folder / f"{number}-{one.interval:g}", seconds)
            say(f"rekey: round {number + 1}/{rounds}, every {one.interval:g} s: {one.gbits[-1]:.2f} Gbit/s")
    return pair


def _take(into: Rounds, folder: Path, seconds: int) -> None:
    tunnel = Qvpn(rekey=into.interval)
    try:
        with link.make(folder, link.LINKS["default"]) as lab:
            running = tunnel.start(lab, link.LINKS["default"])
            target = running.addresses[ENDS[1]]
            wait_until("the tunnel answers a ping", lambda: tools.answers(lab, target))
            iperf = tools.Iperf(lab, target)
            iperf.run(seconds=WARM_UP, streams=1)
            before = cpu.seconds(running.pids)
            got = iperf.run(seconds=seconds, streams=1)
            used = cpu.seconds(running.pids) - before
            iperf.stop()
            time.sleep(1)  # what the transfer left behind
            before = cpu.seconds(running.pids)
            time.sleep(QUIET_SECONDS)
            into.quiet_ms.append((cpu.seconds(running.pids) - before) / QUIET_SECONDS * 1e3)
            into.gbits.append(got.gbits)
            into.cpu_s_per_gb.append(used / (got.bytes / 1e9))
            running.check()
    except ProcessFailed as error:
        raise BenchError(str(error)) from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{error.cmd[-4:]} failed") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cost_ms(often: Rounds, rarely: Rounds) -> float:
    """CPU milliseconds of both daemons for one rekey: median of the rounds."""
    each = 1 / often.interval - 1 / rarely.interval
    found = spread([(one - other) / each for one, other in zip(often.quiet_ms, rarely.quiet_ms, strict=True)])
    return found.median if found is not None else 0.0


def table(often: Rounds, rarely: Rounds) -> list[list[str]]:
    rows = [["rekey every", "1 stream, Gbit/s", "CPU s/GB", "CPU ms a second, no traffic"]]
    rows += [
        [f"{one.interval:g} s", *map(_shown, (one.gbits, one.cpu_s_per_gb, one.quiet_ms), (2, 2, 1))]
        for one in (often, rarely)
    ]
    compared = ratio(often.gbits, rarely.gbits), ratio(often.cpu_s_per_gb, rarely.cpu_s_per_gb)
    shown = [f"{each.median:.3f} ({each.low:.3f}–{each.high:.3f})" if each else "–" for each in compared]
    rows.append(["the first divided by the second", *shown, f"one rekey: {cost_ms(often, rarely):.1f} ms"])
    return rows


def _shown(series: Sequence[float], digits: int) -> str:
    found = spread(series)
    if found is None:
        return "–"
    return f"{found.median:.{digits}f} ({found.low:.{digits}f}–{found.high:.{digits}f})"


def plain(often: Rounds, rarely: Rounds) -> dict[str, object]:
    return {"rekey": [asdict(often), asdict(rarely)], "one_rekey_cpu_ms": cost_ms(often, rarely)}


def main(rounds: int, seconds: int, *, as_json: bool) -> int:
    """Run in a sandbox; 0 if every figure could be taken."""
    try:
        return sandbox.run(module("qvpn.bench.rekey", json.dumps([rounds, seconds, as_json])), name="qvpn bench")
    except sandbox.SandboxError as error:
        print(f"qvpn bench: {error}", file=sys.stderr)
        return 1


def _work() -> int:
    rounds, seconds, as_json = json.loads(sys.argv[1])
    try:
        pair = measure(rounds, seconds, Path("/run/qvpn-bench"), say)
    except BenchError as error:
        say(f"qvpn bench: {error}")
        return 1
    output.show(as_json, plain(*pair), table(*pair))
    return 0


if __name__ == "__main__":
    sys.exit(sandbox.body(_work))
