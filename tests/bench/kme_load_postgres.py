"""The load of ``kme_load`` on PostgreSQL: one KME process and two, beside one on SQLite and the plain FastAPI server.

    python -m tests.bench.kme_load_postgres [ROUNDS] [REQUESTS] [--seconds S] [--out FILE]

A primary and its synchronous standby, both with fsync, on this machine; both sites' databases are there.  Processor
time counts the KMEs of both sites and all PostgreSQL processes, those of the standby too.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from keysource.kme.control import ControlError, ask
from keysource.kme.epochs import new_site_key
from keysource.kme.pki import write_new
from tests.bench import kme_load
from tests.bench.kme_load import Round, Side
from tests.kme.conftest import ROOT, Lab
from tests.kme.pgcluster import DATABASE_PASSWORD, Cluster, Node, children, in_sync
from tests.ports import free_port

LIMITS = "[limits]\nrequests_per_second = 0\nmax_key_count = 1000000\n"
NAMES = ("SQLite", "FastAPI", "PostgreSQL, 1 process", "PostgreSQL, 2 processes")


@dataclass
class Several(Side):
    """Masters ask one process after the other."""

    turn: Iterator[str] = field(default_factory=lambda: iter(()))

    async def status(self) -> int:
        self.master = next(self.turn)
        return await super().status()

    async def draw_and_fetch(self, number: int) -> int:
        self.master = next(self.turn)
        return await super().draw_and_fetch(number)


async def measure(rounds: int, calls: int, seconds: float = math.inf) -> dict[str, dict[str, list[Round]]]:
    """Work -> server -> its rounds."""
    cluster = await asyncio.to_thread(_cluster)
    with tempfile.TemporaryDirectory(prefix="kme-bench-") as folder:
        labs = [Lab(_made(Path(folder) / name), limits=LIMITS) for name in ("files", "database")]
        others: list[subprocess.Popen[bytes]] = []
        try:
            for site, file in labs[1].files.items():
                _use_database(file, cluster.primary, site)
            for lab in labs:
                await lab.start(keys=0)
            await kme_load._stock(labs[0], kme_load.needed(rounds, calls))
            await kme_load._stock(labs[1], 2 * kme_load.needed(rounds, calls))  # for one process, and for two
            second, url = await _second(labs[1])
            others.append(second)
            plain, port = await kme_load._plain(labs[0])
            others.append(plain)
            sides = _sides(labs, cluster, plain, port, second, url)
            for side in sides.values():
                await side.open()
            try:
                return await kme_load._rounds(sides, rounds, calls, seconds)
            finally:
                for side in sides.values():
                    await side.aclose()
        finally:
            for process in others:
                process.terminate()
                process.wait(10)
            for lab in labs:
                await lab.aclose()
            await asyncio.to_thread(cluster.close)


def _cluster() -> Cluster:
    cluster = Cluster(
        "alice", "bob", synchronous_standby_names="*", autovacuum="off"
    )  # no process that comes and goes
    cluster.primary.start()
    cluster.add_standby(of=cluster.primary)
    while not in_sync(cluster.primary):
        time.sleep(0.05)
    return cluster


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _use_database(file: Path, node: Node, database: str) -> None:
    new_site_key(file.with_name("site.key"))
    write_new(file.with_name("password"), DATABASE_PASSWORD.encode(), 0o600)
    table = f'[store]\nkind = "postgresql"\npassword = "password"\nconninfo = "{node.conninfo(database=database)}"\n'
    text = file.read_text().replace('store = "kme-state/kme.sqlite"', f'site_key = "site.key"\n{table}')
    file.write_text(text)


async def _second(lab: Lab) -> tuple[subprocess.Popen[bytes], str]:
    """Another process of site alice: other ports, no device, its own control socket and audit log."""
    plan, port = lab.plans["alice"], free_port()
    text = lab.files["alice"].read_text().replace(f"127.0.0.1:{plan.port}", f"127.0.0.1:{port}")
    text = text.replace(f"127.0.0.1:{plan.peer_port}", f"127.0.0.1:{free_port()}")
    text = text.replace('device = "link/device.sock"\n', "")
    text = text.replace("[store]", 'control = "second/control.sock"\naudit = "second/audit.jsonl"\n[store]')
    file = lab.files["alice"].with_name("second.toml")
    file.write_text(text)
    command = [sys.executable, "-m", "keysource.kme.cli", "serve", str(file)]
    with (lab.folder / "second.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    for _ in range(600):
        try:
            ask(file.with_name("second") / "control.sock", {"op": "status"})
        except ControlError:
            assert process.poll() is None, (lab.folder / "second.log").read_text()
            await asyncio.sleep(0.05)
            continue
        return process, f"https://127.0.0.1:{port}/api/v1/keys"
    raise AssertionError("the second process does not answer")


def _sides(
    labs: list[Lab],
    cluster: Cluster,
    plain: subprocess.Popen[bytes],
    port: int,
    second: subprocess.Popen[bytes],
    url: str,
) -> dict[str, Side]:
    files, database = labs
    one = kme_load._ours(database)
    servers = [node.process.pid for node in cluster.nodes if node.process is not None]
    pids = (*one.pids, *servers, *(child for server in servers for child in children(server)))
    turn = itertools.cycle([one.master, url])
    return {
        "SQLite": kme_load._ours(files),
        "FastAPI": kme_load._theirs(files, plain, port),
        "PostgreSQL, 1 process": Side(one.master, one.slave, pids, one.contexts),
        "PostgreSQL, 2 processes": Several(one.master, one.slave, (*pids, second.pid), one.contexts, turn=turn),
    }


if __name__ == "__main__":
    kme_load.main(measure, "Load of the KME, on SQLite and on PostgreSQL, beside a plain FastAPI server")
