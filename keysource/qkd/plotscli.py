"""``qvpn-qkd plots DIR``: every picture of the documentation, made again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from keysource.qkd.attackcli import judged
from keysource.qkd.errors import LinkError, LinkSettings
from keysource.qkd.lab import interrupted
from keysource.qkd.optics.attacks import MODES
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import MONITORS
from keysource.qkd.pictures import curves, stage
from keysource.qkd.pictures.base import save, wanted
from keysource.qkd.pictures.page import rewrite
from keysource.qkd.presets import PRESETS
from keysource.qkd.rates.curves import Curve
from keysource.qkd.repeaters import Chain, direct, trusted_chain
from keysource.qkd.simulate import Tally, run_link
from keysource.qkd.staging import play
from keysource.qkd.vigil import FRACTIONS, measure

_OWN = ("demo", "metro25", "metro50")
"""Links whose delivered rate is put among the published points."""
_RUNS = {1.0: 400, 0.25: 400, 0.1: 200, 0.05: 100, 0.01: 16}
_CHAINS = (2, 4, 8)


def plots(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Gets the pictures and figures.json.")],
    only: Annotated[list[str] | None, typer.Option(help="One of them; may be given several times.")] = None,
    kind: Annotated[str, typer.Option(help="svg, png or pdf.")] = "svg",
    page: Annotated[Path | None, typer.Option(help="A page whose marked tables get the new numbers.")] = None,
) -> None:
    """Make the documentation's plots and tables again, from runs and formulas; some minutes."""
    names = list(only or MAKERS)
    for name in names:
        if name not in MAKERS:
            raise LinkSettings(f"--only {name}: none of {', '.join(MAKERS)}")
    wanted(folder / f"x.{kind}")
    kept = folder / "figures.json"
    try:
        facts = json.loads(kept.read_text()) if kept.exists() else {}
    except ValueError:
        raise LinkSettings(f"{kept}: not JSON; remove it") from None
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        picture, facts[name] = MAKERS[name]()
        kept.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        if picture is not None:
            save(picture, folder / f"{name}.{kind}")
            print(folder / f"{name}.{kind}")
    if page is not None:
        rewrite(page, facts)
        print(page)


Made = tuple[Any, Any]
"""(picture or None, what it was made of)."""


def _rate() -> Made:
    rusca, boaron = (replace(_weak(name), course=()) for name in ("rusca2018", "boaron2018"))
    kms = [float(km) for km in (1, 5, 10, *range(20, 421, 20))]

    def formula(analysis: str, optics: Optics, n_z: float) -> list[tuple[float, float]]:
        curve = Curve(analysis, optics, n_z=n_z, optimise=analysis != "plob")
        rates = [(km, curve.at(km)[0] * optics.pulse_rate) for km in kms]
        return [(km, rate) for km, rate in rates if math.isfinite(rate)]

    found = {
        "at most (PLOB): 1 GHz, 0.2 dB/km": formula("plob", rusca, 1e7),
        "rusca2018, infinitely many decoys": formula("infinite", rusca, 1e7),
        "rusca2018, finite key, 10^7 bits": formula("wiesemann2024", rusca, 1e7),
        "at most (PLOB): 2.5 GHz, 0.17 dB/km": formula("plob", boaron, 1e7),
        "boaron2018 (ULL), finite key, 10^7 bits": formula("wiesemann2024", boaron, 1e7),
    }
    own = {name: (PRESETS[name].optics.distance_km, _delivered(name, 2)) for name in _OWN}  # type: ignore[union-attr]
    return curves.rate(found, own), {"curves": found, "delivered": own, "published": curves.PUBLISHED}


def _weak(name: str) -> Optics:
    optics = PRESETS[name].optics
    if not isinstance(optics, Optics):
        raise LinkSettings(f"{name}: a link of pairs")
    return optics


def _delivered(name: str, blocks: int) -> float:
    """Secret bits per second of the link, by running it."""
    return float(_tally(name, blocks).as_dict()["bits_per_link_second"])


def _tally(name: str, blocks: int) -> Tally:
    tally = Tally(PRESETS[name], "fast")
    if interrupted(run_link(tally, blocks, "photocurrent", "calm", quiet=True)):
        raise KeyboardInterrupt
    if tally.ledger.balance() or tally.differing:
        raise LinkError("the ledger does not balance, or keys differ: a mistake; please report it")
    return tally


def _ledger() -> Made:
    tally = _tally("demo", 3)
    columns = tally.ledger.as_dict()
    title = f"Ledger of {len(tally.blocks)} blocks of the demo link: balance {tally.ledger.balance()}"
    return curves.ledger(columns, title), columns


def _staged(preset: str, order: dict[str, Any], guard: Any, blocks: int) -> dict[str, Any]:
    kept: dict[str, Any] = {}

    async def work() -> None:
        kept.update(judged(await play(preset, order, guard, blocks, lambda _text: None)))

    if interrupted(work()):
        raise KeyboardInterrupt
    return kept


def _eve() -> Made:
    order = {"attack": "intercept-resend", "fraction": 0.25}
    run = _staged("small10", order, "photocurrent", 5)
    facts = {"attack": "intercept-resend of a quarter of the pulses,", "preset": "small10", "runs": {"": run}}
    return stage.course(facts), facts


def _known(attack: str, preset: str, blocks: int) -> Made:
    """No picture: what Eve held of a block, and has of its key; of the first that was delivered, where one was."""
    run = _staged(preset, {"attack": attack, "fraction": 1.0}, "photocurrent", blocks)
    found = [block["eve"] for block in run["acts"]["Eve"] if block.get("eve", {}).get("sifted")]
    if not found:
        raise LinkError(f"{attack}: no block came as far as its sifting; try again")
    return None, next((eve for eve in found if eve.get("final_bits")), found[0])


def _splitting() -> Made:
    return _known("photon-number", "small50", 1)


def _beam() -> Made:
    picture, eve = _known("beam-splitting", "small10", 3)
    if "cut_short" not in eve:
        raise LinkError("beam-splitting: no block was delivered; try again")
    return picture, eve


def _blinding() -> Made:
    runs: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        order = {"attack": "blinding", "fraction": 1.0, "mode": mode}
        runs[mode] = {guard: _staged("small10", order, guard, 1) for guard in MONITORS}
    return stage.truth_table(runs), runs


def _detection() -> Made:
    found = {fraction: measure(fraction, _RUNS[fraction]) for fraction in FRACTIONS}
    return curves.delay(found), {f"{fraction:g}": [asdict(each) for each in found[fraction]] for fraction in found}


def _repeaters() -> Made:
    kms = [float(km) for km in range(50, 1251, 50)]
    nature = np.random.default_rng(1)
    columns: dict[str, list[float]] = {
        f"{links} links, 1000 memories each": [
            Chain(km, links, 0.9, 0.995, 10.0, parallel=1000).key_rate(2000, nature) for km in kms
        ]
        for links in _CHAINS
    }
    columns["direct, at most (PLOB, 1 GHz)"] = [direct(km, 1e9) for km in kms]
    columns["7 trusted nodes, at most (1 GHz)"] = [trusted_chain(km, 8, 1e9) for km in kms]
    return curves.repeaters(kms, columns), {"km": kms, "rates": columns}


MAKERS: dict[str, Callable[[], Made]] = {
    "rate": _rate,
    "ledger": _ledger,
    "eve": _eve,
    "blinding": _blinding,
    "photon-number-splitting": _splitting,
    "beam-splitting": _beam,
    "detection": _detection,
    "repeaters": _repeaters,
}
