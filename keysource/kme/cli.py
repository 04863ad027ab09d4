"""``qvpn-kme``: a KME that speaks ETSI GS QKD 014.

Exit codes: 0 fine, 1 it failed, 2 wrong usage or a wrong configuration.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import resource
import sqlite3
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import structlog
import typer

from keysource.kme import crashpoints
from keysource.kme.audit import AuditError
from keysource.kme.config import EXAMPLE, ConfigError, KmeConfig, load
from keysource.kme.conform.cli import conform
from keysource.kme.control import ControlError, ask
from keysource.kme.credentials import contexts
from keysource.kme.epochs import new_site_key
from keysource.kme.faults import Fault, fault_named
from keysource.kme.listener import ListenError
from keysource.kme.logs import set_up
from keysource.kme.records import StoreError
from keysource.kme.server import KmeServer

log = structlog.get_logger("kme")
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(conform)
File = Annotated[Path, typer.Argument(metavar="FILE", help="The KME's configuration, TOML.")]
Device = Annotated[str, typer.Option(help="Device socket, relative to the site's folder.")]
_DEVICE = "link/device.sock"
_CONNECTIONS = ("open", "without_certificate", "pushed_out", "slow", "crowded", "no_descriptor")
Port = Annotated[int, typer.Option(min=1, max=65535)]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:  # a mistake of ours: where, and nothing of what was in hand
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        print(f"qvpn-kme: internal error {type(error).__name__} at {place}; please report it", file=sys.stderr)
        sys.exit(1)


@app.command()
def serve(
    file: File,
    fault: Annotated[str, typer.Option(metavar="NAME", help="Misbehave: " + ", ".join(Fault) + ".")] = "none",
) -> None:
    """Run in the foreground until SIGTERM or Ctrl-C; log to standard error."""
    ordered = _fault(fault)
    config = _load(file)
    try:
        server = KmeServer(config, ordered, file)
    except ConfigError as error:
        _fail(f"{file}: {error}", 2)
    set_up(json_lines=not sys.stderr.isatty())
    _arm_crash_point()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold keys
    _raise_descriptors(config.descriptors)
    try:
        asyncio.run(server.run())
    except ConfigError as error:
        _fail(f"{file}: {error}", 2)
    except (StoreError, ListenError, ControlError, AuditError) as error:
        _fail(str(error), 1)
    except sqlite3.Error as error:
        _fail(f"{config.path(config.kme.store)}: {error}", 1)


@app.command()
def check(
    file: File,
    online: Annotated[bool, typer.Option("--online", help="Ask the other KMEs and the database too.")] = False,
) -> None:
    """Read the configuration, certificates and site key, look at what lies around them; start nothing."""
    from keysource.kme import checks  # not what `serve` should wait for

    config = _load(file)
    try:
        contexts(config)
        found = checks.findings(config, datetime.datetime.now(datetime.UTC))
        if online:
            found += [*checks.database(config), *asyncio.run(checks.peers(config))]
    except (ConfigError, ValueError) as error:
        _fail(f"{file}: {error}", 2)
    for finding in found:
        print(f"{file}: {'FAULT' if finding.fault else 'hint'}: {finding.text}")
    if any(finding.fault for finding in found):
        raise typer.Exit(2)
    print(f"{file}: KME {config.kme.id} is configured without a mistake")


@app.command()
def site_key(file: Annotated[Path, typer.Argument(metavar="FILE", help="Where it goes; must not exist.")]) -> None:
    """Make a site key: 32 random bytes in base64, mode 0600."""
    try:
        new_site_key(file)
    except OSError as error:
        _fail(f"{file}: {error.strerror}", 2)


@app.command()
def status(
    file: File, as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False
) -> None:
    """Ask the running KME how it is."""
    answer = _ask(_load(file), {"op": "status"})
    if as_json:
        print(json.dumps(answer))
    else:
        _print_status(answer)


@app.command()
def fault(file: File, name: Annotated[str, typer.Argument(metavar="NAME", help=", ".join(Fault) + ".")]) -> None:
    """Make the running KME misbehave, or behave again with ``none``."""
    ordered = _fault(name)
    _ask(_load(file), {"op": "fault", "name": ordered.value})


@app.command()
def example() -> None:
    """Print a commented configuration."""
    print(EXAMPLE, end="")


@app.command()
def pair(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the two folders of the sites go.")],
    left_host: Annotated[str, typer.Option(help="Name or address at which the right KME reaches the left.")],
    right_host: Annotated[str, typer.Option(help="Name or address at which the left KME reaches the right.")],
    left: Annotated[str, typer.Option(help="Name of the left site.")] = "alice",
    right: Annotated[str, typer.Option(help="Name of the right site.")] = "bob",
    left_sae_host: Annotated[str, typer.Option(help="Where SAEs reach the left KME, if elsewhere.")] = "",
    right_sae_host: Annotated[str, typer.Option(help="Where SAEs reach the right KME, if elsewhere.")] = "",
    left_port: Port = 8443,
    left_peer_port: Port = 8444,
    right_port: Port = 8443,
    right_peer_port: Port = 8444,
    left_device: Device = _DEVICE,
    right_device: Device = _DEVICE,
) -> None:
    """Write DIR/LEFT and DIR/RIGHT: kme.toml and a test PKI each; copied to two hosts they are a pair."""
    from keysource.kme.scaffold import ScaffoldError, SitePlan, write_pair  # not what `serve` should wait for

    sites = (
        SitePlan(left, left_host, left_port, left_peer_port, left_sae_host, left_device),
        SitePlan(right, right_host, right_port, right_peer_port, right_sae_host, right_device),
    )
    try:
        files = write_pair(folder, *sites)
    except ScaffoldError as error:
        _fail(str(error), 2)
    for site, file in zip(sites, files, strict=True):
        print(f"on {site.host}: qvpn-kme serve {file}")


def _arm_crash_point() -> None:
    try:
        if crashpoints.arm_from_environment():
            log.warning("this process kills itself at a point that its environment names; this is a test")
    except ValueError as error:
        _fail(str(error), 2)


def _raise_descriptors(needed: int) -> None:
    """The usual soft limit of 1,024 is for programs with ``select``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < needed:
        log.warning("the bounds on connections are above what the system allows", descriptors=hard, needed=needed)


