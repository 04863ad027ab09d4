"""The scene of the demo: what is written, what is started, and that all of it ends.

::

                north                 west and east are the ends, each with a KME; the others are trusted nodes.
              /   |   \\               The link west-north is the simulated QKD link, whole: Alice, Bob and a fibre
          west - middle - east         with an eavesdropper's switch.  The other links are stand-ins: the demo hands
              \\   |   /                random numbers to both ends, as a pair of devices would.
                south
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keysource import tls
from keysource.base import End, Origin, Owner
from keysource.device.messages import DeviceInfo
from keysource.device.server import DeviceServer
from keysource.etsi014.client import Etsi014Client
from keysource.kme.control import ControlError, ask
from keysource.kme.scaffold import SitePlan, write_pair
from keysource.network.demo.measures import processes_naming
from keysource.network.scaffold import write_nodes
from keysource.qkd.engine.control import ask as ask_fibre
from keysource.qkd.pair import PairPlan
from keysource.qkd.pair import write_pair as write_link
from keysource.settings import Address
from keysource.sockets import free_ports

NODES = ("west", "north", "middle", "south", "east")
ENDS = ("west", "east")
REAL = "west-north"
LINKS = (
    REAL,
    "north-east",
    "west-middle",
    "middle-east",
    "west-south",
    "south-east",
    "north-middle",
    "middle-south",
)
CONNECTION = "west-east"
_UNITS, _EVERY = 24, 0.5
_PATIENCE = 4.0
_SAE_PATIENCE = 8.0
"""A fetch that is given up on a busy machine would look like a key that only one end has."""
_LAST_CHANCE = 3.0
"""Seconds in which what the processes themselves started must have ended too."""
SCENE = "QVPN_DEMO_SCENE"
"""What every process of the demo, and whatever it starts, has in its environment: the scene's folder."""


class DemoFailed(Exception):
    """Something of the scene does not work here; one sentence."""


@dataclass(slots=True)
class StandIn:
    """A link without optics: two device sockets, the same random numbers at both."""

    name: str
    ends: list[DeviceServer]
    block: int = 0
    cut: bool = False

    def feed(self) -> None:
        if not self.cut and all(end.room() >= _UNITS for end in self.ends):
            keys = secrets.token_bytes(32 * _UNITS)
            for end in self.ends:
                end.publish(self.block, keys)
            self.block += 1


