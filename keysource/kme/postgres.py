"""The store of all KME processes of one site in one PostgreSQL: see :mod:`~keysource.kme.pgserver` for its commits.

The processes keep nothing that matters.  What differs from the SQLite file:

* rows that a transaction decides about are locked first, so that two processes never decide about one row at once;
* own units that a process may be about to offer are *claimed* by it, so that two do not offer the same one; a claim
  only saves keys (exactly once does not rest on it) and ends with the sessions of its process at the server, or
  three minutes after the process was last heard of, since the sessions of a machine without power linger;
* counts of keys are in rows that few share, since a row is locked until the standby has confirmed;
* the keys of the epochs lie in a table, wrapped under the site key.  A deleted one lives on in PostgreSQL's log, dead
  rows and standbys until those forget: whoever has such a copy *and* the site key can read what was wrapped under it,
  unless a file of :mod:`~keysource.kme.slots` had a part of it and has forgotten that.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Iterator
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keysource.kme import crashpoints, migrate
from keysource.kme.epochs import Epoch, Epochs
from keysource.kme.keystore import KeyStore
from keysource.kme.pgserver import PROBE, InUse, PgDatabase, Server
from keysource.kme.records import ANY, Alarmed, StoreError, Unit, Wanted
from keysource.kme.slots import Slots

TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE epoch (
    number BIGINT PRIMARY KEY,
    begun BIGINT NOT NULL,            -- seconds since 1970
    wrapped BYTEA NOT NULL            -- its key under the site key
);
CREATE TABLE link (
    peer TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    "end" TEXT NOT NULL,
    owner TEXT NOT NULL,
    origin TEXT NOT NULL,
    hops INTEGER NOT NULL,
    next_block BIGINT NOT NULL,
    alarm TEXT NOT NULL,
    issued BIGINT NOT NULL,           -- always 0 here: see tally
    fetched BIGINT NOT NULL
);
CREATE TABLE tally (                  -- keys given to masters and slaves, spread over slots
    peer TEXT NOT NULL,
    slot INTEGER NOT NULL,
    issued BIGINT NOT NULL,
    fetched BIGINT NOT NULL,
    PRIMARY KEY (peer, slot)
);
CREATE TABLE process (id TEXT PRIMARY KEY, seen TIMESTAMPTZ NOT NULL);
CREATE TABLE key (
    key_id TEXT PRIMARY KEY,
    peer TEXT NOT NULL,
    own INTEGER NOT NULL,
    block BIGINT NOT NULL,
    position BIGINT NOT NULL,
    origin TEXT NOT NULL,
    hops INTEGER NOT NULL,
    epoch BIGINT NOT NULL REFERENCES epoch (number),
    material BYTEA NOT NULL,
    claim TEXT NOT NULL DEFAULT ''    -- the process that may be offering it
);
CREATE INDEX key_order ON key (peer, own, block, position);
CREATE INDEX key_claim ON key (claim) WHERE claim != '';
CREATE INDEX key_epoch ON key (epoch);
CREATE TABLE delivery (
    key_id TEXT NOT NULL,
    slave TEXT NOT NULL,
    master TEXT NOT NULL,
    peer TEXT NOT NULL,
    size INTEGER NOT NULL,
    origin TEXT NOT NULL,
    hops INTEGER NOT NULL,
    epoch BIGINT NOT NULL REFERENCES epoch (number),
    material BYTEA,
    token TEXT NOT NULL,
    since DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (key_id, slave)
);
CREATE INDEX delivery_peer ON delivery (peer, token);
CREATE INDEX delivery_since ON delivery (since);
CREATE INDEX delivery_epoch ON delivery (epoch);
CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc
    PRIMARY KEY (version_num));
"""
_SLOTS = 64
_BEAT_EVERY = 15.0
_LIVE = (
    "SELECT id FROM process WHERE seen > now() - interval '180 seconds' AND id IN"
    " (SELECT right(application_name, 16) FROM pg_stat_activity WHERE datname = current_database())"
)
_LOCK = 0x7176706E  # of the tables and of new epochs, among the database's advisory locks


class Process:
    """What the connections of one KME process have in common."""

    def __init__(self, server: Server, slots: Slots | None = None) -> None:
        """``slots``: of all processes of the site, on this one host."""
        self.server, self.slots = server, slots
        self.id = server.session
        self.beaten = float("-inf")


