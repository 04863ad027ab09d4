"""kill -9 of KMEs that have their keys in PostgreSQL: the same points, the same book, as with SQLite files.

Here it is the server that rolls back what a dead process had begun.  In the short run the points inside and right
after the transactions that matter kill once; in the long run all points, 50 times.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.kme import crashpoints
from tests.kme.network import SITES, Network
from tests.kme.places import PostgresPlace
from tests.kme.test_kme_crash import MIGRATE, killed_at

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
NOT_HERE = {*MIGRATE, "epoch.half-destroyed"}  # those are matters of files
SHORT = {
    "block.in-transaction",
    "enc.in-transaction",
    "enc.committed",
    "reserve.in-transaction",
    "reserve.committed",
    "dec.in-transaction",
    "dec.committed",
    "multicast.taken",
    "deposit.in-transaction",
    "epoch.in-rewrap",
}
POINTS = [point for point in crashpoints.POINTS if point not in NOT_HERE and (LONG or point in SHORT)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def network(postgres):
    place = PostgresPlace(postgres)
    databases = {site: place.server(site).conninfo for site in SITES}
    limits = "require_standby = false\n[limits]\nkey_epoch = 1\nmax_key_count = 10000\n"
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        network = Network(Path(folder), limits=limits, databases=databases)
        try:
            await network.start(keys=300)
            yield network
        finally:
            await network.aclose()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(1500 if LONG else 140)
@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_with_postgres(network, point):
    await killed_at(network, point, 50 if LONG else 1, late=True)
