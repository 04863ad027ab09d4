"""Where a store of a test lies: files in a folder, or a schema of its own in a PostgreSQL."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from keysource.base import Origin, Owner
from keysource.kme.pgserver import Server
from keysource.kme.postgres import PostgresStore, Process
from keysource.kme.records import LinkRow
from keysource.kme.store import Store
from tests.kme.pgcluster import DATABASE_PASSWORD, Cluster

SITE_KEY = bytes(range(32))


class SqlitePlace:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def store(self, name: str, max_keys: int = 1000):
        return Store(self._folder / name / "kme.sqlite", name, max_keys=max_keys)


class PostgresPlace:
    numbers = itertools.count()

    def __init__(self, cluster: Cluster) -> None:
        self.node, self._number = cluster.primary, next(self.numbers)

    def server(self, name: str, **options) -> Server:
        """The schema of one KME."""
        schema = f"t{self._number}_{name}"
        with self.node.admin("qvpn") as admin:
            admin.execute(f"CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION qvpn")
        conninfo = f"{self.node.conninfo()} options='-c search_path={schema}'"
        return Server(conninfo, DATABASE_PASSWORD, **{"require_standby": False, **options})

    def process(self, name: str, **options) -> Process:
        return Process(self.server(name, **options))

    def store(self, name: str, max_keys: int = 1000, process: Process | None = None):
        return PostgresStore(process or self.process(name), name, max_keys=max_keys, site_key=SITE_KEY)


@contextlib.contextmanager
def opened(place, name, end, owner=Owner.ALTERNATE, max_keys=1000):
    store = place.store(name, max_keys)
    try:
        yield store, store.bind_link(LinkRow("other", "link", end, owner, Origin.QKD, 2))
    finally:
        store.close()