class SharedEpochs(Epochs):
    """Epoch keys in a table.  A row of another table that refers to one keeps it alive."""

    def __init__(self, db: PgDatabase, site_key: bytes, kme_id: str, slots: Slots | None) -> None:
        super().__init__(site_key, kme_id)
        self._db, self._slots = db, slots

    def wrapper(self, number: int) -> AESGCM:
        """The site key, with the secret of the epoch's slot where there is a file of them."""
        secret = None if self._slots is None else self._slots.secret(number)
        if secret is None:  # begun before there was such a file
            return super().wrapper(number)
        return AESGCM(HKDF(hashes.SHA256(), len(secret), secret, b"qvpn-kme epoch with a slot v1").derive(self._root))

    def reload(self) -> None:
        """Raises :class:`StoreError`: another process has wrapped them under another site key."""
        alive: dict[int, Epoch] = {}
        for number, begun, wrapped in self._db.execute("SELECT number, begun, wrapped FROM epoch").fetchall():
            known = self._epochs.get(number)
            try:
                alive[number] = known or Epoch(0, float(begun), self.read_key(number, begun, wrapped))
            except InvalidTag:
                raise StoreError(
                    f"{self._db.server.where}: the key of epoch {number} is wrapped under another site key or another"
                    " file of epoch_keys; all KME processes of a site have the same ones"
                ) from None
        self._epochs = alive

    def begin(self, number: int, now: float) -> None:
        """Within a transaction."""
        if self._slots is not None:
            self._slots.make(number)
        wrapped, cipher = self.new_key(number, int(now))
        self._db.execute("INSERT INTO epoch VALUES (?, ?, ?)", (number, int(now), wrapped))
        self._epochs[number] = Epoch(0, float(int(now)), cipher)

    def forget(self) -> None:
        """The next transaction reads them all again."""
        self._epochs = {}

    def destroy(self, number: int) -> None:
        if number == self.current:
            raise ValueError("the current epoch is in use")
        self._db.execute("DELETE FROM epoch WHERE number = ?", (number,))

    def forget_slots(self) -> None:
        """Of epochs that are gone; by then that is committed."""
        if self._slots is not None:
            self._slots.forget(self.current, self.alive)

    def unseal(self, epoch: int, label: bytes, blob: bytes) -> bytearray:
        if epoch not in self._epochs:
            self.reload()  # begun by another process since this transaction began
        return super().unseal(epoch, label, blob)


