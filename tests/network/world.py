"""Real node processes on loopback TLS, fed by test devices, with a user of the keys at both ends.

::

    a ── a-b ── b ── b-c ── c        a and c are the ends, b and d trusted nodes; b, c and d write down
    a ── a-d ── d ── d-c ── c        every message that they take and what they can read of it
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from keysource.base import End, Origin
from keysource.device.client import DeviceClient
from keysource.device.messages import BlockEvent, DeviceInfo
from keysource.device.server import DeviceServer
from keysource.errors import KeySourceError
from keysource.kme.control import ControlError, ask
from keysource.kme.pki import Authority
from keysource.network import crashes
from keysource.network.scaffold import write_nodes
from tests.ports import free_ports

LINKS = {"a-b": ("a", "b"), "b-c": ("b", "c"), "a-d": ("a", "d"), "d-c": ("d", "c")}
NODES = ("a", "b", "c", "d")
ROOT = Path(__file__).parents[2]
_FEED_EVERY = 0.4


class World:
    """Four nodes, four links, and whoever uses the keys at both ends."""

    def __init__(self, folder: Path, more: str = "") -> None:
        """``more`` stands in every node's file."""
        self.folder, self.random = folder, random.Random(5)
        self.ports = dict(zip(NODES, free_ports(len(NODES)), strict=True))
        lines = ["version = 1"]
        for node, port in self.ports.items():
            lines += ["[[node]]", f'id = "{node}"', f'url = "https://127.0.0.1:{port}"']
        for name, ends in LINKS.items():
            lines += ["[[link]]", f'name = "{name}"', f'ends = ["{ends[0]}", "{ends[1]}"]', 'origin = "simulated"']
        lines += ["[[connection]]", 'name = "long"', 'ends = ["a", "c"]']
        lines += ["block_keys = 2", "max_hops = 1", "paths = 2"]
        (folder / "map.toml").write_text("\n".join(lines))
        self.authority = Authority("test CA")
        self.files = write_nodes(folder, folder / "map.toml", self.authority)
        for file in self.files.values():
            file.write_text(file.read_text() + more)
        self.devices: dict[tuple[str, str], DeviceServer] = {}
        self.pids: dict[str, int] = {}
        self.received: dict[str, dict[int, BlockEvent]] = {"a": {}, "c": {}}
        self.wrong: list[str] = []
        """What a user of the keys saw that must not be."""
        self.masked: dict[str, str] = {}
        """Unit -> the one message in which it may ever stand."""
        self.fed: Counter[str] = Counter()
        """Units of each link."""
        self.used: Counter[tuple[str, str]] = Counter()
        """Units that stand in messages which came, by link and sender."""
        self.read: list[bytes] = []
        """Shares, as far as node b can read them."""
        self._offsets: dict[str, int] = {}
        self._fed = float("-inf")
        self._users: list[asyncio.Task[None]] = []
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.network.nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

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
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        self._nursery.wait(10)
        assert self._nursery.stdout is not None
        self._nursery.stdout.close()
        for device in self.devices.values():
            await device.aclose()

    # Nodes

    def boot(self, node: str, crash: str = "") -> None:
        """Start a node, corrupt as the module says; ``crash`` is a point and perhaps a count."""
        options = [] if node == "a" else ["--fault", "copy", "--copies", str(self._copies(node))]
        order = {
            "command": ["network"],
            "serve": str(self.files[node]),
            "options": options,
            "log": str(self.folder / f"{node}.log"),
            "environment": {crashes.VARIABLE: crash} if crash else {},
        }
        self.pids[node] = self._order(order)["pid"]

    def ended(self, node: str) -> int | None:
        """The signal that ended a node, 0 where none did, None while it runs."""
        answer: int | None = self._order({"ended": self.pids[node]})["signal"]
        return answer

    async def kill(self, node: str) -> None:
        os.kill(self.pids[node], signal.SIGKILL)
        await self.until(f"{node} does not die", lambda: self.ended(node) is not None)

    async def killed_at(self, node: str, point: str, count: int) -> None:
        """Start a node that is down, have it die at that point, and leave it down."""
        self.boot(node, f"{point}:{count}")
        died: int | None = None

        def gone() -> bool:
            nonlocal died
            self.feed()
            died = self.ended(node)
            return died is not None

        await self.until(f"{node} never came to {point}", gone)
        assert died == signal.SIGKILL, f"{node} ended with {died}: {self.log(node)}"

    def _order(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(json.dumps(order) + "\n")
        answer: dict[str, Any] = json.loads(self._nursery.stdout.readline())
        return answer

    def status(self, node: str) -> dict[str, Any]:
        return ask(self.folder / node / "state" / "control.sock", {"op": "status"})

    def log(self, node: str) -> str:
        file = self.folder / f"{node}.log"
        return file.read_text()[-1500:] if file.exists() else ""

    def audit(self, node: str) -> list[dict[str, Any]]:
        file = self.folder / node / "state" / "audit.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    # Keys

    def feed(self, units: int = 40) -> None:
        """A block to both ends of each link whose devices have been emptied, now and then."""
        now = asyncio.get_running_loop().time()
        if now < self._fed + _FEED_EVERY:
            return
        self._fed = now
        for name, ends in LINKS.items():
            both = [self.devices[(name, node)] for node in ends]
            if not any(device.status().blocks_held for device in both):
                keys = self.random.randbytes(32 * units)
                block = both[0].status().next_block
                self.fed[name] += units
                for device in both:
                    device.publish(block, keys)

    async def until(self, what: str, condition: Any, seconds: float = 60.0) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.02)
                return
        raise AssertionError(f"{what}\n{''.join(self.log(node) for node in NODES)}")

    def idle(self) -> bool:
        """Both ends have the same blocks, and none is on its way."""
        with contextlib.suppress(ControlError):
            [said] = self.status("a")["connections"]
            return said["state"] != "committing" and self.received["a"].keys() == self.received["c"].keys()
        return False

    def running(self) -> bool:
        """All nodes answer; one that was just started needs a moment, in which the others may go on without it."""
        with contextlib.suppress(ControlError):
            return all(self.status(node) for node in NODES)
        return False

    def emptied(self) -> bool:
        return not any(device.status().blocks_held for device in self.devices.values())

    def lost(self) -> dict[tuple[str, str], int]:
        """By link and sender: units that are neither free there nor stand in a message that came, since the start."""
        self._newly_copied()
        free = {(link["name"], node): link["own_units"] for node in NODES for link in self.status(node)["links"]}
        return {key: self.fed[key[0]] // 2 - units - self.used[key] for key, units in free.items()}

    async def settled(self) -> None:
        """All nodes run: a new block comes to both ends, then there is none at one end only."""
        await self.until("a node does not answer", self.running)
        before = len(self.received["a"])

        def more() -> bool:
            self.feed()
            return len(self.received["a"]) > before

        await self.until("it does not go on", more)
        await self.until("a device is not emptied", self.emptied)
        await self.until("a block is at one end only", self.idle)

    def check(self) -> None:
        """Nothing was wrong so far: blocks equal, pads used once, nothing that b read is in a key."""
        assert not self.wrong, self.wrong
        left, right = self.received["a"], self.received["c"]
        for block in left.keys() & right.keys():
            assert left[block].keys == right[block].keys and left[block].facts == right[block].facts
            facts = left[block].facts
            assert facts and (facts.origin, facts.hops, len(facts.paths)) == (Origin.SIMULATED, 1, 2)
        keys = [bytes(event.keys[i : i + 32]) for event in left.values() for i in range(0, len(event.keys), 32)]
        assert len(set(keys)) == len(keys), "a key came twice"
        new = self._newly_copied()
        halves = {key[i : i + 16] for key in keys for i in (0, 16)}
        for share in new:
            assert not any(share[i : i + 16] in halves for i in range(len(share) - 15)), "a key passed in clear"

    def _copies(self, node: str) -> Path:
        return self.folder / f"{node}.jsonl"

    def _newly_copied(self) -> list[bytes]:
        """Shares that b read since the last time; and every message's pads are noted."""
        shares = []
        for node in NODES[1:]:
            if not self._copies(node).exists():
                continue
            with self._copies(node).open() as file:
                file.seek(self._offsets.get(node, 0))
                whole, _, _torn = file.read().rpartition("\n")
            self._offsets[node] = self._offsets.get(node, 0) + len(whole) + bool(whole)
            for line in whole.splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the node was killed while it wrote
                    continue
                if entry["kind"] == "share":
                    shares.append(base64.b64decode(entry["bytes"]))
                    continue
                header = entry["header"]
                sender = header["link"], header["path"][header["hop"]]
                for unit in (*header["pad"], header["mac"]):
                    self.used[sender] += unit not in self.masked
                    assert self.masked.setdefault(unit, entry["bytes"]) == entry["bytes"], "a pad masks two messages"
        self.read += shares
        return shares

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
                            if event.block in mine and mine[event.block].keys != event.keys:
                                self.wrong.append(f"block {event.block} came to {node} twice and differs")
                            mine[event.block] = event
                            await device.ack(event.block)
                finally:
                    await device.aclose()
            await asyncio.sleep(0.05)
