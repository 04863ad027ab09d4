"""Every act of the demo in a world that lies: what an act claims is not so, and the act must say so.

The world here is a few lines that behave as five honest nodes would; each test bends one thing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keysource.base import derive_key_id
from keysource.network.demo import acts as acts_module
from keysource.network.demo import measures
from keysource.network.demo.acts import Act, Acts
from keysource.network.demo.world import CONNECTION, SCENE, World

KEYS = 8


class FakeWorld:
    """West, its three ways to east, and what the others would say and write down.  Each look at west is a block."""

    def __init__(self) -> None:
        self.random = random.Random(7)
        self.processes = dict.fromkeys(range(9))
        self.running = dict.fromkeys(range(10), "python")
        self.cuts: set[str] = set()
        self.eve_there = self.alarm = self.altering = False
        self.shunned: set[str] = set()
        self.lines: dict[str, list[dict[str, Any]]] = {"west": [], "east": []}
        self.shares: list[dict[str, Any]] = []
        self.block = 0
        self.acts: Acts | None = None
        # what a test bends
        self.ways: Callable[[FakeWorld], list[str]] = FakeWorld.honest_ways
        self.share: Callable[[bytes], bytes] = lambda _keys: self.random.randbytes(32 * KEYS + 80)
        self.drawn_late = 0
        self.altered_is_committed = False
        self.origin = "simulated"

    def honest_ways(self) -> list[str]:
        good = [way for way in ("middle", "north", "south") if way not in self.shunned]
        good = [way for way in good if way != "north" or not self.alarm]
        up = [way for way in good if f"west-{way}" not in self.cuts]
        return [*up, *(way for way in good if way not in up)][:2]  # a cut link lives on its stock

    def one_more_block(self) -> None:
        assert self.acts is not None
        number, self.block = self.block, self.block + 1
        ways, keys = self.ways(self), self.random.randbytes(32 * KEYS)
        paths = [["west", way, "east"] for way in ways]
        header = {"connection": CONNECTION, "block": number, "count": KEYS}
        if "south" in ways:
            share = base64.b64encode(self.share(keys)).decode()
            self.shares.append({"kind": "share", "header": header, "bytes": share})
            if self.altering:
                path = paths[ways.index("south")]
                self.lines["east"].append({"event": "altered", "block": number, "path": path, "reason": "altered"})
                self.shunned.add("south")
                if not self.altered_is_committed:
                    return
        line = {"event": "committed", "block": number, "keys": KEYS, "paths": paths}
        for end in self.lines.values():
            end.append(line)
        drawn, first = self.acts.drawn, number + self.drawn_late
        for position in range(0, KEYS, 2):
            drawn.keys[derive_key_id(CONNECTION, first, position)] = keys[32 * position : 32 * position + 32]
        drawn.drawn, drawn.equal = drawn.drawn + 4, drawn.equal + 4
        drawn.hops.add(1)
        drawn.origins.add(self.origin)

    # What the acts ask

    def check(self) -> None:
        pass

    def found(self) -> dict[int, str]:
        return self.running

    def node(self, name: str) -> dict[str, Any]:
        if name == "west":
            if self.eve_there != self.alarm:
                self.alarm = self.eve_there
                event = "alarm" if self.alarm else "alarm cleared"
                self.lines["west"].append({"event": event, "link": "west-north"})
            self.one_more_block()
        link = {"name": "west-north", "up": True, "alarm": "qber" if self.alarm else None}
        link |= {"qber": 0.25 if self.alarm else 0.01, "own_units": 9}
        last = self.lines["west"][-1].get("paths", []) if self.lines["west"] else []
        connection = {"paths": last, "next_block": self.block, "keys_per_second": 1.0}
        return {"links": [link], "connections": [connection]}

    def logged(self, name: str, *events: str) -> list[dict[str, Any]]:
        self.one_more_block()
        return [line for line in self.lines[name] if line["event"] in events]

    def copies(self, _name: str) -> list[dict[str, Any]]:
        return self.shares

    def kme(self, _site: str) -> dict[str, Any]:
        return {"links": [{"hops": 1, "paths": []}]}

    def order(self, _name: str, misdeed: str) -> None:
        self.altering = misdeed == "alter"

    async def cut(self, name: str) -> None:
        self.cuts.add(name)

    async def mend(self, name: str) -> None:
        self.cuts.discard(name)

    async def eve(self, *, present: bool) -> None:
        self.eve_there = present


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acts_module, "_LOOK", 0.001)


async def play(world: FakeWorld, name: str) -> Act:
    """The acts up to that one; those before must hold."""
    world.acts = acts = Acts(world, lambda _act: None)  # type: ignore[arg-type]
    for act, body, _patience in acts.script():
        held = await acts.run(act, body, 5.0 if act.name != name else 0.5)
        if act.name == name:
            return act
        assert held, f"{act.name}: {act.reason}"
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["start", "two_paths", "cut", "eve", "copy", "alter"])
async def test_in_an_honest_world_every_act_holds(name: str) -> None:
    act = await play(FakeWorld(), name)
    assert act.held, act.reason


async def test_a_search_that_finds_nothing_running_is_no_search() -> None:
    world = FakeWorld()
    world.running = {}
    act = await play(world, "start")
    assert not act.held and "are found" in act.reason


@pytest.mark.parametrize(
    ("bend", "said"),
    [
        (lambda world: setattr(world, "ways", lambda _world: ["north", "north"]), "none in common"),
        (lambda world: setattr(world, "ways", lambda _world: ["north"]), "two paths"),
        (lambda world: setattr(world, "origin", "qkd"), "another origin"),
        (lambda world: setattr(world, "drawn_late", 1000), "did not happen"),
    ],
)
async def test_two_paths(bend: Callable[[FakeWorld], None], said: str) -> None:
    bend(world := FakeWorld())
    act = await play(world, "two_paths")
    assert not act.held and said in act.reason


async def test_a_cut_of_a_link_that_nothing_went_over_shows_nothing() -> None:
    world = FakeWorld()
    world.ways = lambda _world: ["north", "south"]
    act = await play(world, "cut")
    assert not act.held and act.reason == "west-middle was never in use"


async def test_a_cut_that_changes_nothing_is_seen() -> None:
    world = FakeWorld()
    world.ways = lambda _world: ["middle", "north"]
    act = await play(world, "cut")
    assert not act.held and "did not happen" in act.reason


def after_the_cut(ways: Callable[[FakeWorld], list[str]]) -> FakeWorld:
    """Honest until then."""
    world = FakeWorld()
    world.ways = lambda world: ways(world) if "west-middle" in world.cuts else world.honest_ways()
    return world


async def test_eve_on_a_link_that_nothing_goes_over_shows_nothing() -> None:
    world = after_the_cut(lambda _world: ["south", "middle"])
    world.ways = lambda world: ["middle", "north"] if "west-south" in world.cuts else ["south", "spare"]
    act = await play(world, "eve")
    assert not act.held and act.reason == "west-north was never in use"


async def test_a_single_block_over_the_alarmed_link_is_seen() -> None:
    def ways(world: FakeWorld) -> list[str]:
        return ["north", "south"] if world.alarm and world.block % 2 == 0 else world.honest_ways()

    act = await play(after_the_cut(ways), "eve")
    assert not act.held and "over the alarmed link" in act.reason


async def test_a_link_that_is_never_used_again_is_seen() -> None:
    def ways(world: FakeWorld) -> list[str]:
        world.shunned |= {"north"} if world.alarm else set()
        return world.honest_ways()

    act = await play(after_the_cut(ways), "eve")
    assert not act.held and "did not happen" in act.reason


async def test_south_with_a_key_of_its_blocks_in_clear_is_seen() -> None:
    """Anywhere in what it read."""
    world = FakeWorld()
    world.share = lambda keys: world.random.randbytes(37) + keys + world.random.randbytes(43)
    act = await play(world, "copy")
    assert not act.held and "tells something" in act.reason


async def test_south_with_bits_that_are_likely_right_is_seen() -> None:
    """No half of a key stands there, but every bit is right with four to one."""

    def bent(keys: bytes) -> bytes:
        mask = bytes(world.random.getrandbits(8) & world.random.getrandbits(8) for _ in keys)
        return bytes(a ^ b for a, b in zip(keys, mask, strict=True)) + bytes(80)

    world = FakeWorld()
    world.share = bent
    act = await play(world, "copy")
    assert not act.held and "tells something" in act.reason


async def test_shares_of_other_blocks_than_the_drawn_keys_show_nothing() -> None:
    """They say nothing about those keys for sure; the act must not take that for its proof."""

    def never_drawn(world: FakeWorld) -> list[str]:
        chosen = world.honest_ways()
        world.drawn_late = 10_000 if "south" in chosen else 0
        return chosen

    world = FakeWorld()
    world.ways = never_drawn
    act = await play(world, "copy")
    assert not act.held and "did not happen" in act.reason


async def test_an_altered_block_that_an_end_has_all_the_same_is_seen() -> None:
    world = FakeWorld()
    world.altered_is_committed = True
    act = await play(world, "alter")
    assert not act.held and "somebody has such a key" in act.reason


# What is measured on bytes


def test_halves_and_agreement_see_what_is_there() -> None:
    source = random.Random(3)
    keys = [source.randbytes(32) for _ in range(20)]
    text = source.randbytes(500)
    assert measures.halves_among([text], keys) == 0
    assert measures.halves_among([text[:100] + keys[3][16:] + text[100:]], keys) == 1
    assert measures.halves_among([text, keys[5]], keys) == 2
    independent = [(key, source.randbytes(32)) for key in keys]
    assert abs(measures.agreement(independent) - 0.5) < 0.05 and not measures.says_something(independent)
    assert measures.agreement([(key, key) for key in keys]) == 1.0
    inverted = [(key, bytes(255 - byte for byte in key)) for key in keys]
    assert measures.agreement(inverted) == 0.0 and measures.says_something(inverted)


# What is left behind

_STRAGGLER = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
"""


def straggler(scene: Path) -> None:
    """A grandchild in a session of its own, whose parents are gone, as a child would leave behind."""
    environment = {**os.environ, SCENE: str(scene)}
    subprocess.run([sys.executable, "-c", _STRAGGLER], env=environment, check=True)


@pytest.fixture
def scene() -> World:
    """With nothing started but what a test starts."""
    return World()


async def test_whoever_is_left_is_found_told_and_killed(scene: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keysource.network.demo.world._LAST_CHANCE", 0.3)
    straggler(scene.folder)
    try:
        [pid] = scene.found()
        await scene.__aexit__()
        assert len(scene.left()) == 1 and f"process {pid}" in scene.left()[0]
        end = time.monotonic() + 10
        while scene.found() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert not scene.found() and len(scene.left()) == 1, "it was there, and had to be killed"
    finally:
        for pid in scene.found():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def test_files_that_are_left_are_told(scene: World) -> None:
    await scene.__aexit__()
    assert scene.left() == []
    scene.folder.mkdir()
    try:
        assert scene.left() == [str(scene.folder)]
    finally:
        scene.folder.rmdir()