class PostgresStore(KeyStore):
    """One connection's view of it; a KME process has several."""

    _for_update = " FOR UPDATE"
    _skip_locked = " FOR UPDATE SKIP LOCKED"
    _db: PgDatabase
    _epochs: SharedEpochs

    def __init__(self, process: Process, kme_id: str, *, max_keys: int, site_key: bytes, now: float = 0.0) -> None:
        """Makes the tables where there are none.  ``now`` is in seconds of the wall clock.

        Raises:
            StoreError: no server, no standby, another KME's database or another site key.
        """
        super().__init__(process.server.where, max_keys=max_keys)
        self._process = process
        self._slot = secrets.randbelow(_SLOTS)
        self._db = PgDatabase(process.server)
        with contextlib.ExitStack() as failed:
            failed.callback(self._db.close)
            self._make_tables(kme_id)
            self._epochs = SharedEpochs(self._db, site_key, kme_id, process.slots)
            self._epochs.reload()
            if not self._epochs.current:
                self.begin_epoch(now)
            with self._transaction(local=True):
                self._beat()  # known before it claims anything
            failed.pop_all()

    def close(self) -> None:
        self._db.close()

    def health(self) -> dict[str, Any]:
        server = self._process.server
        told: dict[str, Any] = {"kind": "postgresql", "where": self.where, "step": migrate.HEAD}
        told |= {"require_standby": server.require_standby, "doubt": server.doubt or None}
        try:
            with self._transaction():
                self._db.execute(PROBE)
                names = self._db.execute("SHOW synchronous_standby_names").fetchone()[0]
                live = self._db.execute(f"SELECT count(*) FROM ({_LIVE}) AS live").fetchone()[0]
        except StoreError as error:
            return told | {"doubt": server.doubt or None, "trouble": str(error)}
        return told | {"standbys": names, "timeline": server.timeline, "processes": live, "trouble": None}

    # Opening

    def _make_tables(self, kme_id: str) -> None:
        self._db.begin_unchecked()
        try:
            self._db.execute("SELECT pg_advisory_xact_lock(?)", (_LOCK,))  # another process may be at it
            if self._db.execute("SELECT to_regclass('alembic_version')").fetchone()[0] is None:
                for statement in filter(str.strip, TABLES.split(";\n")):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO alembic_version VALUES (?)", (migrate.HEAD,))
            [step] = self._db.execute("SELECT version_num FROM alembic_version").fetchone()
            if step != migrate.HEAD:
                raise StoreError(f"{self.where}: a newer release wrote this store (step {step})")
            self._db.execute("INSERT INTO meta VALUES ('kme', ?) ON CONFLICT DO NOTHING", (kme_id,))
            [owner] = self._db.execute("SELECT value FROM meta WHERE name = 'kme'").fetchone()
            if owner != kme_id:
                raise StoreError(f"{self.where}: this is the store of KME {owner!r}, not of {kme_id!r}")
            self._db.commit()
        except BaseException:
            self._db.rollback()
            raise

    # Epochs

    @property
    def epoch(self) -> tuple[int, float]:
        """Number of the current epoch, and when it began, whoever began it."""
        self._epochs.reload()
        return self._epochs.current, self._epochs.begun

    def begin_epoch(self, now: float) -> None:
        """Unless another process has done so meanwhile."""
        known = self._epochs.current
        try:
            with self._transaction():
                self._db.execute("SELECT pg_advisory_xact_lock(?)", (_LOCK,))
                self._epochs.reload()
                if self._epochs.current == known:
                    self._epochs.begin(known + 1, now)
        except BaseException:
            self._epochs.forget()  # another connection may begin one of that number, with another key
            raise
        crashpoints.at("epoch.begun")

    def rewrap(self, limit: int = 256) -> bool:
        self._epochs.reload()
        current = self._epochs.current
        if self._epochs.alive == [current]:
            return False
        with self._transaction():
            left = self._rewrap_units(current, limit) + self._rewrap_waiting(current, limit)
            crashpoints.at("epoch.in-rewrap")
        crashpoints.at("epoch.rewrapped")
        if not left:
            self._destroy_epochs(below=current)
        return bool(left)

    def _destroy_epochs(self, below: int) -> None:
        for number in [number for number in self._epochs.alive if number < below]:
            with contextlib.suppress(InUse), self._transaction():  # another process wraps something yet
                self._epochs.destroy(number)
            crashpoints.at("epoch.destroyed")
        self._epochs.reload()
        self._epochs.forget_slots()

    # Where several are at it

    def free_own(self, peer: str, limit: int, wanted: Wanted = ANY) -> list[Unit]:
        where, values = self._own(peer, wanted)
        columns = "block, position, key_id"
        with self._transaction(local=True):
            self._beat()
            query = f"SELECT {columns} FROM key WHERE {where} AND claim = ? ORDER BY block, position LIMIT ?"
            mine = self._db.execute(query, [*values, self._process.id, limit]).fetchall()
            if len(mine) < limit:
                free = f"SELECT key_id FROM key WHERE {where} AND (claim = '' OR claim NOT IN ({_LIVE}))"
                oldest = f"{free} ORDER BY block, position LIMIT ? FOR UPDATE SKIP LOCKED"
                query = f"UPDATE key SET claim = ? WHERE key_id IN ({oldest}) RETURNING {columns}"
                more = self._db.execute(query, [self._process.id, *values, limit - len(mine)]).fetchall()
                mine = sorted(mine + more)
        return [Unit(key_id, block) for block, _position, key_id in mine]

    def expire(self, before: float) -> int:
        with self._transaction(local=True):
            self._beat()
        return super().expire(before)

    def _beat(self) -> None:
        """Tell the others that this process is there, so that they respect its claims."""
        now = time.monotonic()
        if now < self._process.beaten + _BEAT_EVERY:
            return
        self._process.beaten = now
        self._db.execute("DELETE FROM process WHERE seen < now() - interval '1 day'")
        alive = "INSERT INTO process VALUES (?, now()) ON CONFLICT (id) DO UPDATE SET seen = now()"
        self._db.execute(alive, (self._process.id,))

    def _not_others(self) -> tuple[str, list[object]]:
        return f" AND (claim IN ('', ?) OR claim NOT IN ({_LIVE}))", [self._process.id]

    def _among(self, column: str, values: Collection[str]) -> tuple[str, tuple[object]]:
        return f"{column} = ANY(?)", (list(values),)

    def _must_be_well(self, peer: str) -> None:
        row = self._db.execute("SELECT alarm FROM link WHERE peer = ?", (peer,)).fetchone()
        if row and row[0]:
            raise Alarmed(f"the link to {peer!r} has an alarm ({row[0]})")

    def _lock_units(self, key_ids: Collection[str]) -> None:
        query = "SELECT 1 FROM key WHERE key_id = ANY(?) ORDER BY key_id FOR UPDATE"
        self._db.execute(query, (list(key_ids),))

    def _lock_waiting(self, key_ids: Collection[str]) -> None:
        query = "SELECT 1 FROM delivery WHERE key_id = ANY(?) ORDER BY key_id, slave FOR UPDATE"
        self._db.execute(query, (list(key_ids),))

    def _count(self, peer: str, *, issued: int = 0, fetched: int = 0) -> None:
        query = "INSERT INTO tally VALUES (?, ?, ?, ?) ON CONFLICT (peer, slot) DO UPDATE SET"
        query += " issued = tally.issued + excluded.issued, fetched = tally.fetched + excluded.fetched"
        self._db.execute(query, (peer, self._slot, issued, fetched))

    def _counted(self, peer: str) -> tuple[int, int]:
        query = "SELECT coalesce(sum(issued), 0), coalesce(sum(fetched), 0) FROM tally WHERE peer = ?"
        issued, fetched = self._db.execute(query, (peer,)).fetchone()
        return int(issued), int(fetched)

    @contextlib.contextmanager
    def _transaction(self, *, local: bool = False) -> Iterator[None]:
        epoch = self._db.begin(local=local)
        try:
            if epoch != self._epochs.current:
                self._epochs.reload()
            yield
            self._db.commit(local=local)
        except BaseException:
            self._db.rollback()
            raise
