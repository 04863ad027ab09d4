"""``qvpn-qkd simulate``: a whole link for a while, as its processes saw it."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from keysource.base import KEY_BYTES
from keysource.qkd.config import EndConfig, Pace, load
from keysource.qkd.errors import LinkError, LinkSettings
from keysource.qkd.lab import Lab, interrupted
from keysource.qkd.ledger import Ledger
from keysource.qkd.observe import OPTICS_ONLY, observe
from keysource.qkd.optics.monitors import MONITORS, Monitor
from keysource.qkd.optics.pairs import acin_rate
from keysource.qkd.optics.weather import WEATHERS
from keysource.qkd.presets import PRESETS, Preset
from keysource.qkd.rates.proofs import proof_name

WARNING = "SIMULATED: no quantum security"
_INTERRUPTED = 130


@dataclass
class Tally:
    """What is known so far.  ``blocks``: Alice's report of each, with Bob's verdict beside it."""

    preset: Preset
    pace: Pace
    blocks: list[dict[str, Any]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    keys: int = 0
    differing: int = 0
    """Keys that the two clients were handed differently."""
    seconds: float = 0.0
    interrupted: bool = False

    def add(self, reports: dict[str, dict[str, Any]], keys: dict[str, list[bytes]]) -> None:
        mine = reports.get("alice") or reports["bob"]
        self.blocks.append({**mine, "at_bob": reports.get("bob", {}).get("result", "lost")})
        if "ledger" in mine:
            self.ledger.add(Ledger(**mine["ledger"]))
        both = list(zip(keys["alice"], keys["bob"], strict=False))
        self.keys += sum(a == b for a, b in both)
        self.differing += sum(a != b for a, b in both) + abs(len(keys["alice"]) - len(keys["bob"]))

    @property
    def passed(self) -> int:
        return sum(block["result"] == "passed" for block in self.blocks)

    @property
    def proof(self) -> str:
        return proof_name(self.preset.optics.source)

    def link_seconds(self) -> float:
        """How long the blocks take on the link that is simulated."""
        return len(self.blocks) * self.preset.block_seconds

    def as_dict(self) -> dict[str, Any]:
        plan, optics = self.preset.plan(), self.preset.optics
        expected = [optics.gain(mu) for mu in optics.intensities] if not optics.course else None
        bits, link = 8 * KEY_BYTES * self.keys, self.link_seconds()
        return {
            "preset": self.preset.name,
            "about": self.preset.about,
            "reference": self.preset.reference,
            "pace": self.pace,
            "protocol": self.preset.protocol,
            "proof": self.proof,
            "warning": WARNING,
            "interrupted": self.interrupted,
            "blocks": self.blocks,
            "blocks_passed": self.passed,
            "expected_qber": plan.expected_qber,
            "expected_gains": expected,
            "bits_per_passed_block": plan.length,
            "keys": self.keys,
            "keys_that_differ": self.differing,
            "seconds": round(self.seconds, 3),
            "link_seconds": round(link, 3),
            "bits_per_second": round(bits / self.seconds, 1) if self.seconds else None,
            "bits_per_link_second": round(bits / link, 1) if link else None,
            "ledger": self.ledger.as_dict(),
            "ledger_balance": self.ledger.balance(),
        }


def simulate(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="An end's configuration: its preset, pace and monitor.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="See qvpn-qkd presets; or gys, optics only.")] = None,
    blocks: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many.")] = 5,
    pace: Annotated[Literal["realtime", "fast"] | None, typer.Option(help="Default: fast.")] = None,
    monitor: Annotated[str | None, typer.Option(help=f"Of Bob's detectors: {', '.join(MONITORS)}.")] = None,
    weather: Annotated[str, typer.Option(help=f"One of {', '.join(WEATHERS)}.")] = "calm",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """Run a link of its own for some blocks: real processes, a new pad, nothing of FILE's link is used up."""
    if (file is None) == (preset is None):
        raise LinkSettings("simulate takes a FILE or --preset NAME, one of them")
    config = None if file is None else load(file)
    name = config.preset if config is not None else str(preset)
    if name in OPTICS_ONLY:
        observe(name, as_json)
        return
    if name not in PRESETS:
        raise LinkSettings(f"--preset {name}: none of {', '.join((*PRESETS, *OPTICS_ONLY))}")
    if weather not in WEATHERS:
        raise LinkSettings(f"--weather {weather}: none of {', '.join(WEATHERS)}")
    guard = monitor or (config.monitor if isinstance(config, EndConfig) else "photocurrent")
    if guard not in get_args(Monitor):
        raise LinkSettings(f"--monitor {guard}: none of {', '.join(MONITORS)}")
    tally = Tally(PRESETS[name], pace or (config.pace if config is not None else "fast"))
    tally.interrupted = interrupted(run_link(tally, blocks, guard, weather, quiet=as_json))
    if as_json:
        print(json.dumps(tally.as_dict()))
    else:
        _show(tally)
    if tally.interrupted:
        sys.exit(_INTERRUPTED)
    if tally.differing or tally.ledger.balance():
        raise LinkError("the two ends' keys differ, or the ledger does not balance: a mistake; please report it")


