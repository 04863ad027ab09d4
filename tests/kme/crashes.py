"""kill -9 of real KMEs at a named point of an exchange, as the files ``test_kme_crash*`` do it in turns.

A book keeps every key that anybody was given, over all of a file: never a key to two masters, never twice to one
slave, never two keys under one ID or one under two.  What a crash costs is counted, and is at most what the exchange
under way had reserved.  Epochs turn every second meanwhile.  The points are spread over several files, as a file is
what one worker of the test run takes at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from keysource.kme import crashpoints
from tests.kme.network import SITES, Network
from tests.kme.places import PostgresPlace

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
KILLS = 50 if LONG else 3
TIMEOUT = 120 + 20 * KILLS
POSTGRES_KILLS = 50 if LONG else 1
POSTGRES_TIMEOUT = 1500 if LONG else 140
SIZE = 384  # two units a key
NUMBER = 2
LIMITS = "[limits]\nkey_epoch = 1\nmax_key_count = 10000\n"
# Which KME dies, and the units of each link (bob's, carol's) that the exchange under way may cost.
EXCHANGES = {
    "block": ("alice", 0, 0),
    "enc": ("alice", 4, 0),
    "multicast": ("alice", 4, 6),
    "epoch": ("alice", 0, 0),
    "reserve": ("bob", 4, 0),
    "dec": ("bob", 0, 0),
    "deposit": ("carol", 4, 6),
    "withdraw": ("carol", 4, 6),
}
# Each exchange is in one of these, and each of these in one file: about as many points in each.
MASTERS = ("block", "enc")
SLAVES = ("reserve", "dec", "deposit")
SEVERAL = ("multicast", "withdraw", "epoch")
SURVIVES_IN_STORE = {"dec.asked", "dec.in-transaction"}


def points(*exchanges: str) -> list[str]:
    """All points of these exchanges."""
    return [point for point in crashpoints.POINTS if point.partition(".")[0] in exchanges]


# In the short run on PostgreSQL: inside and right after the transactions that matter, once.
_SHORT_WITH_POSTGRES = {
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
    "epoch.half-destroyed",
}


def points_with_postgres(*exchanges: str) -> list[str]:
    """The same where the keys are in a database."""
    return [point for point in points(*exchanges) if LONG or point in _SHORT_WITH_POSTGRES]


@contextlib.asynccontextmanager
async def a_network(**options) -> AsyncIterator[Network]:
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        network = Network(Path(folder), **{"limits": LIMITS, **options})
        try:
            await network.start(keys=300)
            yield network
        finally:
            await network.aclose()


@contextlib.asynccontextmanager
async def a_network_with_postgres(cluster) -> AsyncIterator[Network]:
    place = PostgresPlace(cluster)
    databases = {site: place.server(site).conninfo for site in SITES}
    async with a_network(limits="require_standby = false\n" + LIMITS, databases=databases) as network:
        yield network


async def killed_at(network, point, kills, *, late=False):
    """The victim dies there that often, and nothing is wrong after each time.

    ``late``: what a crash cost may come to light in a later exchange, since a store that several use passes over
    units that another connection has locked; the sum of all costs is held then.
    """
    victim, *costs = EXCHANGES[point.partition(".")[0]]
    for _ in range(kills):
        before = await stock(network)
        attempts, drawn = await provoke(network, point, victim)
        network.serve(victim)
        await network.ready(victim)
        await network.stored()
        if drawn is not None:  # what bob's KME was killed over: there for its slave, or gone, never both
            status, _keys = await network.fetch("sae-bob", drawn)
            assert status == (200 if point in SURVIVES_IN_STORE else 400)
        after = await stock(network)
        for other, cost in zip(("bob", "carol"), costs, strict=True):
            lost = before[other] - after[other]
            network.owed[other] = (network.owed[other] if late else 0) + cost * attempts
            assert lost <= network.owed[other], f"{lost} units to {other} lost in {attempts} exchanges of {cost}"
            network.owed[other] -= max(lost, 0)
        await all_is_well(network)


async def stock(network):
    """Units of each link that are neither free at alice's KME nor accounted for by a key that its master has."""
    await refill(network)
    return {other: network.link("alice", other)["own_free"] + network.spent[other] for other in ("bob", "carol")}


async def refill(network):
    if min(network.link("alice", other)["own_free"] for other in ("bob", "carol")) < 60:
        count = 300
        await network.publish(count)
        for other in ("bob", "carol"):
            network.spent[other] -= count


async def draw(network, slaves):
    """Keys for these slaves, and in the accounts what the master has got."""
    status, keys = await network.draw(slaves, number=NUMBER, size=SIZE)
    return status, account(network, slaves, keys)


async def must_draw(network, slaves):
    return list(account(network, slaves, await network.draw_by_all_means(slaves, number=NUMBER, size=SIZE)))


def account(network, slaves, keys):
    network.spent["bob"] += 2 * len(keys)
    if "sae-carol" in slaves:
        network.spent["carol"] += 3 * len(keys)
    return keys


async def provoke(network, point, victim):
    """Have the point reached and the victim killed.  Returns how often it was tried, and the key_IDs of a fetch."""
    kind = point.partition(".")[0]
    keys = await must_draw(network, ("sae-bob",)) if kind == "dec" else None
    await network.stop(victim, signal.SIGKILL)
    network.serve(victim, crash_at=point)
    attempts = 0
    if kind != "epoch":  # those come as soon as it runs
        await network.ready(victim)
    if kind == "withdraw":
        network.devices["bob", "alice"].alarm(True, "qber", "test")
        await network.until(lambda: bool(network.link("bob", "alice")["alarm"]), "the alarm")
    while network.ended(victim) is None:
        attempts += 1
        await exchange(network, kind, keys)
        await network.until_ended(victim, 1.0)
        assert attempts < 10, "the point is not reached"
    assert network.ends[victim] == signal.SIGKILL
    network.devices["bob", "alice"].alarm(False, "qber", "")
    return attempts, keys


async def exchange(network, kind, keys):
    match kind:
        case "epoch":
            await asyncio.sleep(0.1)
        case "block":
            network.deliver(8)
            for other in ("bob", "carol"):
                network.spent[other] -= 8
        case "dec":
            await network.fetch("sae-bob", keys)
        case "withdraw":
            assert (await draw(network, ("sae-bob", "sae-carol")))[0] == 503
        case "multicast" | "deposit":
            await draw(network, ("sae-bob", "sae-carol"))
        case _:
            await draw(network, ("sae-bob",))


async def all_is_well(network):
    """The other KMEs and the one that came back: a key for all slaves goes through, and comes out once."""
    await network.until(lambda: not network.link("bob", "alice")["alarm"], "no alarm")
    keys = await must_draw(network, ("sae-bob", "sae-carol"))
    for slave in ("sae-bob", "sae-carol"):
        assert (await network.fetch(slave, keys))[0] == 200
        assert (await network.fetch(slave, keys))[0] == 400
