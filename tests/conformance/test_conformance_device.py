"""The conformance suite over ``device`` and two real hardware daemons, fed by a courier; an outage is kill -9."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from keysource.base import KeySource, SourceContext
from keysource.conformance import CHECKS, DISTURBANCES, Check, Pair, concurrent_draws_share_no_key
from keysource.device.hardware import HardwareSource

TOTAL_DRAWS = 10_000 if os.environ.get("QVPN_TEST_LONG") else 1_000
FILE = """
version = 1
[device]
name = "courier"
link = "left-right"
end = "{end}"
origin = "couriered"
socket = "d.sock"
[driver]
type = "courier"
path = "in"
"""


class Daemon:
    """One site's ``python -m keysource.device serve``."""

    def __init__(self, folder: Path, end: str) -> None:
        self.folder = folder / end
        (self.folder / "in").mkdir(parents=True)
        (self.folder / "state").mkdir(mode=0o700)
        (self.folder / "device.toml").write_text(FILE.format(end=end))

    def start(self) -> None:
        command = [sys.executable, "-m", "keysource.device", "serve", str(self.folder / "device.toml")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def deliver(self, number: int, keys: bytes) -> None:
        new = self.folder / "in" / f"{number}.part"
        new.write_bytes(keys)
        new.chmod(0o600)
        new.rename(self.folder / "in" / f"{number}.key")

    def source(self) -> HardwareSource:
        context = SourceContext("qkd", self.folder, self.folder / "state", self.folder.name)
        return HardwareSource({"socket": "d.sock", "end": self.folder.name, "origin": "couriered"}, context)


@asynccontextmanager
async def device_pair(folder: Path) -> AsyncIterator[Pair]:
    daemons = {end: Daemon(folder, end) for end in "ab"}
    courier = asyncio.create_task(carry(list(daemons.values())))
    sources: dict[str, KeySource] = {}

    async def restart(old: KeySource) -> KeySource:
        end = next(end for end, source in sources.items() if source is old)
        await old.aclose()
        sources[end] = daemons[end].source()
        await sources[end].start()
        return sources[end]

    async def outage(down: bool) -> None:
        for daemon in daemons.values():
            if down:
                daemon.kill()
            else:
                daemon.start()

    try:
        for end, daemon in daemons.items():
            daemon.start()
            sources[end] = daemon.source()
            await sources[end].start()
        yield Pair(sources["a"], sources["b"], restart=restart, outage=outage)
    finally:
        courier.cancel()
        for source in sources.values():
            await source.aclose()
        for daemon in daemons.values():
            daemon.kill()


async def carry(daemons: list[Daemon]) -> None:
    """The same file to both sites, again and again, a few in advance."""
    for number in range(1, 100_000):
        keys = os.urandom(32 * 512)
        while any(len(list((daemon.folder / "in").iterdir())) > 3 for daemon in daemons):
            await asyncio.sleep(0.02)
        for daemon in daemons:
            daemon.deliver(number, keys)


@pytest.mark.parametrize("check", (*CHECKS, *DISTURBANCES), ids=lambda check: check.__name__)
async def test_device_conforms(check: Check, tmp_path: Path) -> None:
    await check(partial(device_pair, tmp_path))


@pytest.mark.timeout(600)
async def test_many_draws_from_both_sides_at_once(tmp_path: Path) -> None:
    await concurrent_draws_share_no_key(partial(device_pair, tmp_path), TOTAL_DRAWS)