@dataclass(slots=True)
class World:
    """See the module.  An async context manager."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="qn-")))
    standins: dict[str, StandIn] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stragglers: dict[int, str] = field(default_factory=dict)
    """Processes that had to be killed when all should have ended."""
    _files: dict[str, Path] = field(default_factory=dict)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> World:
        try:
            ports = free_ports(len(NODES) + 4)
            self._write(ports)
            for name in LINKS:
                if name != REAL:
                    await self._stand_in(name)
            self._start_all()
        except BaseException:
            await self.__aexit__()
            raise
        self._tasks.append(asyncio.create_task(self._feed()))
        return self

    async def __aexit__(self, *_exception: object) -> None:
        """Everything ends, also when the demo was interrupted half-way, or at its end."""
        ending, interrupted = asyncio.create_task(self._end()), False
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                interrupted = True
        ending.result()
        if interrupted:
            raise asyncio.CancelledError

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(self._reap)
        self.stragglers = await self._left_running()
        for pid in self.stragglers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for standin in self.standins.values():
            for end in standin.ends:
                await end.aclose()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _left_running(self) -> dict[int, str]:
        loop = asyncio.get_running_loop()
        end = loop.time() + _LAST_CHANCE
        while True:
            if not (found := self.found()) or loop.time() >= end:
                return found
            await asyncio.sleep(0.05)

    def found(self) -> dict[int, str]:
        """Every process of the scene that runs now, whoever started it: looked for in /proc."""
        return processes_naming(str(self.folder))

    def left(self) -> list[str]:
        """What is left of the scene after its end: processes, those that had to be killed, files."""
        processes = {**self.stragglers, **self.found()}
        found = [f"process {pid}: {command[:200]}" for pid, command in processes.items()]
        return [*found, str(self.folder)] if self.folder.exists() else found

    # What is asked of it

    def node(self, name: str) -> dict[str, Any]:
        """A node's own account.  Raises :class:`DemoFailed`."""
        try:
            return ask(self.folder / name / "state" / "control.sock", {"op": "status"})
        except ControlError as error:
            raise DemoFailed(f"node {name}: {error}") from None

    def order(self, name: str, misdeed: str) -> None:
        """Have a node that was started as a corrupt one misbehave."""
        ask(self.folder / name / "state" / "control.sock", {"op": "fault", "name": misdeed})

    async def cut(self, name: str) -> None:
        """Both devices of a link are gone."""
        standin = self.standins[name]
        standin.cut = True
        for end in standin.ends:
            await end.aclose()

    async def mend(self, name: str) -> None:
        await self._stand_in(name)

    async def eve(self, *, present: bool) -> None:
        """In the fibre of the one link that has optics; nobody else is told."""
        request = {"attack": "intercept-resend" if present else "none", "fraction": 1.0, "mode": "cw"}
        await ask_fibre(self.folder / "link" / "alice" / "eve.sock", request)

    def logged(self, name: str, *events: str) -> list[dict[str, Any]]:
        """Lines of a node's log, of these kinds, in order."""
        found = []
        for line in self._log(name).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") in events:
                    found.append(entry)
        return found

    def copies(self, name: str) -> list[dict[str, Any]]:
        """What a corrupt node wrote down."""
        file = self.folder / f"{name}.copies"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def sae(self, site: str) -> Etsi014Client:
        """A client of that site's KME, with the SAE's certificate."""
        pki = self.folder / "kme" / site / "pki"
        files = ("ca.crt", f"sae-{site}.crt", f"sae-{site}.key")
        context = tls.client_context(*((pki / name).read_bytes() for name in files))
        return Etsi014Client(self._urls[site], context, timeout=_SAE_PATIENCE, keep_alive=True)

    def kme(self, site: str) -> dict[str, Any]:
        """A KME's own account."""
        return ask(self.folder / "kme" / site / "kme-state" / "control.sock", {"op": "status"})

    def check(self) -> None:
        """Raises :class:`DemoFailed` where a process has ended by itself."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                words = self._log(name).read_text(errors="replace").strip().splitlines()[-1:]
                raise DemoFailed(f"{name} ended with {process.returncode}: {' '.join(words)[:200]}")

    # Files

    _urls: dict[str, str] = field(default_factory=dict)

    def _write(self, ports: Sequence[int]) -> None:
        lines = ["version = 1"]
        for name, port in zip(NODES, ports, strict=False):
            lines += ["[[node]]", f'id = "{name}"', f'url = "https://127.0.0.1:{port}"']
        for name in LINKS:
            left, _, right = name.partition("-")
            lines += ["[[link]]", f'name = "{name}"', f'ends = ["{left}", "{right}"]', 'origin = "simulated"']
        lines += ["[[connection]]", f'name = "{CONNECTION}"', f'ends = ["{ENDS[0]}", "{ENDS[1]}"]']
        lines += ["paths = 2", "max_hops = 2", "block_keys = 8", "keys_per_second = 16"]
        (self.folder / "network.toml").write_text("\n".join(lines) + "\n")
        self._files = write_nodes(self.folder, self.folder / "network.toml")
        sites = [
            SitePlan(site, "127.0.0.1", ports[-4 + 2 * i], ports[-3 + 2 * i], device=str(self._relayed(site)))
            for i, site in enumerate(ENDS)
        ]
        for site, file in zip(sites, write_pair(self.folder / "kme", sites[0], sites[1]), strict=True):
            self._files[f"kme-{site.name}"] = file
            self._urls[site.name] = site.url
        self._write_link()

    def _write_link(self) -> None:
        classical = Address("127.0.0.1", _free_pair())
        plan = PairPlan(classical, classical.next_port(), name=REAL)
        left, _, right = REAL.partition("-")
        for node, file in zip((left, right), write_link(self.folder / "link", plan), strict=True):
            device = self.folder / node / "links" / f"{REAL}.sock"
            text = file.read_text()
            file.write_text(text.replace('socket = "device.sock"', f'socket = "{device}"'))
            self._files[file.parent.name] = file

    def _relayed(self, site: str) -> Path:
        return self.folder / site / "relayed" / f"{CONNECTION}.sock"

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    # Processes

    def _start_all(self) -> None:
        for name, file in self._files.items():
            if name in NODES:
                copies = ["--copies", str(self.folder / f"{name}.copies")] if name == "south" else []
                self._start(name, "keysource.network", "network", "serve", str(file), *copies)
            elif name.startswith("kme-"):
                self._start(name, "keysource.network", "serve", str(file))
            else:
                self._start(name, "keysource.qkd", "run", str(file))

    def _start(self, name: str, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "keysource.simulated.leash", str(os.getpid()), module, *arguments]
        with self._log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, SCENE: str(self.folder)},
                start_new_session=True,
            )

    def _reap(self) -> None:
        for process in self.processes.values():
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # Links without optics

    async def _stand_in(self, name: str) -> None:
        known = self.standins.get(name)
        first = known.block if known else 0
        ends = []
        for end, node in zip((End.A, End.B), name.split("-"), strict=True):
            info = DeviceInfo("stand-in", name, end, Owner.ALTERNATE, Origin.SIMULATED)
            path = self.folder / node / "links" / f"{name}.sock"
            device = DeviceServer(path, info, next_block=first)
            device.set_status("up")
            await device.start()
            ends.append(device)
        self.standins[name] = StandIn(name, ends, first)

    async def _feed(self) -> None:
        while True:
            for standin in self.standins.values():
                standin.feed()
            await asyncio.sleep(_EVERY)


def _free_pair() -> int:
    """A port that is free together with the next one.  Raises :class:`DemoFailed`."""
    for _ in range(50):
        (port,) = free_ports(1)
        with contextlib.suppress(OSError, OverflowError), socket.socket() as second:
            second.bind(("127.0.0.1", port + 1))
            return port
    raise DemoFailed("no two free ports beside each other on 127.0.0.1")
