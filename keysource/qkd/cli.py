"""``qvpn-qkd``: a simulated QKD link.  Exit codes: 0 fine, 1 it failed, 2 wrong usage or configuration."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import structlog
import typer
from rich.console import Console
from rich.table import Table

from keysource.base import Owner
from keysource.errors import KeySourceError
from keysource.qkd.attackcli import attack
from keysource.qkd.bench.command import bench
from keysource.qkd.config import EndConfig, FibreConfig, load
from keysource.qkd.distill.mac import TICKET_BYTES
from keysource.qkd.engine.control import ask
from keysource.qkd.errors import LinkSettings
from keysource.qkd.files import lock_folder
from keysource.qkd.identity import load_signers
from keysource.qkd.optics.attacks import ATTACKS
from keysource.qkd.optics.weather import WEATHERS
from keysource.qkd.pad import LinkState
from keysource.qkd.plotscli import plots
from keysource.qkd.presets import PRESETS
from keysource.qkd.ratecli import rate, repeater
from keysource.qkd.records import ASSUMPTIONS
from keysource.qkd.simulate import simulate
from keysource.qkd.tapcli import meddle, tap
from keysource.settings import Address

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(rate)
app.command()(repeater)
app.command()(simulate)
app.command()(attack)
app.command()(tap)
app.command()(meddle)
app.command()(plots)
app.command()(bench)
File = Annotated[Path, typer.Argument(metavar="FILE", help="The configuration of one end or the fibre, TOML.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)
    except LinkSettings as error:
        _fail(str(error), 2)
    except KeySourceError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # a mistake of ours: where, and nothing of what was in hand
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        _fail(f"internal error {type(error).__name__} at {place}; please report it", 1)


@app.command()
def run(file: File) -> None:
    """Run one end, or a fibre, in the foreground until SIGTERM or Ctrl-C; log to standard error."""
    from keysource.qkd.engine.run import run as run_process

    config = load(file)
    _set_up_log()
    asyncio.run(run_process(config))


@app.command(hidden=True, name="fibre-child")
def fibre_child() -> None:
    """What an end with spawn_fibre starts."""
    from keysource.qkd.engine.run import fibre_child as child

    _set_up_log()
    try:
        asyncio.run(child())
    except KeyboardInterrupt:
        sys.exit(0)


@app.command()
def check(file: File) -> None:
    """Read the configuration, start nothing."""
    config = load(file)
    preset = PRESETS[config.preset]
    plan = preset.plan(tests=isinstance(config, EndConfig) and config.tests)
    if isinstance(config, EndConfig) and config.identities is not None:
        signers = load_signers(config.end, str(config.name), *config.identities)
        print(f"this end's identity   {signers.me.public.readable}")
        print(f"the other end's      {signers.peer.readable}")
        print("no couriered key: the first block's authenticity is computational (Ed25519 and ML-DSA-65)")
    if isinstance(config, EndConfig) and config.identities is None and config.auth_key.exists():
        bits, net = 8 * config.auth_key.stat().st_size, plan.length - 8 * TICKET_BYTES
        hours = bits / max(1, net) * preset.block_seconds / 3600.0
        print(f"the couriered pad of {bits} bits is paid back after {hours:.1f} hours of the link")
    print(f"{file}: no mistake; {preset.about}: {plan.length} bits from each block of {plan.pulses} pulses")


@app.command()
def presets() -> None:
    """List the links that can be simulated."""
    table = Table("preset", "link", "bits per block", "seconds per block", "expected QBER")
    for preset in PRESETS.values():
        plan = preset.plan()
        seconds, qber = f"{preset.block_seconds:g}", f"{100 * plan.expected_qber:.2f} %"
        table.add_row(preset.name, preset.about, str(plan.length), seconds, qber)
    Console().print(table)


@app.command()
def eve(
    file: File,
    switch: Annotated[Literal["on", "off"], typer.Argument(help="Let Eve in, or send her away.")],
    fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of the pulses she takes.")] = 1.0,
    name: Annotated[str, typer.Option("--attack", help=f"One of {', '.join(ATTACKS[:-1])}.")] = ATTACKS[0],
    mode: Annotated[str, typer.Option(help="Of blinding: cw or pulsed.")] = "cw",
) -> None:
    """Switch the eavesdropper in the fibre process; nobody else is told."""
    answer = _ask_fibre(file, {"attack": name if switch == "on" else "none", "fraction": fraction, "mode": mode})
    print(f"Eve ({answer['attack']}) takes {100 * answer['fraction']:.0f} % of the pulses")


@app.command()
def weather(
    file: File, name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(WEATHERS)}.")]
) -> None:
    """Change the weather of a running link: drift of alignment and loss, background light."""
    print(f"weather: {_ask_fibre(file, {'weather': name})['weather']}")


def _ask_fibre(file: Path, request: dict[str, Any]) -> dict[str, Any]:
    config = load(file)
    if isinstance(config, EndConfig) and not config.spawn_fibre:
        _fail(f"{file}: this end has no fibre; give the file of the end or process that runs it", 2)
    if config.control is None:
        _fail(f'{file}: key "control": the default path is too long for a unix socket; set one', 2)
    return asyncio.run(ask(config.control, request))


@app.command()
def status(file: File, as_json: AsJson = False) -> None:
    """Ask a running end, or fibre, how it is."""
    config = load(file)
    path = config.control if isinstance(config, FibreConfig) else config.state / "status.sock"
    answer = asyncio.run(ask(path, {}))
    if as_json:
        print(json.dumps(answer))
    else:
        _print(answer)


@app.command()
def reseed(file: File) -> None:
    """Let a stopped end whose one-time key is used up sign its next block again; do it at both ends.

    Only with auth_bootstrap = "signature".  Until that block has passed, authenticity is computational again.
    """
    config = load(file)
    if not isinstance(config, EndConfig) or config.identities is None:
        _fail(f'{file}: no end with auth_bootstrap = "signature"', 2)
    load_signers(config.end, str(config.name), *config.identities)
    descriptor = lock_folder(config.state)
    try:
        LinkState(config.state, config.auth_key, config.name, config.end.value, signed=True).reseed()
    finally:
        os.close(descriptor)
    print(f"{file}: the next block will be signed (computational); do the same at the other end")


@app.command()
def record(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gets alice/N.settings and bob/N.detections.")],
    preset: Annotated[str, typer.Option(help="See qvpn-qkd presets.")] = "demo",
    blocks: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 1,
    first: Annotated[int, typer.Option(min=0, help="Number of the first: the link's next block.")] = 0,
    simulator: Annotated[
        Literal["own", "sequence"], typer.Option(help="Whose photons: SeQUeNCe's are slow.")
    ] = "own",
) -> None:
    """Record simulated blocks, as a pair of devices would; front_end = "recorded" plays them."""
    from keysource.qkd import sequencesim
    from keysource.qkd.recorder import record_block, record_blocks

    if preset not in PRESETS:
        _fail(f"--preset {preset}: none of {', '.join(PRESETS)}", 2)
    fly = sequencesim.record_block if simulator == "sequence" else record_block
    for file in record_blocks(folder, PRESETS[preset], range(first, first + blocks), fly):
        print(file)


@app.command()
def assumptions() -> None:
    """What a device must promise before its records are worth distilling."""
    for sentence in ASSUMPTIONS:
        print(f"- {sentence}")


@app.command()
def pair(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gets the folders alice/ and bob/ (and fibre/).")],
    left_host: Annotated[str, typer.Option(help="Alice's host as Bob's host sees it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65534, help="Classical channel; the next is the fibre's.")] = 51850,
    fibre_host: Annotated[
        str | None, typer.Option(help="Run the fibre as a process of its own on this host; gets fibre/.")
    ] = None,
    left: Annotated[str, typer.Option(help="Folder of end a.")] = "alice",
    right: Annotated[str, typer.Option(help="Folder of end b.")] = "bob",
    name: Annotated[str | None, typer.Option(help="Name of the link; default: one made from the pad.")] = None,
    preset: Annotated[str, typer.Option(help="See qvpn-qkd presets.")] = "demo",
    pace: Annotated[Literal["realtime", "fast"], typer.Option(help="How fast pulses fly.")] = "realtime",
    owner: Annotated[Owner, typer.Option(help="Who issues keys.")] = Owner.ALTERNATE,
    bootstrap: Annotated[
        Literal["psk", "signature"],
        typer.Option(help="Of authentication: a pad to carry, or identities that sign the first block."),
    ] = "psk",
) -> None:
    """Write configurations and the authentication pad (or identities) of a new link."""
    from keysource.qkd.pair import PairPlan, write_pair

    if preset not in PRESETS:
        _fail(f"--preset {preset}: none of {', '.join(PRESETS)}", 2)
    classical = Address(left_host.strip("[]"), port)
    fibre = Address((fibre_host or left_host).strip("[]"), port + 1)
    plan = PairPlan(classical, fibre, name, left, right, preset, pace, owner, fibre_host is not None, bootstrap)
    for file in write_pair(folder, plan):
        print(f"qvpn-qkd run {file}")


def _print(answer: dict[str, Any]) -> None:
    console = Console()
    ledger = answer.pop("ledger", None)
    for key, value in answer.items():
        console.print(f"{key.replace('_', ' '):<18} {value}", highlight=False)
    if ledger is not None:
        table = Table("ledger", "bits", title="where every detected bit went")
        for column, bits in ledger.items():
            table.add_row(column, f"{bits if column == 'raw' else -bits:+d}")
        console.print(table)


def _set_up_log() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


def _fail(sentence: str, code: int) -> NoReturn:
    print(f"qvpn-qkd: {sentence}", file=sys.stderr)
    sys.exit(code)
