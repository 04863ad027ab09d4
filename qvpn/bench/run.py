"""``qvpn bench net``: outside, start ourselves in a sandbox; inside, go through the rounds and print the table.

The sandbox is the demo's (:mod:`qvpn.demo.sandbox`): whatever ends this, also SIGKILL, takes every namespace, process
and file of it away.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvpn.bench.results import Results
from qvpn.demo import sandbox
from qvpn.demo.process import module

_FOLDER = Path("/run/qvpn-bench")


@dataclass(frozen=True)
class Settings:
    """What to measure.  ``out`` is a folder for results.md, results.json and the chart."""

    rounds: int = 5
    seconds: int = 2
    peers: tuple[str, ...] = ()
    links: tuple[str, ...] = ("default",)
    measures: tuple[str, ...] = ()
    extras: bool = True
    carriers: bool = False
    as_json: bool = False
    out: str | None = None


def main(settings: Settings) -> int:
    """Run in a sandbox; 0 only if every figure could be taken and our counters balanced."""
    argument = json.dumps(dataclasses.asdict(settings))
    try:
        return sandbox.run(module("qvpn.bench.run", argument), name="qvpn bench")
    except sandbox.SandboxError as error:
        print(f"qvpn bench: {error}", file=sys.stderr)
        return 1


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _inside(settings: Settings) -> int:
    # Imported here: the outer process needs none of it.
    from qvpn.bench import machine
    from qvpn.bench.errors import BenchError
    from qvpn.bench.rounds import go
    from qvpn.bench.table import markdown

    results = Results(machine.facts(), settings.rounds, settings.seconds)
    started = time.monotonic()
    try:
        go(settings, results, _FOLDER, say)
    except BenchError as error:
        say(f"qvpn bench: {error}")
        return 1
    say(f"{time.monotonic() - started:.0f} s")
    print(results.to_json() if settings.as_json else markdown(results), flush=True)
    if settings.out is not None:
        _write(Path(settings.out), results)
    for failure in results.failures:
        say(f"qvpn bench: {failure}")
    return 1 if results.failures else 0


def _write(folder: Path, results: Results) -> None:
    """results.json, results.md, and the chart where there are figures for one."""
    from qvpn.bench.chart import svg
    from qvpn.bench.table import markdown

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.to_json() + "\n")
    (folder / "results.md").write_text("# qvpn beside other userspace tunnels\n\n" + markdown(results))
    (folder / "chart.svg").write_text(svg(results))


def _settings(arguments: Sequence[str]) -> Settings:
    plain: dict[str, Any] = json.loads(arguments[0])
    values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in plain.items()}
    return Settings(**values)


def _work() -> int:
    try:
        return _inside(_settings(sys.argv[1:]))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(sandbox.body(_work))
