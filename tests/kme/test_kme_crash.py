"""kill -9 of real KMEs at every named point of every exchange.

Each point kills its KME three times (50 in the long run).  A book keeps every key that anybody was given, over all of
it: never a key to two masters, never twice to one slave, never two keys under one ID or one under two.  What a crash
costs is counted, and is at most what the exchange under way had reserved.  Epochs turn every second meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.base import End, Origin, Owner
from keysource.kme import crashpoints
from keysource.kme.records import LinkRow, Offer, Terms
from keysource.kme.store import Store
from tests.kme.network import Network
from tests.kme.test_kme_vault import TOKEN, material, old_store, unit

KILLS = 50 if os.environ.get("QVPN_TEST_LONG") == "1" else 3
SIZE = 384  # two units a key
NUMBER = 2
MIGRATE = [point for point in crashpoints.POINTS if point.startswith("migrate.")]
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
SURVIVES_IN_STORE = {"dec.asked", "dec.in-transaction"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def network():
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        network = Network(Path(folder), limits="[limits]\nkey_epoch = 1\nmax_key_count = 10000\n")
        try:
            await network.start(keys=300)
            yield network
        finally:
            await network.aclose()


def test_every_point_belongs_to_an_exchange_and_stands_in_the_code():
    folder = Path(crashpoints.__file__).parent
    code = "".join(path.read_text() for path in folder.glob("*.py") if path.stem != "crashpoints")
    code += ' "enc.answered" "dec.answered" '  # made of the path's last part
    assert {point.partition(".")[0] for point in crashpoints.POINTS} == {*EXCHANGES, "migrate"}
    assert all(f'"{point}"' in code for point in crashpoints.POINTS)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(120 + 20 * KILLS)
@pytest.mark.parametrize("point", [point for point in crashpoints.POINTS if point not in MIGRATE])
async def test_killed_at(network, point):
    await killed_at(network, point, KILLS)


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


# A store of an older release, killed while it is brought up to date

_OPEN = """
import sys
from pathlib import Path
from keysource.kme import crashpoints
from keysource.kme.store import Store
crashpoints.arm_from_environment()
Store(Path(sys.argv[1]), "kme", max_keys=1000).close()
"""


@pytest.mark.parametrize("point", MIGRATE)
def test_killed_while_a_store_is_brought_up_to_date(tmp_path, point):
    for kill in range(min(KILLS, 5)):
        home = tmp_path / str(kill)
        home.mkdir(mode=0o700)
        old_store(home)
        environment = os.environ | {crashpoints.VARIABLE: point}
        command = [sys.executable, "-c", _OPEN, str(home / "kme.sqlite")]
        died = subprocess.run(command, env=environment, check=False, capture_output=True)
        assert died.returncode == -9, died.stderr
        with contextlib.closing(Store(home / "kme.sqlite", "kme", max_keys=1000)) as store:
            store.bind_link(LinkRow("other", "link", End.B, Owner.A, Origin.QKD, 0))
            [key] = store.fetch("sae-a", "sae-b", [unit(3).key_id])
            assert bytes(key.material) == material(0, 3)
            offer = Offer(*unit(0), TOKEN)
            assert store.reserve("other", Terms("sae-a", ("sae-b",)), [offer], 1.0).missing == []
            assert bytes(store.fetch("sae-a", "sae-b", [offer.key_id])[0].material) == material(0, 0)
            files = {file.name: file.read_bytes() for file in home.iterdir()}
        assert not [name for name, content in files.items() if material(0, 1) in content]


# The hook itself


def test_an_unknown_point_is_refused_and_none_is_the_rule():
    for order in ("nonsense", "enc.asked:x", "enc.asked:0"):
        with pytest.raises(ValueError, match=r"no such crash point"):
            crashpoints.arm(order)
    crashpoints.arm("")
    for point in crashpoints.POINTS:
        crashpoints.at(point)  # and we live


def test_the_variable_is_taken_out_of_the_environment(monkeypatch):
    monkeypatch.setenv(crashpoints.VARIABLE, "enc.asked:1000000")
    assert crashpoints.arm_from_environment()
    assert crashpoints.VARIABLE not in os.environ
    crashpoints.arm("")
