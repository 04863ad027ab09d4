"""kill -9 of KMEs that have their keys in PostgreSQL: the same points, the same book, as with SQLite files.

Slaves' side.
"""

from __future__ import annotations

import pytest
import pytest_asyncio

from tests.kme import crashes


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def network(postgres):
    async with crashes.a_network_with_postgres(postgres) as network:
        yield network


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(crashes.POSTGRES_TIMEOUT)
@pytest.mark.parametrize("point", crashes.points_with_postgres(*crashes.SLAVES))
async def test_killed_at_with_postgres(network, point):
    await crashes.killed_at(network, point, crashes.POSTGRES_KILLS, late=True)