async def run_link(tally: Tally, blocks: int, monitor: Any, weather: str, *, quiet: bool) -> None:
    """Fill the tally with that many blocks of a link of its own.  Raises :class:`LinkError`."""
    preset, loop = tally.preset, asyncio.get_running_loop()
    limit = min(0.9, max(1e-3, 1.5 * blocks * (preset.security.secrecy + preset.security.correctness)))
    patience = 120.0 + 10.0 * preset.block_seconds
    with _progress(quiet) as bar:
        task = bar.add_task(f"{preset.name}: three processes start", total=blocks * preset.pulses, live="")
        async with Lab(preset.name, pace=tally.pace, monitor=monitor, error_limit=limit, tapped=False) as lab:
            if weather != "calm":
                await lab.fibre({"weather": weather})
            bar.update(task, description=preset.name)
            began = loop.time()

            async def tick() -> None:
                flown = (await lab.fibre({}))["pulses_flown"]
                tally.seconds = loop.time() - began
                bar.update(task, completed=min(flown, blocks * preset.pulses))

            for _ in range(blocks):
                reports = await lab.reports(patience, tick)
                number = next(iter(reports.values()))["block"]
                passed = reports.get("bob", {}).get("result") == "passed"
                tally.add(reports, await lab.keys(number) if passed else {"alice": [], "bob": []})
                tally.seconds = loop.time() - began
                bar.update(task, live=_live(tally))


def _progress(quiet: bool) -> Progress:
    parts = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[live]}"),
    )
    return Progress(*parts, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())


def _live(tally: Tally) -> str:
    last = tally.blocks[-1]
    bits = 8 * KEY_BYTES * tally.keys / tally.seconds
    words = [f"{tally.passed}/{len(tally.blocks)} passed", f"{bits:,.0f} bit/s"]
    if last.get("qber") is not None:
        words.append(f"QBER {100 * last['qber']:.2f} %")
    if last.get("chsh"):
        words.append(f"S {last['chsh'][0]:.3f}")
    if last.get("gains"):
        words.append("gains " + " / ".join(f"{gain:.3g}" for gain in last["gains"]))
    return "  ".join(words)


def _show(tally: Tally) -> None:
    console, facts = Console(), tally.as_dict()
    if not tally.blocks:
        print(f"{tally.preset.name}: no block ended")
        return
    mus = tally.preset.optics.intensities
    table = Table("block", "result", "keys", "QBER", *(f"gain at {mu:g}" for mu in mus), "parities", "messages")
    for block in tally.blocks[-12:]:
        gains = [f"{gain:.4g}" for gain in block.get("gains") or ()] or ["-"] * len(mus)
        qber = "-" if block.get("qber") is None else f"{100 * block['qber']:.2f} %"
        leaked = block.get("ledger", {}).get("leaked", 0)
        row = (str(block["block"]), block["result"], str(block["keys"]), qber, *gains, str(leaked))
        table.add_row(*row, str(block.get("messages", "-")))
    if facts["expected_gains"] is not None:
        expected = [f"{gain:.4g}" for gain in facts["expected_gains"]]
        table.add_row("plan", "", "", f"{100 * facts['expected_qber']:.2f} %", *expected, "", "", style="dim")
    console.print(table)
    console.print(ledger_table(tally.ledger))
    print(
        f"{tally.preset.name} ({tally.preset.about}): {tally.passed} of {len(tally.blocks)} blocks passed,"
        f" {tally.keys} equal keys of 256 bits under {tally.proof}"
    )
    if (said := _bell(tally.blocks)) is not None:
        print(said)
    if tally.preset.reference:
        print(f"reference: {tally.preset.reference}")
    if tally.seconds:
        factor = tally.seconds / tally.link_seconds()
        print(
            f"{facts['bits_per_second']:,} secret bit/s here; the link itself would give"
            f" {facts['bits_per_link_second']:,} bit/s ({factor:.2f} s here for each of its seconds)"
        )
    print(f"ledger balance {tally.ledger.balance()}; {WARNING}{'; interrupted' if tally.interrupted else ''}")


def _bell(blocks: list[dict[str, Any]]) -> str | None:
    """E91: what the last S is worth, and what is not claimed of it."""
    tested = [block for block in blocks if block.get("chsh") and block.get("qber") is not None]
    if not tested:
        return None
    (s, spread), qber = tested[-1]["chsh"], tested[-1]["qber"]
    return (
        f"S = {s:.3f} ± {spread:.3f} of detected pairs (fair sampling): it can end a block, no key rests on it;"
        f" device-independent rate of Acin 2007: {acin_rate(s, qber):.3f} bit a pair, not claimed"
    )


def ledger_table(ledger: Ledger) -> Table:
    table = Table("ledger", "bits", title="where every detected bit went")
    for column, bits in ledger.as_dict().items():
        table.add_row(column, f"{bits if column == 'raw' else -bits:+d}")
    return table
