"""All cases, round after round.  Each round begins at another case, so that none always has the same neighbour."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qvpn.bench.cases import EVERYTHING, Case, plan
from qvpn.bench.errors import BenchError, Unbalanced
from qvpn.bench.measure import Figures, take
from qvpn.bench.results import Results, Row
from qvpn.bench.run import Settings

Say = Callable[[str], None]


def go(settings: Settings, results: Results, folder: Path, say: Say) -> None:
    """Fill ``results``.  Raises Unbalanced at once; a case that fails otherwise is noted and the others go on."""
    wanted = plan(
        settings.peers,
        settings.links,
        settings.measures or EVERYTHING,
        extras=settings.extras,
        carriers=settings.carriers,
    )
    cases = _present(wanted, results)
    if not cases:
        raise BenchError("nothing to measure: on links other than default only tcp1 and tcp4 are taken")
    for absent, why in results.absent.items():
        say(f"{absent}: absent, {why}")
    for case in cases:
        tunnel = case.tunnel
        results.rows.append(Row(tunnel.name, case.link.name, tunnel.cipher, tunnel.version()))
    started, total = time.monotonic(), settings.rounds * len(cases)
    for number in range(settings.rounds):
        for place, case in enumerate(_turned(cases, number)):
            said = _one(case, folder / f"{number}-{place}", number, settings, results)
            done = number * len(cases) + place + 1
            left = (time.monotonic() - started) * (total - done) / done
            say(f"{done}/{total}, round {number + 1}, about {_span(left)} left: {case.key}: {said}")


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _present(cases: Sequence[Case], results: Results) -> list[Case]:
    for case in cases:
        if (why := case.tunnel.absent()) is not None:
            results.absent[case.tunnel.name] = why
    return [case for case in cases if case.tunnel.name not in results.absent]


def _turned(cases: Sequence[Case], by: int) -> list[Case]:
    start = by % len(cases)
    return [*cases[start:], *cases[:start]]


def _one(case: Case, folder: Path, number: int, settings: Settings, results: Results) -> str:
    """Take one case's figures into its row; returns them, or why there are none, in short."""
    row = results.row(case.tunnel.name, case.link.name)
    assert row is not None
    figures: Figures = {}
    try:
        figures, counts = take(case, folder, settings.seconds)
    except Unbalanced:
        raise
    except BenchError as error:
        results.failures.append(f"{case.key}, round {number + 1}: {error}")
        return f"FAILED: {error}"
    finally:
        row.note(number, figures)
    row.counts.append(counts)
    return _short(figures)


def _short(figures: Figures) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if value < 1000 else f"{name} {value:.0f}" for name, value in figures.items()
    )
