"""``qvpn check``, ``up`` and ``demo``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qvpn.cli.output import fail, usage

File = Annotated[Path, typer.Argument(metavar="FILE", help="The site's qvpn.toml.", show_default=False)]


def check(file: File) -> None:
    """Check a configuration and the files that it names, without starting anything."""
    from qvpn import launch  # here: the daemon's imports cost time that other commands need not pay

    for line in launch.check(file):
        print(line)


def up(file: File) -> None:
    """Run the site's daemon in the foreground until Ctrl-C, SIGTERM or qvpn down."""
    # Rights belong to threads: numpy's idle workers, started by the import, would keep root's.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from qvpn import launch

    launch.run(file)


def demo(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    transport: Annotated[str, typer.Option(help="How the sites reach each other: udp or quic.")] = "udp",
) -> None:
    """Two sites, an untrusted network, KMEs and a simulated QKD link on this machine, step by step."""
    if transport not in ("udp", "quic"):
        raise usage(f'--transport is "udp" or "quic", not {transport!r}')
    try:
        from qvpn.demo.run import main
    except ImportError:
        raise fail("qvpn: this installation has no demo") from None
    code = main(json=json, transport=transport)
    if code:
        raise typer.Exit(code)
