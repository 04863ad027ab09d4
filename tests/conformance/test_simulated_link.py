"""``simulated`` with the real link: both ends' sources start ``qvpn-qkd run`` as a child, over loopback."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from keysource.base import Origin, SourceContext
from keysource.errors import KeySourceError
from keysource.qkd.pad import DEFAULT_PAD_BYTES, make_pad
from keysource.simulated.source import SimulatedSource
from tests.ports import free_port


@asynccontextmanager
async def link(folder: Path) -> AsyncIterator[tuple[SimulatedSource, SimulatedSource]]:
    pad, classical, fibre = make_pad(DEFAULT_PAD_BYTES), f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    sources = []
    for role, address in (("left", "listen"), ("right", "peer")):
        site = folder / role
        site.mkdir(mode=0o700)
        (site / "auth.pad").write_bytes(pad)
        (site / "auth.pad").chmod(0o600)
        table = {"role": role, address: classical, "fibre": fibre, "auth_key": "auth.pad"}
        sources.append(SimulatedSource(table, SourceContext("qkd", site, site, role)))
    try:
        for source in sources:
            await source.start()
        yield sources[0], sources[1]
    finally:
        for source in sources:
            await source.aclose()


async def draw_at_both(a: SimulatedSource, b: SimulatedSource, keys: int) -> set[str]:
    """Draw at a, fetch at b; key_IDs of the pairs that agree."""
    seen: set[str] = set()
    async with asyncio.timeout(50):
        while len(seen) < keys:
            try:
                key = await a.get_key("x")
                copy = await b.get_key_with_id("x", key.key_id)
            except KeySourceError:
                await asyncio.sleep(0.1)
                continue
            assert (copy.material, copy.origin) == (key.material, Origin.SIMULATED)
            seen.add(key.key_id)
    return seen


@pytest.mark.timeout(150)
async def test_keys_of_the_real_link_and_again_after_its_end_was_killed(tmp_path: Path) -> None:
    async with link(tmp_path) as (a, b):
        before = await draw_at_both(a, b, 10)
        status = await a.status("x")
        assert status.origin is Origin.SIMULATED
        assert status.qber is not None and 0 < status.qber < 0.05
        assert status.key_rate is not None and status.key_rate > 0
        killed = b.child_pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        after = await draw_at_both(a, b, 60)  # more than could have been in stock
        assert not before & after
        assert b.child_pid not in (None, killed)
