"""Eve on stage: a link in real processes, some quiet blocks, some with her, some after her; then what she has.

Every number is read from the run: reports of both ends, keys that their clients were handed, her notebook in the
fibre, and the frames that passed her on the classical channel.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keysource.base import KEY_BYTES
from keysource.errors import KeySourceError
from keysource.qkd.audit import Overheard, rank
from keysource.qkd.distill import wire
from keysource.qkd.distill.bits import Bits
from keysource.qkd.distill.mac import TAG_BYTES, TICKET_BYTES
from keysource.qkd.distill.toeplitz import seed_bits, toeplitz_hash
from keysource.qkd.distill.wire import Frame, Kind, Start
from keysource.qkd.errors import LinkError
from keysource.qkd.lab import Lab
from keysource.qkd.optics.eve import Notes
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import Monitor
from keysource.qkd.plan import Plan
from keysource.qkd.presets import PRESETS

Say = Callable[[str], None]
_PATIENCE = 120.0
MOST_COUNTED = 40_000
"""Sifted bits of a block whose rank is worked out in seconds."""
_LIMIT = 0.9
"""Of a demonstration's errors: its blocks have a lax budget and nobody uses its keys."""


@dataclass
class Scene:
    """Blocks of one act, as :func:`play` saw them."""

    act: str
    order: dict[str, Any]
    blocks: list[dict[str, Any]] = field(default_factory=list)


async def play(preset: str, order: dict[str, Any], monitor: Monitor, blocks: int, say: Say) -> list[Scene]:
    """Before Eve, with her, after her: ``blocks`` of each."""
    scenes = [Scene("before", {"attack": "none"}), Scene("Eve", order), Scene("after", {"attack": "none"})]
    heard: list[tuple[dict[str, Any], Overheard]] = []
    async with Lab(preset, monitor=monitor, error_limit=_LIMIT) as lab:
        for scene in scenes:
            say(f"{scene.act}: {blocks} blocks, monitor {monitor}")
            heard += await _act(lab, scene, blocks)
    say("what Eve knows")
    for seen, what in heard:  # slow, and only now: the link would run beside it
        seen["eve"] = await asyncio.to_thread(knowledge, what, seen["handed"], order["attack"])
    for scene in scenes:
        for seen in scene.blocks:
            del seen["handed"]
    return scenes


async def _act(lab: Lab, scene: Scene, blocks: int) -> list[tuple[dict[str, Any], Overheard]]:
    """Blocks that flew wholly under the act's order; with what Eve has of each where she is there."""
    await lab.fibre(scene.order)
    since, heard = await lab.next_block(), []
    for _ in range(blocks):
        seen = await _block(lab, since)
        scene.blocks.append(seen)
        if scene.order["attack"] != "none" and (what := await _overheard(lab, seen["block"])) is not None:
            heard.append((seen, what))
    return heard


async def _block(lab: Lab, since: int) -> dict[str, Any]:
    reports = await lab.reports(_PATIENCE, since=since)
    mine = dict(reports.get("alice") or reports["bob"])
    for name in ("s_z1", "phi"):  # where a block misses them, only Bob has come so far
        mine[name] = mine.get(name) or reports.get("bob", {}).get(name)
    passed = reports.get("bob", {}).get("result") == "passed"
    keys = await lab.keys(mine["block"]) if passed else {"alice": [], "bob": []}
    return {
        **mine,
        "at_alice": reports.get("alice", {}).get("result", "lost"),
        "at_bob": reports.get("bob", {}).get("result", "lost"),
        "monitor": reports.get("bob", {}).get("monitor"),
        "keys_at_alice": len(keys["alice"]),
        "keys_at_bob": len(keys["bob"]),
        "keys_equal": keys["alice"] == keys["bob"],
        "handed": keys["alice"],
    }


async def _overheard(lab: Lab, block: int) -> Overheard | None:
    if lab.wiretap is None or block not in lab.wiretap.blocks:
        return None
    try:
        notes: Notes | None = await lab.notes(block)
    except KeySourceError:
        return None  # too many detections for her notebook
    if notes is None and not isinstance(PRESETS[lab.preset].optics, Optics):
        return None  # of intercepted pairs she keeps no notes
    return Overheard(list(lab.wiretap.blocks[block]), notes, lab.plan())


# What she has


def knowledge(heard: Overheard, keys: Sequence[bytes], attack: str) -> dict[str, Any]:
    """``sifted`` bits and how many of them she ``held``; of a delivered block the ``final_bits`` and how many of them
    she ``determined``, with ``how`` that was found."""
    plan = heard.plan
    if heard.notes is None:
        raise LinkError("Eve's notebook has nothing of a block that flew past her: a mistake; please report it")
    if not any(frame.kind is Kind.SIFT for _sender, frame in heard.frames):
        return {"sifted": 0, "held": 0, "how": "the block ended before anything about it was announced"}
    held = int(heard.known().sum())
    found: dict[str, Any] = {"sifted": plan.n_z, "held": held}
    if not keys:
        return found | {"final_bits": 0, "determined": 0, "how": "nothing was delivered"}
    if attack == "blinding":
        return found | _copied(heard, keys)
    if plan.n_z > MOST_COUNTED:
        return found | {
            "how": f"of a final key her share is counted for blocks of at most {MOST_COUNTED} sifted bits"
        }
    determined = heard.determined()
    return found | {
        "final_bits": plan.length,
        "determined": determined,
        "how": "rank over GF(2) of all that she saw",
        "cut_short": _cut_short(heard),
    }


