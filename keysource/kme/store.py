"""One KME's keys at rest: SQLite, written to the disk before anybody is told.  Synchronous; one thread at a time.

The two KMEs of a link have a store each and never share one.  A key is in one of two states::

    own keys (this end issues them)     free ──── issue() ───▶ gone, bytes go to the master SAE
    the other end's keys                free ─ reserve() ─▶ reserved ─ fetch() ─▶ gone, bytes go to the slave SAE

Each arrow is one transaction, on the disk (WAL, ``synchronous=FULL``) when it returns.  So a crash may lose a key
that was on its way out, and can never give one out twice.  What is deleted is overwritten in the database file
(``secure_delete``); copies in the write-ahead log live on until the next checkpoint, and in a flash disk for longer.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keysource.base import KEY_BYTES, End, Origin, Owner, derive_key_id

_MAX_BLOCK = 2**63 - 1
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE link (
    peer TEXT PRIMARY KEY,       -- KME at the other end
    name TEXT NOT NULL,          -- of the link, as both devices say it
    end TEXT NOT NULL,
    owner TEXT NOT NULL,
    origin TEXT NOT NULL,
    hops INTEGER NOT NULL,
    next_block INTEGER NOT NULL, -- all blocks below were received
    alarm TEXT NOT NULL,         -- '' or what the device said last
    issued INTEGER NOT NULL,     -- keys given to masters here
    fetched INTEGER NOT NULL     -- keys given to slaves here
) WITHOUT ROWID;
CREATE TABLE key (
    key_id TEXT PRIMARY KEY,
    peer TEXT NOT NULL,
    own INTEGER NOT NULL,        -- 1: issued at this end
    block INTEGER NOT NULL,
    position INTEGER NOT NULL,
    origin TEXT NOT NULL,
    hops INTEGER NOT NULL,
    material BLOB NOT NULL,
    master TEXT,                 -- NULL while free
    slave TEXT,
    token TEXT,                  -- names the one offer that reserved the key
    since REAL
) WITHOUT ROWID;
CREATE INDEX key_order ON key (peer, own, master, block, position);
CREATE INDEX key_since ON key (since) WHERE since IS NOT NULL;
"""


class StoreError(Exception):
    """The store cannot be opened, or is another KME's; one sentence."""


class KeysNotFound(Exception):
    """At least one key_ID is not here for this pair; nothing was touched."""


class NotTheSlave(Exception):
    """At least one key is reserved for another slave SAE; nothing was touched."""


