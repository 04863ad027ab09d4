"""``qvpn-qkd bench``.

In one process, ours and the peers' alike, CPU seconds are counted, so the figures compare and a busy machine changes
them little.  What runs through several processes, or in several threads, is by the clock on the wall: run it alone.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from keysource.qkd.acceptance import Accepted, acceptance
from keysource.qkd.bench import targets
from keysource.qkd.bench.chain import Chain, Slowness, chain, slowness
from keysource.qkd.bench.correction import Corrected, Talked, in_one_process, in_two_processes
from keysource.qkd.bench.light import Speed, amplification, samplers
from keysource.qkd.bench.peers import peers
from keysource.qkd.distill import fftw

_LINK, _BLOCKS = "metro50", 8


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One key of each, shorter samples.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    blocks: Annotated[int, typer.Option(min=0, help="Also distil so many blocks each at 25, 50 and 100 km.")] = 0,
    seconds: Annotated[
        int, typer.Option("--chain", min=0, max=3600, help="Also run whole links in processes, so many seconds.")
    ] = 0,
) -> None:
    """Cascade, amplification and samplers beside peers that are installed, and beside the targets; with --blocks how
    much of the formula's key is delivered, with --chain how much whole processes distil."""
    corrected = [*in_one_process(quick), *peers(quick)]
    talked = in_two_processes(quick)
    speeds = [*amplification(quick), *samplers(quick)]
    whole = chain(float(seconds)) if seconds else None
    link = slowness(_LINK, _BLOCKS) if seconds else None
    passed = [acceptance(km, blocks) for km in (25.0, 50.0, 100.0)] if blocks else []
    goals = targets.of_correction(corrected, talked) + targets.of_speeds(speeds) + targets.of_chain(whole, link)
    if as_json:
        print(
            json.dumps(
                {
                    "machine": platform.machine(),
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                    "fftw": fftw.HERE,
                    "cascade": [asdict(c) for c in corrected],
                    "two_processes": [asdict(t) for t in talked],
                    "speeds": [asdict(s) for s in speeds],
                    "chain": None if whole is None else asdict(whole),
                    "link": None if link is None else asdict(link),
                    "acceptance": [asdict(a) for a in passed],
                    "targets": [asdict(goal) | {"met": goal.met} for goal in goals],
                }
            )
        )
        return
    console = Console(width=max(110, Console().width))
    tables = [_cascade(corrected), _two_processes(talked), _speeds(speeds)]
    tables += ([_whole(whole, link)] if whole and link else []) + ([_delivered(passed)] if passed else [])
    for table in [*tables, _goals(goals)]:
        console.print(table)
    print("amplification: " + ("FFTW (pyfftw)" if fftw.HERE else "numpy; the extra fast brings FFTW"))
    print("records, far above most of this: " + "; ".join(targets.RECORDS))


def _cascade(corrected: list[Corrected]) -> Table:
    table = Table("Cascade, one process", "bits", "errors", "f", "frames failed", "messages", "Mbit per CPU s")
    for each in corrected:
        f = "not counted" if each.f is None else f"{each.f:.3f}"
        messages = "-" if each.messages is None else f"{each.messages:.0f}"
        row = (each.who, str(each.bits), f"{100 * each.ratio:g} %", f, f"{each.failed}/{each.frames}", messages)
        table.add_row(*row, f"{each.mbits:.3g}")
    return table


def _two_processes(talked: list[Talked]) -> Table:
    columns = ("bits", "errors", "f", "keys failed", "messages", "Mbit/s", "CPU s: Alice", "Bob")
    table = Table("Cascade, two processes", *columns)
    for each in talked:
        row = (each.schedule, str(each.bits), f"{100 * each.ratio:g} %", f"{each.f:.3f}")
        used = (f"{each.alice_seconds:.2f}", f"{each.bob_seconds:.2f}")
        talk = (f"{each.failed}/{each.keys}", f"{each.messages:.0f}", f"{each.mbits:.3g}")
        table.add_row(*row, *talk, *used)
    return table


def _speeds(speeds: list[Speed]) -> Table:
    table = Table("", "millions of", "per CPU second", "per second")
    for speed in speeds:
        table.add_row(speed.what, speed.unit, f"{speed.per_second:.4g}", f"{speed.per_wall_second:.4g}")
    return table


def _whole(whole: Chain, link: Slowness) -> Table:
    table = Table("whole link in processes", "blocks", "Mbit/s detected", "sifted", "secret", "CPU: Alice", "Bob")
    counts = f"{whole.blocks} and {whole.failed} failed"
    rates = (f"{whole.detected:.3g}", f"{whole.sifted:.3g}", f"{whole.secret:.3g}")
    table.add_row(f"{whole.seconds:.0f} s", counts, *rates, f"{whole.alice_load:.2f}", f"{whole.bob_load:.2f}")
    said = f"{link.preset}, light simulated: {link.seconds:.2f} s for one"
    table.add_row(said, str(link.blocks), "", f"{link.sifted:.3g}", "", "", "")
    return table


def _delivered(passed: list[Accepted]) -> Table:
    table = Table("km", "key bits", "length", "accepted", "formula", "length x acceptance / formula")
    for a in passed:
        sizes = (str(a.key_bits), str(a.length), f"{a.accepted}/{a.blocks}", str(a.formula))
        table.add_row(f"{a.km:g}", *sizes, f"{a.share:.4f}")
    return table


def _goals(goals: list[targets.Target]) -> Table:
    table = Table("target", "wanted", "measured", "met")
    for goal in goals:
        wanted = f"{'>=' if goal.least else '<='} {goal.wanted:g} {goal.unit}"
        table.add_row(goal.what, wanted, f"{goal.measured:.4g}", "yes" if goal.met else "NO")
    return table
