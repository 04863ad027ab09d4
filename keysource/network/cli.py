"""``qvpn-kme`` whole: the KME's commands, and under ``network`` those of a node of a QKD network; ``demo`` shows one.

Exit codes: 0 fine, 1 it failed, 2 wrong usage or a wrong configuration.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from keysource.kme import cli as kme

app = typer.Typer(no_args_is_help=True, help="A node of a QKD network: it relays keys over trusted nodes.")
kme.app.add_typer(app, name="network")
File = Annotated[Path, typer.Argument(metavar="FILE", help="The node's configuration, TOML.")]


class Misdeed(StrEnum):
    """What a node does on order, for tests and demonstrations."""

    NONE = "none"
    COPY = "copy"
    ALTER = "alter"
    SWALLOW = "swallow"


def main() -> None:
    """Entry point of the console script."""
    kme.main()


@app.command()
def serve(
    file: File,
    misdeed: Annotated[Misdeed, typer.Option("--fault", help="Be a corrupt node.")] = Misdeed.NONE,
    copies: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where a corrupt node writes all that it can read.")
    ] = None,
) -> None:
    """Run a node in the foreground until SIGTERM or Ctrl-C; log to standard error.

    The certificates are read anew where their files change, and on SIGHUP.
    """
    from keysource.errors import KeySourceError
    from keysource.kme.audit import AuditError
    from keysource.kme.control import ControlError
    from keysource.kme.listener import ListenError
    from keysource.kme.logs import set_up
    from keysource.kme.records import StoreError
    from keysource.network import crashes
    from keysource.network.errors import TopologyError
    from keysource.network.process import NodeProcess
    from keysource.network.topology import load_node

    set_up(json_lines=not sys.stderr.isatty())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold keys

    async def run() -> None:
        config, topology = load_node(file)
        process = NodeProcess(config, topology, file.resolve().parent, _fault(misdeed, copies))
        await process.run()

    try:
        crashes.arm_from_environment()
        asyncio.run(run())
    except (TopologyError, ValueError) as error:
        _fail(str(error), 2)
    except (StoreError, ListenError, ControlError, AuditError, KeySourceError) as error:
        _fail(str(error), 1)


@kme.app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Save what is shown as a picture.")] = None,
) -> None:
    """A network of five nodes: two disjoint paths, a cut, an eavesdropper, a corrupt node.  Under a minute."""
    from keysource.network.demo.run import run

    raise typer.Exit(run(as_json=as_json, svg=svg))


@app.command()
def check(file: File) -> None:
    """Read a node's configuration and its map; start nothing."""
    from keysource.network.errors import TopologyError
    from keysource.network.topology import load_node

    try:
        config, topology = load_node(file)
    except TopologyError as error:
        _fail(str(error), 2)
    print(
        f"{file}: node {config.node.id}, {len(config.link)} of {len(topology.link)} links, without a mistake;"
        " every node must have the same map"
    )


@app.command()
def status(file: File, as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Ask a running node how its links and connections are."""
    from rich.console import Console

    from keysource.kme.control import ControlError, ask
    from keysource.network.drawing import status_tables
    from keysource.network.errors import TopologyError
    from keysource.network.process import control_path
    from keysource.network.topology import load_node

    try:
        config, _topology = load_node(file)
        said = ask(control_path(config, file.resolve().parent), {"op": "status"})
    except TopologyError as error:
        _fail(str(error), 2)
    except ControlError as error:
        _fail(str(error), 1)
    if as_json:
        print(json.dumps(said))
        return
    console = Console()
    for table in status_tables(said):
        console.print(table)
    for name, count in said["too_many_requests"].items():
        console.print(f"{name} asked too often, {count} times", highlight=False)
    words = f"certificate ends {said['certificate_ends']}; audit log {said['audit']}"
    console.print(words, highlight=False, soft_wrap=True)


@app.command()
def write(
    map_file: Annotated[Path, typer.Argument(metavar="MAP", help="network.toml.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gets a folder per node.")],
) -> None:
    """From a map, write every node's configuration, with certificates for tests."""
    from keysource.network.errors import TopologyError
    from keysource.network.scaffold import write_nodes

    try:
        files = write_nodes(folder, map_file)
    except TopologyError as error:
        _fail(str(error), 2)
    for file in files.values():
        print(f"qvpn-kme network serve {file}")


@app.command()
def example() -> None:
    """Print a map and a node's configuration with every key explained."""
    from keysource.network.topology import EXAMPLE, NODE_EXAMPLE

    print("# network.toml: the map\n\n" + EXAMPLE + "\n# node.toml: one node\n\n" + NODE_EXAMPLE, end="")


def _fault(misdeed: Misdeed, copies: Path | None) -> Any:
    from keysource.network.core import Fault

    if copies is not None and misdeed is Misdeed.NONE:
        misdeed = Misdeed.COPY
    if misdeed is Misdeed.NONE:
        return None
    fault = Fault(corrupt=True, alter=misdeed is Misdeed.ALTER, swallow=misdeed is Misdeed.SWALLOW)
    if copies is not None:
        target = copies

        def write(kind: str, header: dict[str, Any], data: bytes) -> None:
            line = json.dumps({"kind": kind, "header": header, "bytes": base64.b64encode(data).decode()}) + "\n"
            descriptor = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(line)

        fault.copied = lambda header, share: write("share", header, share)
        fault.received = lambda header, masked: write("masked", header, masked)
    return fault


def _fail(sentence: str, code: int) -> NoReturn:
    print("\n".join(f"qvpn-kme: {line}" for line in sentence.splitlines()), file=sys.stderr)
    sys.exit(code)