def _copied(heard: Overheard, keys: Sequence[bytes]) -> dict[str, Any]:
    """She has Bob's bits, corrects and hashes them as he does, and compares with what the clients were handed."""
    plan, copy = heard.plan, heard.as_bob()
    seed, _none = wire.hashed_untrusted(heard.one(Kind.AMPLIFY), seed_bits(plan.n_z, plan.length), 0)
    hers = _keys_of(toeplitz_hash(copy, seed, plan.length), heard)
    same = sum(a == b for a, b in zip(hers, keys, strict=False))
    bits = 8 * KEY_BYTES
    return {
        "final_bits": bits * len(keys),
        "determined": bits * same,
        "keys_she_has": same,
        "how": "her own copy, hashed as they did, compared with the keys handed out",
    }


def _keys_of(secret: Bits, heard: Overheard) -> list[bytes]:
    share = 8 * TICKET_BYTES * Start.from_untrusted(heard.one(Kind.START)).refills
    packed = np.packbits(secret[share:]).tobytes()
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed) - KEY_BYTES + 1, KEY_BYTES)]


def _cut_short(heard: Overheard) -> dict[str, int]:
    """The same block, hashed only as if nothing but parities had been disclosed: at least so many bits are hers."""
    plan: Plan = heard.plan
    length = plan.n_z - 2 * plan.leak_budget - plan.verify_bits
    hidden = np.flatnonzero(~heard.known())
    least = length + rank(heard.view()[:, hidden]) - len(hidden)
    return {"final_bits": length, "determined_at_least": max(0, least)}


# The man in the middle


@dataclass(frozen=True, slots=True)
class Deed:
    """Something done to one frame of that kind."""

    kind: Kind
    words: str
    change: Callable[[Frame], list[Frame]]


def _flipped(frame: Frame) -> list[Frame]:
    return [Frame(frame.kind, frame.payload[:-1] + bytes([frame.payload[-1] ^ 1]))]


DEEDS = (
    Deed(Kind.DETECTED, "one bit of Bob's bases flipped", _flipped),
    Deed(Kind.CHECK, "cut short by a byte", lambda frame: [Frame(frame.kind, frame.payload[:-1])]),
    Deed(Kind.PARITY, "one parity flipped", _flipped),
    Deed(Kind.PARITY, "sent twice", lambda frame: [frame, frame]),
    Deed(Kind.AMPLIFY, "one bit of the hash's seed flipped", _flipped),
    Deed(Kind.AUTH, "a tag of her own", lambda frame: [Frame(frame.kind, os.urandom(TAG_BYTES))]),
)


async def meddle(preset: str, say: Say) -> list[dict[str, Any]]:
    """One deed after the other; for each what became of its block and of the next that passed."""
    found = []
    async with Lab(preset, error_limit=_LIMIT) as lab:
        await _passed(lab, 0)
        for deed in DEEDS:
            say(f"a {deed.kind.name} frame: {deed.words}")
            found.append(await _do(lab, deed))
    return found


async def _do(lab: Lab, deed: Deed) -> dict[str, Any]:
    tap = lab.wiretap
    if tap is None:
        raise LinkError("nobody sits on the classical channel")
    touched: list[int] = []

    def touch(_sender: str, frame: Frame) -> list[Frame]:
        if touched or frame.kind is not deed.kind:
            return [frame]
        touched.append(max(tap.blocks))
        return deed.change(frame)

    alarms = {site: len(taker.alarm_log) for site, taker in lab.takers.items()}
    tap.touch = touch
    seen = await _block(lab, 0)
    while not touched or seen["block"] < touched[0]:
        seen = await _block(lab, 0)
    tap.touch = None
    healed = await _passed(lab, seen["block"] + 1)
    raised = [entry for site, taker in lab.takers.items() for entry in taker.alarm_log[alarms[site] :]]
    seen.pop("handed")
    return {
        "frame": deed.kind.name,
        "deed": deed.words,
        "block": seen["block"],
        "at_alice": seen["at_alice"],
        "at_bob": seen["at_bob"],
        "said": seen.get("said"),
        "keys_delivered": sum(touched[0] in taker.blocks for taker in lab.takers.values()),
        "alarms": sorted({entry["kind"] for entry in raised if entry["active"]}),
        "next_block_that_passed": healed,
    }


async def _passed(lab: Lab, since: int) -> int:
    for _ in range(20):
        seen = await _block(lab, since)
        if seen["at_alice"] == seen["at_bob"] == "passed":
            return int(seen["block"])
    raise LinkError("no block passes")
