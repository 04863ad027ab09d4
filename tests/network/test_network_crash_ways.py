"""kill -9 of real nodes at every named point on a share's way.

Each block is at both ends and equal, or at none; no unit is ever in two messages; it goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.network import crashes
from tests.network.crashing import ENDS, WAYS, a_world, killed_again_and_again
from tests.network.world import World


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[World]:
    async with a_world() as world:
        yield world


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", WAYS)
async def test_killed_at(world: World, point: str) -> None:
    await killed_again_and_again(world, point, WAYS[point])


def test_every_point_is_somewhere_and_stands_in_the_code() -> None:
    folder = Path(crashes.__file__).parent
    code = "".join(path.read_text() for path in folder.glob("*.py") if path.stem != "crashes")
    assert {*WAYS, *ENDS, "migrate.in-transaction"} == set(crashes.POINTS)
    assert all(code.count(f'crashes.at("{point}")') == 1 for point in crashes.POINTS)
