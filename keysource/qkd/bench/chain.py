"""The whole post-processing of a link in real processes, from sifting to keys in clients' hands, for a while.

Alice and Bob run as they always do, with a device at a socket for hardware (``front_end = "live"``).  The device is
this process: it hands out one and the same flight of the preset ``tabletop`` for every block, because on two cores
nature would need more than what the link has.  So the keys are nobody's, as with every simulated fibre.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keysource.device.server import bind_private
from keysource.qkd.errors import LinkError
from keysource.qkd.lab import Lab
from keysource.qkd.presets import PRESETS
from keysource.qkd.recorder import record_block
from keysource.qkd.simulate import Tally, run_link

PRESET = "tabletop"
_QUESTION = 20
_START = 120.0
_LIMIT = 0.9
"""Of the errors of all blocks together: nobody uses these keys."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Millions of bits a second of wall clock, over ``seconds``."""

    seconds: float
    blocks: int
    failed: int
    detected: float
    sifted: float
    secret: float
    alice_load: float
    """CPU seconds per second."""
    bob_load: float


@dataclass(frozen=True, slots=True)
class Slowness:
    """Of a link whose light is simulated as well."""

    preset: str
    blocks: int
    seconds: float
    """Of ours, for one of the link's own."""
    sifted: float
    """Millions of bits a second, here."""


def chain(seconds: float) -> Chain:
    """Raises :class:`LinkError`."""
    return asyncio.run(_chain(seconds))


def slowness(preset: str, blocks: int) -> Slowness:
    """A link of three processes for some blocks.  Raises :class:`LinkError`."""
    tally = Tally(PRESETS[preset], "fast")
    asyncio.run(run_link(tally, blocks, "photocurrent", "calm", quiet=True))
    sifted = (tally.ledger.raw - tally.ledger.discarded) / tally.seconds / 1e6
    return Slowness(preset, len(tally.blocks), tally.seconds / tally.link_seconds(), sifted)


async def _chain(seconds: float) -> Chain:
    records = await asyncio.to_thread(record_block, PRESETS[PRESET])
    async with Lab(PRESET, error_limit=_LIMIT, tapped=False, live=True) as lab, _device(lab.folder, records):
        await _passed(lab, 2, _START)
        first, began, used = await lab.status("bob"), _now(), _used(lab)
        await asyncio.sleep(seconds)
        last, ended, spent = await lab.status("bob"), _now(), _used(lab)
        keys = [taker.blocks for taker in lab.takers.values()]
        if any(keys[0][block] != keys[1][block] for block in keys[0].keys() & keys[1].keys()):
            raise LinkError("the two ends' keys differ: a mistake; please report it")
    span = ended - began
    gained = {column: last["ledger"][column] - first["ledger"][column] for column in last["ledger"]}
    loads = [(spent[site] - used[site]) / span for site in ("alice", "bob")]
    sifted = gained["raw"] - gained["discarded"]
    rates = [count / span / 1e6 for count in (gained["raw"], sifted, gained["delivered"])]
    passed, failed = (last[name] - first[name] for name in ("blocks_passed", "blocks_failed"))
    return Chain(span, passed, failed, *rates, *loads)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _used(lab: Lab) -> dict[str, float]:
    """CPU seconds of each end's process so far (proc(5), stat)."""
    used = {}
    for site, number in lab.pids().items():
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        used[site] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


async def _passed(lab: Lab, blocks: int, patience: float) -> None:
    status: dict[str, Any] = {}
    try:
        async with asyncio.timeout(patience):
            while status.get("blocks_passed", 0) < blocks:
                await asyncio.sleep(0.1)
                status = await lab.status("bob")
    except TimeoutError:
        raise LinkError(f"{blocks} blocks did not pass within {patience:.0f} s: {status.get('reason')}") from None


@asynccontextmanager
async def _device(folder: Path, records: tuple[bytes, bytes]) -> AsyncIterator[None]:
    """Both sites' hardware, at the sockets where the ends look for it."""
    servers = []
    for site, record in zip(("alice", "bob"), records, strict=True):

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytes = record) -> None:
            try:
                await reader.readexactly(_QUESTION)
                writer.write(len(record).to_bytes(4, "big") + record)
                await writer.drain()
            except (OSError, asyncio.IncompleteReadError):
                pass  # that end has stopped
            finally:
                writer.close()

        path = folder / site / Lab.LIGHT
        servers.append(await asyncio.start_unix_server(answer, sock=bind_private(path)))
    try:
        yield
    finally:
        for server in servers:
            server.close()
