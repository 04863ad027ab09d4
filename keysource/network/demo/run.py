"""The demo as a program: bounded, told as it goes, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from keysource.network.demo.acts import Act, Acts
from keysource.network.demo.drawing import drawn
from keysource.network.demo.world import DemoFailed, World

LONGEST = 58.0
"""Seconds, start and end included."""
_LAST_WORD = 4.0


def run(*, as_json: bool = False, svg: Path | None = None) -> int:
    """Exit code: 0 where every act held, 130 after Ctrl-C."""
    quiet = as_json and svg is None
    console = Console(highlight=False, emoji=False, record=svg is not None, stderr=as_json, quiet=quiet)
    try:
        code = asyncio.run(_run(console, as_json))
    except DemoFailed as error:
        console.print(f"[bold red]{escape(str(error))}[/bold red]")
        return 1
    if svg is not None and code != 130:
        console.save_svg(str(svg), title="qvpn-kme demo")
    return code


async def _run(console: Console, as_json: bool) -> int:
    main = asyncio.current_task()
    assert main is not None
    interrupted = False

    def stop() -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            main.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    world = World()
    try:
        return await _show(console, as_json, world)
    except asyncio.CancelledError:
        if not interrupted:
            raise
        left = world.left()
        print("qvpn-kme demo: interrupted;", "; ".join(left) or "nothing", "is left behind", flush=True)
        return 1 if left else 130


async def _show(console: Console, as_json: bool, world: World) -> int:
    began = time.monotonic()
    console.print("qvpn-kme demo: five nodes of a QKD network, each a process with a store of its own.")
    console.print("The links are simulated, so nothing here has quantum security; every mechanism is the real one.\n")
    acts: Acts | None = None
    held = False
    async with world:
        acts = Acts(world, lambda act: _tell(console, act))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST - _LAST_WORD):
                held = await acts.all()
    left = world.left()
    seconds = time.monotonic() - began
    held = held and not left
    report: dict[str, Any] = {
        "held": held,
        "seconds": round(seconds, 1),
        "keys_equal_at_both_ends": acts.drawn.equal,
        "keys_different": acts.drawn.different,
        "keys_at_one_end_only": acts.drawn.half,
        "processes_seen": acts.processes,
        "left_behind": left,
        "acts": [
            {"name": act.name, "held": act.held, "seconds": round(act.seconds, 1), "reason": act.reason, **act.facts}
            for act in acts.done
        ],
    }
    if as_json:
        print(json.dumps(report), flush=True)
    drawn_keys = f"{acts.drawn.equal} keys drawn at west were fetched at east, {acts.drawn.different} differed"
    drawn_keys += f", {acts.drawn.half} are at west only" if acts.drawn.half else ""
    gone = f"of {acts.processes} processes and their files {len(left)} are left"
    console.print(f"{drawn_keys}.  {seconds:.0f} s; {gone}.")
    for what in left:
        console.print(f"    [bold red]{escape(what)}[/bold red]", soft_wrap=True)
    console.print("[bold green]all held[/bold green]" if held else "[bold red]NOT all held[/bold red]")
    return 0 if held else 1


def _tell(console: Console, act: Act) -> None:
    outcome = "[green]held[/green]" if act.held else "[bold red]FAILED[/bold red]"
    console.print(f"[bold]{escape(act.title)}[/bold]")
    for name, value in act.facts.items():
        shown = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
        console.print(f"    {escape(name)}: {escape(shown)}", soft_wrap=True)
    if act.reason and not act.held:
        console.print(f"    [bold red]{escape(act.reason)}[/bold red]", soft_wrap=True)
    if act.picture is not None:
        console.print(drawn(act.picture))
    console.print(f"  {outcome}  {act.seconds:.1f} s\n")