def _load(file: Path) -> KmeConfig:
    try:
        return load(file)
    except ConfigError as error:
        _fail(str(error), 2)


def _fault(name: str) -> Fault:
    try:
        return fault_named(name)
    except ValueError as error:
        _fail(str(error), 2)


def _ask(config: KmeConfig, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return ask(config.control_path, request)
    except ControlError as error:
        _fail(str(error), 1)


def _print_status(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{answer['kme']}  pid {answer['pid']}  {answer['listen']}  fault: {answer['fault']}")
    table = Table()
    for title in ("other KME", "device", "alarm", "way", "to issue", "to receive", "reserved", "issued", "fetched"):
        table.add_column(title)
    for link in answer["links"]:
        device = "up" if link["device_connected"] else link["trouble"]
        numbers = (str(link[name]) for name in ("own_free", "peer_free", "reserved", "issued", "fetched"))
        ways = "\n".join(" > ".join(path) for path in link["paths"]) or "direct"
        table.add_row(link["stock"], device, link["alarm"] or "none", ways, *numbers)
    console.print(table)
    table = Table()
    for title in ("SAE", "may share with", "requests", "keys issued", "keys fetched", "refused"):
        table.add_column(title)
    for sae in answer["saes"]:
        numbers = (str(sae[name]) for name in ("requests", "issued", "fetched", "refused"))
        table.add_row(sae["id"], ", ".join(sae["may_share_with"]) or "nobody", *numbers)
    console.print(table)
    for listener in answer["connections"]:
        told = ", ".join(f"{name.replace('_', ' ')} {listener[name]}" for name in _CONNECTIONS)
        console.print(f"connections at {listener['listen']}: {told}", highlight=False, soft_wrap=True)
    store = answer["store"]
    console.print(f"store {store['kind']} {store['where']}", highlight=False, soft_wrap=True)
    if store["kind"] == "postgresql":
        standby = store.get("standbys") or "NONE"
        console.print(f"  KME processes {store.get('processes')}, synchronous standbys {standby}", highlight=False)
        if trouble := store["trouble"] or store["doubt"]:
            console.print(f"  TROUBLE: {trouble}", highlight=False, soft_wrap=True)
    console.print(f"certificate ends {answer['certificate_ends']}, key epoch {answer['epoch']}", highlight=False)
    console.print(f"audit log {answer['audit']}", highlight=False, soft_wrap=True)


def _fail(message: str, code: int) -> NoReturn:
    print(f"qvpn-kme: {message}", file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
