"""A PostgreSQL primary dies under eight clients, its standby is promoted: no key twice, and how long it takes.

Site alice has two KME processes behind one address, both on the database ``alice``; site bob's is on ``bob``.  (That
both databases are in one cluster is for the test: the failover hits master's and slave's side at the same moment.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keysource.kme import cli
from keysource.kme.pgserver import Server
from keysource.kme.records import StoreError
from tests.kme import pgcluster
from tests.kme.network import Network
from tests.kme.pgcluster import DATABASE_PASSWORD, Cluster, in_sync
from tests.ports import free_port

CLIENTS = 8
FAILOVERS = 5 if os.environ.get("QVPN_TEST_LONG") == "1" else 1
ENOUGH = 24


@pytest.fixture
def cluster():
    if pgcluster.binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    cluster = Cluster("alice", "bob", synchronous_standby_names="*")
    try:
        cluster.primary.start()
        cluster.add_standby(of=cluster.primary)
        yield cluster
    finally:
        cluster.close()


def conninfo(cluster, database):
    """All nodes there are and will be."""
    hosts = ",".join(str(cluster.primary.folder.with_name(f"node{number}")) for number in range(FAILOVERS + 2))
    return f"host={hosts} dbname={database} user=qvpn"


class Balancer:
    """One address for several processes: each connection goes to the next one that answers."""

    def __init__(self, ports):
        self._ports, self._turn = ports, 0
        self._tasks = set()

    async def start(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        self._turn += 1
        for place in range(len(self._ports)):
            port = self._ports[(self._turn + place) % len(self._ports)]
            with contextlib.suppress(OSError):
                there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))
                return
        writer.close()


async def _pump(reader, writer):
    with contextlib.suppress(OSError):
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


def second_process(network):
    """Another KME process of site alice: same names, certificate, site key and database, no device."""
    text = network.files["alice"].read_text()
    for old in network.ports["alice"]:
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{free_port()}")
    for other in ("bob", "carol"):
        text = text.replace(f'device = "to-{other}.sock"\n', "")
    text = text.replace('ca = "pki', 'control = "state2/control.sock"\naudit = "state2/audit.jsonl"\nca = "pki')
    file = network.folder / "alice" / "second.toml"
    file.write_text(text)
    network.files["second"] = file
    return int(next(line for line in text.splitlines() if line.startswith("listen")).rpartition(":")[2].strip('"'))


async def client(network, over, counts):
    """Draw and fetch until it is over; 503 and broken connections are what there is to expect."""
    while not over.is_set():
        status, keys = await network.draw(("sae-bob",), number=2)
        counts[status] = counts.get(status, 0) + 1
        assert status in (200, 503, 0), status
        while keys and not over.is_set():
            status, fetched = await network.fetch("sae-bob", list(keys))
            assert status in (200, 400, 503, 0), status
            if status in (200, 400):  # 400: an answer that was lost took them away
                assert status == 400 or fetched == keys
                break
            await asyncio.sleep(0.1)
        if status != 200:
            await asyncio.sleep(0.1)


@pytest.mark.timeout(120 + 120 * FAILOVERS)
async def test_a_primary_dies_and_its_standby_is_promoted(cluster, capsys, record_property):
    databases = {site: conninfo(cluster, site) for site in ("alice", "bob")}
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        network = Network(Path(folder), databases=databases, limits="[limits]\nrequests_per_second = 0.0\n")
        port = second_process(network)
        balancer = Balancer([network.ports["alice"][0], port])
        over, counts = asyncio.Event(), {}
        clients = []
        try:
            await network.start(keys=2000)
            network.serve("second")
            await network.until(lambda: network.status("second")["store"]["processes"] >= 1, "the second process")
            network.ports["alice"] = (await balancer.start(), network.ports["alice"][1])
            clients = [asyncio.create_task(client(network, over, counts)) for _ in range(CLIENTS)]
            await more_keys(network, clients)
            primary, standby = cluster.nodes
            for _ in range(FAILOVERS):
                times, standby, primary = await fail_over(network, cluster, clients, primary, standby)
                record_property("failover", times)
                with capsys.disabled():
                    print(f"\nPostgreSQL failover, seconds after kill -9 of the primary: {times}")
            over.set()
            await asyncio.gather(*clients)
            both_did_their_part(network)
            nothing_issued_is_left(cluster, primary, network)
            assert counts[200] >= ENOUGH / 2
        finally:
            over.set()
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            if "second" in network.pids:
                await network.stop("second")
            balancer.server.close()
            await network.aclose()
    await asyncio.to_thread(an_old_primary_comes_back, cluster, primary)


async def fail_over(network, cluster, clients, primary, standby):
    await until(lambda: in_sync(primary) == 1)
    began = time.monotonic()
    times = {}
    await asyncio.to_thread(primary.kill)
    await asyncio.sleep(0.5)  # what was answered may still be on its way
    await nothing_is_given_out(network, 0.7)
    times["promotion ordered"] = time.monotonic() - began
    await asyncio.to_thread(promote, standby)
    times["promoted"] = time.monotonic() - began
    before = len(network.book.masters), len(network.book.slaves)
    await until(lambda: "TROUBLE: " in status_of_the_second(network))  # nobody confirms
    assert (len(network.book.masters), len(network.book.slaves)) == before
    fresh = await asyncio.to_thread(cluster.add_standby, standby)
    times["new standby answers"] = time.monotonic() - began
    before = len(network.book.masters)
    while len(network.book.masters) == before:
        await alive(clients)
        assert time.monotonic() < began + 90, network.status("second")["store"]
    times["keys again"] = time.monotonic() - began
    await more_keys(network, clients)
    return {what: round(seconds, 2) for what, seconds in times.items()}, fresh, standby


def status_of_the_second(network):
    return CliRunner().invoke(cli.app, ["status", str(network.files["second"])]).output


def promote(node):
    with node.admin() as admin:
        assert admin.execute("SELECT pg_promote(true, 30)").fetchone() == (True,)


async def nothing_is_given_out(network, seconds):
    before = len(network.book.masters), len(network.book.slaves)
    await asyncio.sleep(seconds)
    assert (len(network.book.masters), len(network.book.slaves)) == before


async def more_keys(network, clients):
    enough = len(network.book.slaves) + ENOUGH
    end = time.monotonic() + 60
    while len(network.book.slaves) < enough:
        await alive(clients)
        assert time.monotonic() < end, (len(network.book.slaves), network.status("second")["store"])


async def alive(clients):
    await asyncio.sleep(0.02)
    for task in clients:
        if task.done():
            task.result()


async def until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(true):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


def both_did_their_part(network):
    for process in ("alice", "second"):
        [sae] = network.status(process)["saes"]
        assert sae["issued"] > 0, process
        assert network.status(process)["store"]["timeline"] == 1 + FAILOVERS


def nothing_issued_is_left(cluster, primary, network):
    """The database of today has no row of any key that anybody was ever given."""
    given = list(network.book.masters)
    with primary.admin("alice") as admin:
        assert admin.execute("SELECT count(*) FROM key WHERE key_id = ANY(%s)", (given,)).fetchone() == (0,)
    fetched = [key_id for key_id, _slave in network.book.slaves]
    with primary.admin("bob") as admin:
        query = "SELECT count(*) FROM delivery WHERE key_id = ANY(%s) AND material IS NOT NULL"
        assert admin.execute(query, (fetched,)).fetchone() == (0,)


def an_old_primary_comes_back(cluster, primary):
    """With the rows of keys that were given out since: it is not believed, whether or not the new one is there."""
    old = cluster.nodes[0]
    old.start()
    both = Server(conninfo(cluster, "alice"), DATABASE_PASSWORD)
    with contextlib.closing(both.connect()) as connection:
        assert connection.info.host == str(primary.folder)
    assert both.timeline == 1 + FAILOVERS
    alone = Server(f"host={old.folder} dbname=alice user=qvpn", DATABASE_PASSWORD, timeline=both.timeline)
    with pytest.raises(StoreError, match="an old primary has come back"):
        alone.connect()
