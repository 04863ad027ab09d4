"""``qvpn-qkd attack NAME``: a narrated demonstration."""

from __future__ import annotations

import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from keysource.qkd.errors import LinkError, LinkSettings
from keysource.qkd.lab import interrupted
from keysource.qkd.optics.attacks import MODES
from keysource.qkd.optics.monitors import MONITORS, Monitor
from keysource.qkd.pictures.base import save, wanted
from keysource.qkd.presets import PRESETS
from keysource.qkd.staging import Scene, meddle, play

STORIES = {
    "intercept-resend": "Eve measures pulses in a random basis and sends on what she found.",
    "photon-number-splitting": "Eve counts photons without touching them. Of several she keeps one and sends the rest"
    " over a line without loss; single photons she blocks as far as the loss hides it.",
    "beam-splitting": "Eve takes the light that the fibre would have lost, and sends the rest without loss.",
    "blinding": "Eve shines bright light at Bob's detectors: they are no photon counters any more, and click when she"
    " says so. She measures each pulse herself and dictates the result (Lydersen 2010).",
    "man-in-the-middle": "Eve sits on the classical channel and changes frames between Alice and Bob.",
}
_PRESET = {"photon-number-splitting": "small50"}
_ORDER = {"photon-number-splitting": "photon-number"}
_INTERRUPTED = 130


