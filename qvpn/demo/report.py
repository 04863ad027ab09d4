"""How the demo is told: live lines and a table for people, one JSON object for programs."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qvpn.demo.steps import FAILED, HELD, Script, Step

SCHEMA = 1
_STYLE = {HELD: "green", FAILED: "bold red"}
_WIDTH = 110


class Teller:
    """Tells each step as it goes.  Colours and width follow the terminal; a pipe or file gets plain lines."""

    def __init__(self, stream: TextIO) -> None:
        console = Console(file=stream, highlight=False, emoji=False)
        self._console = console if console.is_terminal else Console(
            file=stream, highlight=False, emoji=False, width=_WIDTH, no_color=True
        )  # fmt: skip
        self._number = 0

    def say(self, line: str = "") -> None:
        self._console.print(escape(line), soft_wrap=True)
        self._console.file.flush()

    def begins(self, step: Step) -> None:
        self._number += 1
        self._console.print(f"\n[bold]{self._number:2}  {escape(step.title)}[/bold]", soft_wrap=True)
        self._console.file.flush()

    def ended(self, step: Step) -> None:
        for name, value in step.facts.items():
            self._console.print(f"      {escape(words(name))}: {escape(show(value))}", soft_wrap=True)
        if step.reason is not None:
            self._console.print(f"      [bold red]{escape(step.reason)}[/bold red]", soft_wrap=True)
        for program, lines in step.logs.items():
            self.say(f"      last lines of {program}:")
            for line in lines:
                self.say(f"        {line}")
        style = _STYLE.get(step.outcome, "yellow")
        self._console.print(f"    [{style}]{step.outcome}[/{style}]  {step.seconds:.1f} s", soft_wrap=True)
        self._console.file.flush()

    def summary(self, script: Script, totals: dict[str, Any], seconds: float) -> None:
        table = Table(title="Summary", title_justify="left", show_lines=False)
        table.add_column("#", justify="right")
        table.add_column("step", overflow="fold")
        table.add_column("outcome")
        table.add_column("s", justify="right")
        for number, step in enumerate(script.steps, 1):
            style = _STYLE.get(step.outcome, "yellow")
            outcome = f"[{style}]{step.outcome}[/{style}]"
            table.add_row(str(number), escape(step.title), outcome, f"{step.seconds:.1f}")
        self._console.print()
        self._console.print(table)
        for name, value in totals.items():
            self.say(f"{words(name):>16}: {show(value)}")
        self.say(f"{'took':>16}: {seconds:.0f} s")
        held = sum(step.held for step in script.steps)
        style = _STYLE[HELD if script.all_held else FAILED]
        self._console.print(f"\n[{style}]{held} of {len(script.steps)} steps held.[/{style}]")


def words(name: str) -> str:
    return name.replace("_", " ")


def show(value: object) -> str:
    """A fact for people: digits in groups, lists joined, nested facts in one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{words(str(key))} {show(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(show(entry) for entry in value) or "none"
    return "none" if value is None else str(value)


def as_json(script: Script, totals: dict[str, Any], seconds: float) -> str:
    """The one object of ``qvpn demo --json``; ``totals`` are its top-level figures, null where never measured."""
    return json.dumps(
        {
            "schema": SCHEMA,
            "held": script.all_held,
            "seconds": round(seconds, 1),
            **totals,
            "steps": [step.to_json() for step in script.steps],
        },
        indent=2,
    )


def teller(*, as_json: bool) -> Teller:
    """Progress goes to standard output for people; beside JSON it goes to standard error."""
    return Teller(sys.stderr if as_json else sys.stdout)
