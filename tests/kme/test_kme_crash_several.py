"""kill -9 of real KMEs while one key goes to several, is withdrawn, or keys are wrapped anew: see ``crashes``."""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.kme import crashes


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def network():
    async with crashes.a_network() as network:
        yield network


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(crashes.TIMEOUT)
@pytest.mark.parametrize("point", crashes.points(*crashes.SEVERAL))
async def test_killed_at(network, point):
    await crashes.killed_at(network, point, crashes.KILLS)
