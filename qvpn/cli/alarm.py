"""``qvpn alarm raise|clear SOURCE``: an operator stops a key source of running daemons, and lets it go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvpn import uapi
from qvpn.cli.show import control_sockets

alarm = typer.Typer(
    name="alarm",
    help="Stop a key source by an alarm (ETSI 014 carries none), or clear it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="NAME of [key_source.NAME].")]
File = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="The site's qvpn.toml; without it every daemon of this user.")
]


@alarm.command("raise")
def raise_(
    source: Source,
    file: File = None,
    reason: Annotated[str, typer.Option(help="Why; it shows in status and log.")] = "",
) -> None:
    """From now on the source gives no key, also after a restart; on_alarm says what becomes of live epochs."""
    for path in control_sockets(file):
        uapi.ask(path, "alarm", {"source": source, "active": True, "reason": reason or "no reason given"})


@alarm.command("clear")
def clear(source: Source, file: File = None) -> None:
    """The operator's alarm is over; one of the device itself is not in his hands."""
    for path in control_sockets(file):
        uapi.ask(path, "alarm", {"source": source, "active": False})
