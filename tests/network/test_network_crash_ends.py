"""kill -9 of real nodes at every named point at which the two ends decide about a block, and hand it out.

Each block is at both ends and equal, or at none; no unit is ever in two messages; it goes on.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.network.crashing import ENDS, a_world, killed_again_and_again
from tests.network.world import World


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with a_world() as world:
        yield world


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", ENDS)
async def test_killed_at(world: World, point: str) -> None:
    await killed_again_and_again(world, point, ENDS[point])


@pytest.mark.asyncio(loop_scope="module")
async def test_a_key_that_passed_in_clear_or_a_pad_that_came_twice_would_be_seen(world: World) -> None:
    """The checks of these files, where what they look for is there."""
    await world.settled()
    world.check()
    assert world.read and world.masked
    block, event = next(iter(world.received["a"].items()))
    copies = world._copies("b")
    with copies.open("a") as file:
        file.write('{"kind": "share", "bytes": "' + _base64(b"x" * 7 + bytes(event.keys)) + '"}\n')
    with pytest.raises(AssertionError, match="in clear"):
        world.check()
    unit = next(iter(world.masked))
    header = {"link": "a-b", "path": ["a", "b", "c"], "hop": 0, "pad": [unit], "mac": unit}
    forged = json.dumps({"kind": "masked", "header": header, "bytes": "AAAA"}) + "\n"
    with copies.open("a") as file:
        file.write(forged)
    with pytest.raises(AssertionError, match="two messages"):
        world.check()
    world.received["c"][block] = event
    kept, world.received["a"][block] = event, world.received["a"][max(world.received["a"])]
    with pytest.raises(AssertionError):
        world.check()
    world.received["a"][block] = kept


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