def attack(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(STORIES)}.")],
    fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the pulses that she takes.")] = 1.0,
    mode: Annotated[str, typer.Option(help="Of blinding: cw or pulsed.")] = "cw",
    monitor: Annotated[
        str | None, typer.Option(help=f"Of Bob's detectors: {', '.join(MONITORS)}; blinding: default is each.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="See qvpn-qkd presets; default: a small link.")] = None,
    blocks: Annotated[int, typer.Option(min=1, max=20, help="Before Eve, with her, and after.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a plot (.png, .svg, .pdf).")] = None,
) -> None:
    """What Eve did, what Alice and Bob saw, what was delivered, and what she knows of it."""
    guards = _checked(name, fraction, mode, monitor, preset, picture)
    link = preset or _PRESET.get(name, "small10")
    order: dict[str, Any] = {"attack": _ORDER.get(name, name), "fraction": fraction}
    if name == "blinding":
        order["mode"] = mode
    facts: dict[str, Any] = {"attack": name, "story": STORIES[name], "preset": link, "warning": "SIMULATED"}

    def say(text: str) -> None:
        if not as_json and sys.stderr.isatty():
            print(f"  ... {text}", file=sys.stderr)

    async def stage() -> None:
        if name == "man-in-the-middle":
            facts["deeds"] = await meddle(link, say)
            return
        facts["order"], facts["runs"] = order, {}
        for guard in guards:
            scenes = await play(link, order, guard, blocks, say)
            facts["runs"][guard] = judged(scenes)

    _perform(stage())
    if picture is not None:
        _draw(facts, picture)
    if as_json:
        print(json.dumps(facts))
    else:
        _narrate(facts)


def _perform(work: Coroutine[Any, Any, None]) -> None:
    if interrupted(work):
        print("qvpn-qkd: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _checked(
    name: str, fraction: float, mode: str, monitor: str | None, preset: str | None, picture: Path | None
) -> list[Monitor]:
    """The monitors to stage.  Raises :class:`LinkSettings`."""
    if name not in STORIES:
        raise LinkSettings(f"attack {name}: none of {', '.join(STORIES)}")
    if mode not in MODES:
        raise LinkSettings(f"--mode {mode}: none of {', '.join(MODES)}")
    if name == "blinding" and fraction != 1.0:
        raise LinkSettings(f"--fraction {fraction:g}: blinding takes all pulses")
    if fraction == 0.0:
        raise LinkSettings("--fraction 0: that is no attack")
    if preset is not None and preset not in PRESETS:
        raise LinkSettings(f"--preset {preset}: none of {', '.join(PRESETS)}")
    if monitor is not None and monitor not in get_args(Monitor):
        raise LinkSettings(f"--monitor {monitor}: none of {', '.join(MONITORS)}")
    if picture is not None:
        wanted(picture)
    chosen: dict[str, Monitor] = {each: each for each in MONITORS}
    if monitor is not None:
        return [chosen[monitor]]
    return list(MONITORS) if name == "blinding" else ["photocurrent"]


def judged(scenes: list[Scene]) -> dict[str, Any]:
    """The acts with what fired while Eve was there; by the verdicts of both ends, nothing else."""
    during = next(scene for scene in scenes if scene.act == "Eve")
    verdicts = [{block["at_alice"], block["at_bob"]} for block in during.blocks]
    fired = {
        "errors": sum("qber" in each or "verify" in each or "leak" in each for each in verdicts),
        "CHSH test": sum("chsh" in each for each in verdicts),
        "decoys": sum("statistics" in each for each in verdicts),
        "monitor": sum("monitor" in each for each in verdicts),
        "too few detections": sum("short" in each for each in verdicts),
    }
    return {
        "acts": {scene.act: scene.blocks for scene in scenes},
        "fired": fired,
        "undetected": all(verdict == {"passed"} for verdict in verdicts),
        "keys_delivered_with_eve": sum(block["keys_at_alice"] for block in during.blocks),
    }


def _draw(facts: dict[str, Any], path: Path) -> None:
    from keysource.qkd.pictures import stage

    if "deeds" in facts:
        save(stage.deeds(facts["deeds"]), path)
    elif len(facts["runs"]) > 1:
        save(stage.truth_table({facts["order"].get("mode", ""): facts["runs"]}), path)
    else:
        save(stage.course(facts), path)


# The story


def _narrate(facts: dict[str, Any]) -> None:
    preset = PRESETS[facts["preset"]]
    print(f"{facts['attack']}, on {preset.name}: {preset.about}\n{facts['story']}\n")
    if "deeds" in facts:
        _tell_deeds(facts["deeds"])
    else:
        for guard, run in facts["runs"].items():
            _tell_run(facts, guard, run)
    print("Simulated light and a simulated Eve; the post-processing, its frames and its keys are real.")


def _tell_run(facts: dict[str, Any], guard: str, run: dict[str, Any]) -> None:
    plan, optics = PRESETS[facts["preset"]].plan(), PRESETS[facts["preset"]].optics
    names = [f"gain {mu:g}" for mu in optics.intensities]
    table = Table("", "block", "Alice", "Bob", "QBER", *names, "single photons", "keys")
    for act, blocks in run["acts"].items():
        for block in blocks:
            gains = [f"{gain:.4f}" for gain in block.get("gains") or ()] or ["-"] * len(names)
            single = "-" if block.get("s_z1") is None else f"{block['s_z1']:.0f}"
            row = (act, str(block["block"]), block["at_alice"], block["at_bob"], _percent(block.get("qber")))
            table.add_row(*row, *gains, single, str(block["keys_at_alice"]))
    limit = f"at most {100 * plan.check_errors / plan.n_x:.2f} %"
    table.add_row("", "", "", "wanted", limit, *[""] * len(names), f"{plan.s_z1:.0f} or more", "", style="dim")
    Console(width=max(100, Console().width)).print(table)
    seen = [(act, block["chsh"]) for act, blocks in run["acts"].items() for block in blocks if block.get("chsh")]
    if seen:
        print("S of CHSH: " + ", ".join(f"{act} {s:.3f} ± {spread:.3f}" for act, (s, spread) in seen))
    print(f"Bob's monitor: {guard}.  {_verdict(run)}")
    for block in run["acts"]["Eve"]:
        if block.get("monitor"):
            print(f"  block {block['block']}: {block['monitor']}")
    _tell_knowledge(run)
    print()


def _verdict(run: dict[str, Any]) -> str:
    blocks = len(run["acts"]["Eve"])
    if run["undetected"]:
        return (
            f"Nothing fired: errors, decoys, tags and monitor let all {blocks} blocks pass,"
            f" {run['keys_delivered_with_eve']} keys were delivered."
        )
    fired = ", ".join(f"{what} in {count} of {blocks}" for what, count in run["fired"].items() if count)
    fired = fired or "nothing, but not every block came to its end"
    keys = run["keys_delivered_with_eve"]
    return f"What fired with Eve there: {fired}.  Delivered meanwhile: {f'{keys} keys' if keys else 'nothing'}."


def _tell_knowledge(run: dict[str, Any]) -> None:
    for block in run["acts"]["Eve"]:
        if (eve := block.get("eve")) is None:
            continue
        share = f"{eve['held']} of {eve['sifted']} sifted bits" if eve["sifted"] else "no bit"
        text = f"  block {block['block']}: Eve held {share}"
        if eve.get("final_bits"):
            text += f"; of the {eve['final_bits']} bits of the final key she has {eve['determined']}"
        print(f"{text} ({eve['how']})")
        if short := eve.get("cut_short"):
            print(
                f"    had it been hashed only to {short['final_bits']} bits, as if no light had leaked, she would"
                f" have {short['determined_at_least']} of them or more"
            )


def _tell_deeds(deeds: list[dict[str, Any]]) -> None:
    table = Table("frame", "what she did", "Alice", "Bob", "alarm", "keys", "next that passed")
    for deed in deeds:
        row = (deed["frame"], deed["deed"], deed["at_alice"], deed["at_bob"], ", ".join(deed["alarms"]) or "-")
        table.add_row(*row, str(deed["keys_delivered"]), str(deed["next_block_that_passed"]))
    Console(width=max(100, Console().width)).print(table)
    if any(deed["keys_delivered"] for deed in deeds):
        raise LinkError("a key of a block that was tampered with was delivered: a mistake; please report it")
    print("No key of a touched block was delivered; its ticket of the pad is burnt, and the next block passes.")


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.2f} %"
