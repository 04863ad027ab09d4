"""A link of its own for a demonstration: Alice (with the fibre as her child) and Bob as processes in a temporary
folder, a client at each device socket that takes the keys, and whoever sits on the classical channel.

The pad, ports and folder are new each time, so a demonstration never touches a link that is in use.  The processes
have their own session (Ctrl-C reaches only us) and die with us, also by kill -9.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any

from keysource.base import KEY_BYTES
from keysource.device.client import DeviceClient, follow
from keysource.device.messages import AlarmEvent, BlockEvent, Event, VoidEvent
from keysource.errors import KeySourceError
from keysource.qkd.config import Address, Pace
from keysource.qkd.engine.control import ask
from keysource.qkd.engine.notebook import notes_from
from keysource.qkd.errors import LinkError
from keysource.qkd.optics.eve import Notes
from keysource.qkd.optics.monitors import Monitor
from keysource.qkd.pair import PairPlan, write_pair
from keysource.qkd.plan import Plan
from keysource.qkd.presets import PRESETS
from keysource.qkd.wiretap import Wiretap
from keysource.sockets import free_ports

_POLL = 0.05
_START = 60.0
"""Seconds for three processes to import, greet each other and say so."""
_STOP = 5.0


class Taker:
    """Takes every block at one device socket, as a tunnel would."""

    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}
        self.alarms: dict[str, str] = {}
        self.alarm_log: list[dict[str, Any]] = []
        self._next = 0

    def next_block(self) -> int:
        return self._next

    async def connected(self, device: DeviceClient) -> None:
        self.alarms.clear()

    async def event(self, device: DeviceClient, event: Event) -> None:
        match event:
            case BlockEvent(block, keys):
                self.blocks[block] = bytes(keys)
                self._next = block + 1
                await device.ack(block)
            case VoidEvent(before):
                self.blocks = {block: keys for block, keys in self.blocks.items() if block >= before}
            case AlarmEvent(active, kind, detail):
                self.alarm_log.append({"active": active, "kind": kind, "detail": detail})
                if active:
                    self.alarms[kind] = detail
                else:
                    self.alarms.pop(kind, None)

    def disconnected(self, error: KeySourceError) -> None:
        """``follow`` goes on trying."""


class Lab:
    """``async with Lab("demo") as lab``.  Raises :class:`LinkError` where a process ends by itself."""

    LIGHT = "light.sock"
    """In each site's folder: where a live link asks for its records."""

    def __init__(
        self,
        preset: str,
        *,
        pace: Pace = "fast",
        monitor: Monitor = "photocurrent",
        error_limit: float = 1e-3,
        tapped: bool = True,
        live: bool = False,
    ) -> None:
        """``tapped``: the classical channel goes through :attr:`wiretap`.  ``live``: there is no fibre; whoever runs
        this lab serves both ends' hardware at :attr:`LIGHT`."""
        self.preset, self._pace, self._monitor, self._limit = preset, pace, monitor, error_limit
        self._tapped, self._live = tapped, live
        self.wiretap: Wiretap | None = None
        self.takers = {"alice": Taker(), "bob": Taker()}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._parts = contextlib.ExitStack()
        self._next = 0
        self._early: dict[str, dict[int, dict[str, Any]]] = {"alice": {}, "bob": {}}

    @property
    def tests(self) -> bool:
        return self._monitor in ("efficiency", "both")

    def plan(self) -> Plan:
        """As both ends have it."""
        return PRESETS[self.preset].plan(tests=self.tests)

    async def __aenter__(self) -> Lab:
        try:
            await self._start()
        except BaseException:
            await self._aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._aclose()

    async def _start(self) -> None:
        self.folder = Path(self._parts.enter_context(tempfile.TemporaryDirectory(prefix="qvpn-qkd-")))
        self._log = self._parts.enter_context((self.folder / "log").open("wb"))
        classical, fibre, front = free_ports(3)
        plan = PairPlan(
            Address("127.0.0.1", classical), Address("127.0.0.1", fibre), preset=self.preset, pace=self._pace
        )
        for file in write_pair(self.folder, plan):
            text = f"{file.read_text()}error_limit = {self._limit!r}\n"
            if self._live:
                text += f'front_end = "live"\nrecords = "{self.LIGHT}"\n'
            if file.parent.name == "bob" or self.tests:  # tests are in the plan: both ends must say so
                text += f'monitor = "{self._monitor}"\n'
            if file.parent.name == "bob":
                text = text.replace(str(plan.classical), f"127.0.0.1:{front}") if self._tapped else text
            file.write_text(text)
        if self._tapped:
            self.wiretap = Wiretap(Address("127.0.0.1", front), plan.classical)
            await self.wiretap.start()
        for site, taker in self.takers.items():
            self._processes[site] = await self._spawn(site)
            path = self.folder / site / "device.sock"
            self._tasks.append(asyncio.create_task(follow(path, taker, first_wait=0.05, longest_wait=0.2)))
        await self._until_up()

    async def _spawn(self, site: str) -> asyncio.subprocess.Process:
        child = [sys.executable, "-m", "keysource.simulated.leash"]
        what = [str(os.getpid()), "keysource.qkd", "run", str(self.folder / site / "link.toml")]
        return await asyncio.create_subprocess_exec(
            *child,
            *what,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    async def _aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                try:
                    await asyncio.wait_for(process.wait(), _STOP)
                except TimeoutError:
                    process.kill()
                    await process.wait()
        if self.wiretap is not None:
            await self.wiretap.aclose()
        self._parts.close()

    async def _until_up(self) -> None:
        async def wanted() -> bool:
            with contextlib.suppress(KeySourceError):
                other = await (self.status("alice") if self._live else self.fibre({}))
                return bool(other["preset"]) and bool(await self.status("bob"))
            return False

        await self._poll(wanted, _START, "the link's processes did not start")

    async def _poll(self, wanted: Callable[[], Any], patience: float, failed: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        while not await wanted():
            for site, process in self._processes.items():
                if process.returncode is not None:
                    raise LinkError(f"{site}'s process ended by itself: {self._last_words()}")
            if loop.time() > deadline:
                raise LinkError(f"{failed} within {patience:.0f} s: {self._last_words()}")
            await asyncio.sleep(_POLL)

    def _last_words(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    # What the processes say

    def pids(self) -> dict[str, int]:
        """Of the two ends' processes."""
        return {site: process.pid for site, process in self._processes.items()}

    async def status(self, site: str) -> dict[str, Any]:
        return await ask(self.folder / site / "link-state" / "status.sock", {})

    async def fibre(self, request: dict[str, Any]) -> dict[str, Any]:
        """Eve's socket: order her, or read what the fibre says."""
        return await ask(self.folder / "alice" / "eve.sock", request)

    async def notes(self, block: int) -> Notes | None:
        """What Eve noted of one of the last few blocks."""
        return notes_from(await self.fibre({"notes": block}))

    async def next_block(self) -> int:
        """The first block whose pulses have not begun to fly."""
        return int((await self.status("alice"))["next_block"]) + 1  # one may fly before its turn (engine.ahead)

    async def reports(
        self, patience: float, tick: Callable[[], Any] | None = None, since: int = 0
    ) -> dict[str, dict[str, Any]]:
        """What both ends saw of the next block, not before ``since``, that either finishes: ``{"alice": report,
        "bob": report}``; an end that lost the block in a broken connection may have no report of it.  ``tick`` is
        awaited at every look."""
        self._next = max(self._next, since)

        async def wanted() -> bool:
            if tick is not None:
                await tick()
            for site, early in self._early.items():
                with contextlib.suppress(KeySourceError):
                    path = self.folder / site / "link-state" / "status.sock"
                    for each in (await ask(path, {"since": self._next}))["blocks"]:
                        early[each["block"]] = each
            known = [block for early in self._early.values() for block in early if block >= self._next]
            if not known:
                return False
            first, newest = min(known), max(known)
            return all(first in early for early in self._early.values()) or newest > first

        await self._poll(wanted, patience, "no block ended")
        first = min(block for early in self._early.values() for block in early if block >= self._next)
        self._next = first + 1
        return {site: early[first] for site, early in self._early.items() if first in early}

    async def keys(self, block: int) -> dict[str, list[bytes]]:
        """What each client was handed of a block that passed, waited for a moment."""

        async def wanted() -> bool:
            return all(block in taker.blocks for taker in self.takers.values())

        with contextlib.suppress(LinkError):
            await self._poll(wanted, 5.0, "keys did not arrive")
        return {site: _split(taker.blocks.get(block, b"")) for site, taker in self.takers.items()}


def interrupted(work: Coroutine[Any, Any, None]) -> bool:
    """Run it to its end, or to an orderly end (processes stopped, folder removed) by Ctrl-C or SIGTERM: True."""

    async def stoppable() -> None:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    try:
        asyncio.run(stoppable())
    except (KeyboardInterrupt, asyncio.CancelledError):
        return True
    return False


def _split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
