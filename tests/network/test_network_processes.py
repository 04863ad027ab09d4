"""Real node processes on loopback TLS, fed by test devices; killed with SIGKILL at named points.

::

    a ── a-b ── b ── b-c ── c        b is the trusted node, and a corrupt one that writes down all it can read
    a ── a-d ── d ── d-c ── c
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from keysource.base import End, Origin
from keysource.device.client import DeviceClient
from keysource.device.messages import BlockEvent, DeviceInfo
from keysource.device.server import DeviceServer
from keysource.errors import KeySourceError
from keysource.kme.control import ControlError, ask
from keysource.network import crashes
from keysource.network.scaffold import write_nodes
from tests.ports import free_ports

LONG = bool(os.environ.get("QVPN_TEST_LONG"))
LINKS = {"a-b": ("a", "b"), "b-c": ("b", "c"), "a-d": ("a", "d"), "d-c": ("d", "c")}


class World:
    """Four nodes, four links, and whoever uses the keys at both ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.random = folder, random.Random(5)
        nodes = sorted({node for ends in LINKS.values() for node in ends})
        lines = ["version = 1"]
        for node, port in zip(nodes, free_ports(len(nodes)), strict=True):
            lines += ["[[node]]", f'id = "{node}"', f'url = "https://127.0.0.1:{port}"']
        for name, ends in LINKS.items():
            lines += ["[[link]]", f'name = "{name}"', f'ends = ["{ends[0]}", "{ends[1]}"]', 'origin = "simulated"']
        lines += [
            "[[connection]]",
            'name = "long"',
            'ends = ["a", "c"]',
            "block_keys = 2",
            "max_hops = 1",
            "paths = 2",
        ]
        (folder / "map.toml").write_text("\n".join(lines))
        self.files = write_nodes(folder, folder / "map.toml")
        self.devices: dict[tuple[str, str], DeviceServer] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.received: dict[str, dict[int, BlockEvent]] = {"a": {}, "c": {}}
        self._users: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        for name, ends in LINKS.items():
            for end, node in zip((End.A, End.B), ends, strict=True):
                info = DeviceInfo("test", name, end, origin=Origin.SIMULATED)
                device = DeviceServer(self.folder / node / "links" / f"{name}.sock", info)
                device.set_status("up")
                await device.start()
                self.devices[(name, node)] = device
        self._users = [asyncio.create_task(self._use(end)) for end in self.received]

    async def aclose(self) -> None:
        for task in self._users:
            task.cancel()
        await asyncio.gather(*self._users, return_exceptions=True)
        for process in self.processes.values():
            process.kill()
            process.wait()
        for device in self.devices.values():
            await device.aclose()

    def boot(self, node: str, *arguments: str, crash: str = "") -> None:
        environment = dict(os.environ) | ({crashes.VARIABLE: crash} if crash else {})
        log = (self.folder / f"{node}.log").open("ab")
        code = "from keysource.network.cli import main; main()"
        command = [sys.executable, "-c", code, "network", "serve", str(self.files[node]), *arguments]
        with log:
            self.processes[node] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def feed(self, units: int) -> None:
        for name, ends in LINKS.items():
            keys = self.random.randbytes(32 * units)
            block = self.devices[(name, ends[0])].status().next_block
            for node in ends:
                self.devices[(name, node)].publish(block, keys)

    def status(self, node: str) -> dict[str, Any]:
        return ask(self.folder / node / "state" / "control.sock", {"op": "status"})

    async def until(self, what: str, condition: Any, seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            with contextlib.suppress(TimeoutError):
                while not condition():
                    await asyncio.sleep(0.05)
                return
        logs = "".join((self.folder / f"{node}.log").read_text()[-1500:] for node in self.processes)
        raise AssertionError(f"{what}\n{logs}")

    async def _use(self, node: str) -> None:
        """Take blocks as a KME does: note, then acknowledge; again from the first unknown one."""
        mine = self.received[node]
        while True:
            with contextlib.suppress(KeySourceError):
                device = await DeviceClient.connect(self.folder / node / "relayed" / "long.sock")
                try:
                    await device.subscribe(max(mine, default=-1) + 1)
                    async for event in device.events():
                        if isinstance(event, BlockEvent):
                            assert event.block not in mine or mine[event.block].keys == event.keys
                            mine[event.block] = event
                            await device.ack(event.block)
                finally:
                    await device.aclose()
            await asyncio.sleep(0.1)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qn") as name:  # short: sockets live in it
        yield Path(name)


@pytest.fixture
async def world(folder: Path) -> AsyncIterator[World]:
    world = World(folder)
    await world.start()
    try:
        yield world
    finally:
        await world.aclose()


def points() -> list[tuple[str, str]]:
    """(node, crash point): at the initiator, the trusted node and the target."""
    every = [("a", p) for p in ("pad.drawn", "share.sent", "prepare.stored", "settle.stored", "delivered.stored")]
    every += [("b", p) for p in ("share.asked", "share.in-transaction", "share.spent", "pad.drawn", "block.stored")]
    every += [("c", p) for p in ("share.spent", "proof.made", "commit.in-transaction", "commit.stored")]
    if LONG:
        return [pair for pair in every for _ in range(3)]
    return [("b", "pad.drawn"), ("a", "prepare.stored"), ("c", "commit.stored")]


@pytest.mark.timeout(1800 if LONG else 300)
async def test_four_processes_killed_again_and_again(world: World) -> None:
    """Each block is at both ends and equal, or at none; no unit is ever in two messages."""
    copies = world.folder / "copies.jsonl"
    extra = {"b": ("--fault", "copy", "--copies", str(copies)), "c": ("--copies", str(world.folder / "c.jsonl"))}
    for node in ("b", "c", "d", "a"):
        world.boot(node, *extra.get(node, ()))
    world.feed(160)
    await world.until("no block at both ends", lambda: min(map(len, world.received.values())) >= 1)
    for number, (node, point) in enumerate(points()):
        world.processes[node].kill()
        world.processes[node].wait()
        world.boot(node, *extra.get(node, ()), crash=f"{point}:{1 + number % 2}")
        world.feed(40)
        await world.until(f"{node} never came to {point}", lambda: world.processes[node].poll() is not None)  # noqa: B023
        assert world.processes[node].returncode == -9
        world.boot(node, *extra.get(node, ()))
    world.feed(80)
    before = len(world.received["a"])
    await world.until("it does not go on", lambda: len(world.received["a"]) > before + 1)

    def idle() -> bool:
        with contextlib.suppress(ControlError):
            return world.received["a"].keys() == world.received["c"].keys()
        return False

    await world.until("a block is at one end only", idle)
    left, right = world.received["a"], world.received["c"]
    assert all(left[block].keys == right[block].keys and left[block].facts == right[block].facts for block in left)
    facts = [event.facts for event in left.values()]
    assert all(fact and fact.origin is Origin.SIMULATED and fact.hops == 1 and len(fact.paths) == 2 for fact in facts)
    seen: dict[str, str] = {}
    shares: list[bytes] = []
    for file in (copies, world.folder / "c.jsonl"):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            if entry["kind"] == "share":
                shares.append(base64.b64decode(entry["bytes"]))
                continue
            for unit in (*entry["header"]["pad"], entry["header"]["mac"]):
                assert seen.setdefault(unit, entry["bytes"]) == entry["bytes"], "a pad masks two messages"
    assert seen and shares
    whole = b"".join(bytes(event.keys) for event in left.values())
    assert not any(share[i : i + 16] in whole for share in shares for i in range(len(share) - 16))
    status = world.status("a")
    assert {link["name"] for link in status["links"]} == {"a-b", "a-d"}
    assert sorted(status["connections"][0]["paths"]) == [["a", "b", "c"], ["a", "d", "c"]]