@dataclass(frozen=True, slots=True)
class LinkRow:
    """What is remembered of a link.  ``alarm`` is empty where there is none."""

    peer: str
    name: str
    end: End
    owner: Owner
    origin: Origin
    hops: int
    next_block: int = 0
    alarm: str = ""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key that has just left the store."""

    key_id: str
    material: bytearray = field(repr=False)
    origin: Origin
    hops: int


@dataclass(frozen=True, slots=True)
class Offer:
    """A key that the other KME is asked to reserve.  ``token`` is random and told to that KME only."""

    key_id: str
    block: int
    token: str


@dataclass(frozen=True, slots=True)
class Reservation:
    """How the other KME answers: key_IDs that it cannot reserve, and how far its stock reaches."""

    missing: list[str]
    first_block: int
    """It has no free key of the asking end in any block below."""
    next_block: int
    """It has received all blocks below."""


@dataclass(frozen=True, slots=True)
class Counts:
    own_free: int
    peer_free: int
    reserved: int
    issued: int
    fetched: int


class Store:
    """See the module.  Open it, use it from one thread at a time, close it."""

    def __init__(self, path: Path, kme_id: str, *, max_keys: int) -> None:
        """Raises :class:`StoreError`."""
        self.path = path
        self._max_keys = max_keys
        self._lock = _private_lock(path)
        try:
            self._db = _connect(path)
            self._adopt(kme_id)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    # Links

    def link(self, peer: str) -> LinkRow | None:
        columns = "peer, name, end, owner, origin, hops, next_block, alarm"
        row = self._db.execute(f"SELECT {columns} FROM link WHERE peer = ?", (peer,)).fetchone()
        if row is None:
            return None
        return LinkRow(row[0], row[1], End(row[2]), Owner(row[3]), Origin(row[4]), row[5], row[6], row[7])

    def bind_link(self, link: LinkRow) -> LinkRow:
        """Remember what the device says; name and end never change.  Raises :class:`StoreError`."""
        known = self.link(link.peer)
        if known and (known.name, known.end) != (link.name, link.end):
            raise StoreError(
                f"{self.path}: keys of the link to {link.peer!r} come from end {known.end.value!r} of {known.name!r};"
                f" the device there says that it is end {link.end.value!r} of {link.name!r}"
            )
        with self._transaction():
            self._db.execute(
                "INSERT INTO link VALUES (?, ?, ?, ?, ?, ?, 0, '', 0, 0)"
                " ON CONFLICT (peer) DO UPDATE SET owner = excluded.owner, origin = excluded.origin,"
                " hops = excluded.hops",
                (link.peer, link.name, link.end.value, link.owner.value, link.origin.value, link.hops),
            )
        return self.link(link.peer) or link

    def set_alarm(self, peer: str, alarm: str) -> None:
        with self._transaction():
            self._db.execute("UPDATE link SET alarm = ? WHERE peer = ?", (alarm, peer))

    # Keys that arrive

    def add_block(self, link: LinkRow, block: int, keys: bytearray) -> bool:
        """Store a block; False where it was received before.  Older free keys make room for it.

        Raises:
            StoreError: a block number that SQLite cannot hold.
        """
        if block > _MAX_BLOCK - 1:
            raise StoreError(f"block number {block} is too large")
        with self._transaction():
            (next_block,) = self._db.execute("SELECT next_block FROM link WHERE peer = ?", (link.peer,)).fetchone()
            if block < next_block:
                return False
            self._db.executemany(
                "INSERT INTO key (key_id, peer, own, block, position, origin, hops, material)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                _rows(link, block, keys),
            )
            self._db.execute("UPDATE link SET next_block = ? WHERE peer = ?", (block + 1, link.peer))
            self._make_room(link.peer)
        return True

    def void(self, peer: str, before: int) -> int:
        """The other end does not have blocks below ``before``: delete their free keys.  Returns how many."""
        with self._transaction():
            return self._db.execute(
                "DELETE FROM key WHERE peer = ? AND master IS NULL AND block < ?", (peer, min(before, _MAX_BLOCK))
            ).rowcount

    def _make_room(self, peer: str) -> None:
        (over,) = self._db.execute("SELECT count(*) - ? FROM key WHERE peer = ?", (self._max_keys, peer)).fetchone()
        while over > 0:
            free = "FROM key WHERE peer = ? AND master IS NULL"
            (oldest,) = self._db.execute(f"SELECT min(block) {free}", (peer,)).fetchone()
            if oldest is None:
                return  # all that is left is reserved, and waits for its slave
            over -= self._db.execute(f"DELETE {free} AND block = ?", (peer, oldest)).rowcount

    # Master's side

    def free_own(self, peer: str, limit: int) -> list[tuple[str, int]]:
        """(key_ID, block) of at most ``limit`` own free keys, oldest first."""
        return self._db.execute(
            "SELECT key_id, block FROM key WHERE peer = ? AND own = 1 AND master IS NULL"
            " ORDER BY block, position LIMIT ?",
            (peer, limit),
        ).fetchall()

    def drop_own(self, peer: str, key_ids: Collection[str], *, below: int, keep: Collection[str]) -> int:
        """Delete own free keys that the other KME does not hold: ``key_ids`` and all below block ``below``, except
        ``keep``.  Returns how many."""
        with self._transaction():
            found = self._db.execute(
                "SELECT key_id FROM key WHERE peer = ? AND own = 1 AND master IS NULL AND block < ?",
                (peer, min(below, _MAX_BLOCK)),
            )
            gone = {row[0] for row in found} - set(keep) | set(key_ids)
            rows = [(key_id, peer) for key_id in gone]
            return self._db.executemany("DELETE FROM key WHERE key_id = ? AND peer = ? AND own = 1", rows).rowcount

    def issue(self, peer: str, key_ids: Sequence[str]) -> list[StoredKey]:
        """Delete own free keys and return them, all or none.

        Raises:
            KeysNotFound: one is gone meanwhile.
        """
        with self._transaction():
            keys = [self._take(key_id, "own = 1 AND master IS NULL") for key_id in key_ids]
            self._db.execute("UPDATE link SET issued = issued + ? WHERE peer = ?", (len(keys), peer))
        return keys

    # Slave's side

    def reserve(self, peer: str, master: str, slave: str, offers: Sequence[Offer], now: float) -> Reservation:
        """Reserve the other end's keys for a pair; the same offer may come twice.  ``now`` is in seconds."""
        missing = []
        with self._transaction():
            for offer in offers:
                done = self._db.execute(
                    "UPDATE key SET master = ?, slave = ?, token = ?, since = ?"
                    " WHERE key_id = ? AND peer = ? AND own = 0"
                    " AND (master IS NULL OR (master = ? AND slave = ? AND token = ?))",
                    (master, slave, offer.token, now, offer.key_id, peer, master, slave, offer.token),
                )
                if done.rowcount != 1:
                    missing.append(offer.key_id)
            first, following = self._db.execute(
                "SELECT (SELECT min(block) FROM key WHERE peer = :p AND own = 0 AND master IS NULL), next_block"
                " FROM link WHERE peer = :p",
                {"p": peer},
            ).fetchone() or (0, 0)
        return Reservation(missing, following if first is None else first, following)

    def fetch(self, master: str, slave: str, key_ids: Sequence[str]) -> list[StoredKey]:
        """Delete keys reserved for this pair and return them, all or none.

        Raises:
            NotTheSlave: one is reserved for another slave.
            KeysNotFound: one is not here, not reserved, or reserved by another master.
        """
        with self._transaction():
            rows = {key_id: self._reserved(key_id) for key_id in key_ids}
            if any(row and row[1] != slave for row in rows.values()):
                raise NotTheSlave
            if len(rows) != len(key_ids) or any(row is None or row[0] != master for row in rows.values()):
                raise KeysNotFound
            keys = [self._take(key_id, "own = 0 AND master IS NOT NULL") for key_id in key_ids]
            for row in rows.values():
                self._db.execute("UPDATE link SET fetched = fetched + 1 WHERE peer = ?", (row[2] if row else "",))
        return keys

    def expire(self, before: float) -> int:
        """Delete keys reserved before a time whose slave never came.  Returns how many."""
        with self._transaction():
            return self._db.execute("DELETE FROM key WHERE since IS NOT NULL AND since < ?", (before,)).rowcount

    def counts(self, peer: str) -> Counts:
        kinds = dict(
            self._db.execute(
                "SELECT CASE WHEN master IS NOT NULL THEN 'reserved' WHEN own = 1 THEN 'own' ELSE 'peer' END,"
                " count(*) FROM key WHERE peer = ? GROUP BY 1",
                (peer,),
            ).fetchall()
        )
        row = self._db.execute("SELECT issued, fetched FROM link WHERE peer = ?", (peer,)).fetchone()
        return Counts(kinds.get("own", 0), kinds.get("peer", 0), kinds.get("reserved", 0), *(row or (0, 0)))

    def _reserved(self, key_id: str) -> tuple[str, str, str] | None:
        row: tuple[str, str, str] | None = self._db.execute(
            "SELECT master, slave, peer FROM key WHERE key_id = ? AND own = 0 AND master IS NOT NULL", (key_id,)
        ).fetchone()
        return row

    def _take(self, key_id: str, condition: str) -> StoredKey:
        rows = self._db.execute(
            f"DELETE FROM key WHERE key_id = ? AND {condition} RETURNING key_id, material, origin, hops",
            (key_id,),
        ).fetchall()
        if not rows:
            raise KeysNotFound
        return StoredKey(rows[0][0], bytearray(rows[0][1]), Origin(rows[0][2]), rows[0][3])

    def _adopt(self, kme_id: str) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE name = 'kme'").fetchone()
        if row is None:
            self._db.execute("INSERT INTO meta VALUES ('kme', ?)", (kme_id,))
        elif row[0] != kme_id:
            raise StoreError(f"{self.path}: this is the store of KME {row[0]!r}, not of {kme_id!r}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has rolled back already
                self._db.execute("ROLLBACK")
            raise


def _rows(link: LinkRow, block: int, keys: bytearray) -> Iterator[tuple[object, ...]]:
    for position in range(len(keys) // KEY_BYTES):
        material = bytes(keys[position * KEY_BYTES : (position + 1) * KEY_BYTES])
        own = int(link.owner.of(position) is link.end)
        key_id = derive_key_id(link.name, block, position)
        yield key_id, link.peer, own, block, position, link.origin.value, link.hops, material


def _private_lock(path: Path) -> int:
    """Make folder (0700) and file (0600), and lock them against a second process."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.parent.stat().st_mode & 0o777
        if mode & 0o077:
            raise StoreError(f"{path.parent}: mode {mode:04o} lets others in; it must be 0700")
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if path.stat().st_mode & 0o077:
            raise StoreError(f"{path}: others may read it; it must have mode 0600")
    except BlockingIOError:
        os.close(lock)
        raise StoreError(f"{path}: another KME process uses this store") from None
    except OSError as error:
        os.close(lock)
        raise StoreError(f"{path}: {error.strerror}") from None
    except StoreError:
        os.close(lock)
        raise
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA secure_delete=ON")
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from None
    return db
