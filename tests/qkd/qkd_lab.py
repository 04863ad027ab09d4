"""A link of real processes for the tests: Alice (with the fibre as her child), Bob, a client at each device socket,
and a proxy on the classical channel that reads, and where a test wants it, touches every frame."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keysource.device.client import DeviceClient, follow
from keysource.device.messages import AlarmEvent, BlockEvent, Event, VoidEvent
from keysource.errors import KeySourceError
from keysource.qkd.config import Address
from keysource.qkd.distill.wire import Kind, Start
from keysource.qkd.engine.control import ask
from keysource.qkd.pair import PairPlan, write_pair
from keysource.qkd.wiretap import Wiretap
from tests.ports import free_ports

Touch = Callable[[str, bytes], bytes | None]
"""("A" or "B" who sent it, kind and payload) -> what goes on; None cuts the connection."""


class Collector:
    """A client of one device socket: acknowledges every block, remembers all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks: dict[int, bytes] = {}
        self.voids: list[int] = []
        self.alarms: dict[str, str] = {}
        self.alarm_log: list[tuple[bool, str, str]] = []
        self.connections = 0
        self._next = 0
        self.task = asyncio.create_task(follow(path, self, first_wait=0.05, longest_wait=0.2))

    def next_block(self) -> int:
        return self._next

    async def connected(self, device: DeviceClient) -> None:
        self.connections += 1
        self.alarms.clear()

    async def event(self, device: DeviceClient, event: Event) -> None:
        match event:
            case BlockEvent(block, keys):
                assert block >= self._next and block not in self.blocks, "a block number came back"
                self.blocks[block] = bytes(keys)
                self._next = block + 1
                await device.ack(block)
            case VoidEvent(before):
                self.voids.append(before)
                for block in [b for b in self.blocks if b < before]:
                    del self.blocks[block]
            case AlarmEvent(active, kind, detail):
                self.alarm_log.append((active, kind, detail))
                if active:
                    self.alarms[kind] = detail
                else:
                    self.alarms.pop(kind, None)

    def disconnected(self, error: KeySourceError) -> None:
        pass


class Proxy(Wiretap):
    """The product's own wiretap, with hands that may leave something else than frames.  ``tickets`` has every pad
    ticket that a START ever named."""

    def __init__(self, listen: int, target: int) -> None:
        super().__init__(Address("127.0.0.1", listen), Address("127.0.0.1", target))
        self.hands: Touch | None = None
        self.tickets: list[int] = []
        self.kinds: list[tuple[str, str]] = []
        self.touched: list[str] = []

    def _passed_on(self, sender: str, body: bytes) -> list[bytes] | None:
        self.kinds.append((sender, Kind(body[0]).name))
        if body[0] == Kind.START:
            self.tickets.append(Start.from_untrusted(body[1:]).ticket)
        if self.hands is None:
            return super()._passed_on(sender, body)
        onward = self.hands(sender, body)
        return None if onward is None else [onward]


class LinkLab:
    """Folder, ports, processes.  ``async with LinkLab(tmp_path) as lab``."""

    def __init__(
        self,
        folder: Path,
        *,
        preset: str = "demo",
        pace: str = "fast",
        separate: bool = False,
        bootstrap: str = "psk",
    ) -> None:
        self.folder = folder
        self.log = (folder / "log").open("wb")
        classical, fibre, front = free_ports(3)
        plan = PairPlan(
            Address("127.0.0.1", classical),
            Address("127.0.0.1", fibre),
            preset=preset,
            pace=pace,  # type: ignore[arg-type]
            separate_fibre=separate,
            bootstrap=bootstrap,  # type: ignore[arg-type]
        )
        write_pair(folder, plan)
        self.proxy = Proxy(front, classical)
        bob = folder / "bob" / "link.toml"
        bob.write_text(bob.read_text().replace(str(plan.classical), f"127.0.0.1:{front}"))
        self.sites = ("fibre", "alice", "bob") if separate else ("alice", "bob")
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.clients: dict[str, Collector] = {}

    async def __aenter__(self) -> LinkLab:
        await self.proxy.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self.clients.values():
            client.task.cancel()
            await asyncio.gather(client.task, return_exceptions=True)
        for site in list(self.processes):
            await self.stop(site)
        await self.proxy.aclose()
        self.log.close()

    def file(self, site: str) -> Path:
        return self.folder / site / "link.toml"

    async def start(self, *sites: str) -> None:
        for site in sites or self.sites:
            self.processes[site] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "keysource.qkd", "run", str(self.file(site))),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=self.log,
                cwd=self.folder / site,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            )

    def attach(self, *sites: str) -> None:
        for site in sites or ("alice", "bob"):
            self.clients[site] = Collector(self.folder / site / "device.sock")

    def pid(self, site: str) -> int:
        return self.processes[site].pid

    def fibre_pid(self) -> int | None:
        """The fibre: a process of its own, or Alice's child."""
        if "fibre" in self.processes:
            return self.pid("fibre")
        alice = self.pid("alice")
        found = Path(f"/proc/{alice}/task/{alice}/children").read_text().split()
        return int(found[0]) if found else None

    async def kill(self, site: str) -> None:
        """kill -9."""
        process = self.processes.pop(site)
        process.kill()
        await process.wait()

    async def stop(self, site: str) -> int:
        """SIGTERM, as an orderly end."""
        process = self.processes.pop(site)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(10):
                return await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise

    async def eve(self, fraction: float) -> None:
        await until(lambda: (self.folder / "alice" / "eve.sock").exists())
        await ask(self.folder / "alice" / "eve.sock", {"fraction": fraction})

    async def status(self, site: str) -> dict[str, Any]:
        return await ask(self.folder / site / "link-state" / "status.sock", {})

    async def both(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Alice's and Bob's status after the same block: the next may end between the two questions."""
        async with asyncio.timeout(20):
            while True:
                a, b = await self.status("alice"), await self.status("bob")
                if a["blocks_passed"] == b["blocks_passed"]:
                    return a, b
                await asyncio.sleep(0.02)

    def common(self) -> list[int]:
        """Blocks that both clients have; those that differ fail here."""
        a, b = (self.clients[site].blocks for site in ("alice", "bob"))
        both = sorted(set(a) & set(b))
        for block in both:
            assert a[block] == b[block], f"block {block} differs"
        return both

    async def blocks(self, more: int, within: float = 40.0) -> list[int]:
        """Wait for so many blocks at both ends beyond those that any end has now."""
        newest = max([-1, *self.clients["alice"].blocks, *self.clients["bob"].blocks])
        await until(lambda: len([b for b in self.common() if b > newest]) >= more, within, self.words)
        return self.common()

    def words(self) -> str:
        """The processes' log."""
        return (self.folder / "log").read_text()[-3000:]


async def until(
    condition: Callable[[], object], within: float = 20.0, explain: Callable[[], str] = lambda: ""
) -> None:
    """Poll until it holds; fail after ``within`` seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} s: {explain()}"
        await asyncio.sleep(0.02)
