"""The store's files: who may open them, what tables they have, and stores of an older release.

:data:`VERSION` is SQLite's ``user_version``.  Version 0 with tables is the first release's store: one table, key
bytes in clear.  It is brought up in one transaction; then the file is written anew, so that no page holds them.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from keysource.kme import crashpoints
from keysource.kme.records import UNIT_BITS, StoreError

VERSION = 2
MAX_BLOCK = 2**63 - 1
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
"""
_KEYS = """
CREATE TABLE key (               -- free units of a link
    key_id TEXT PRIMARY KEY,
    peer TEXT NOT NULL,
    own INTEGER NOT NULL,        -- 1: issued at this end
    block INTEGER NOT NULL,
    position INTEGER NOT NULL,
    origin TEXT NOT NULL,
    hops INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    material BLOB NOT NULL       -- wrapped under the epoch's key
) WITHOUT ROWID;
CREATE INDEX key_order ON key (peer, own, block, position);
CREATE INDEX key_epoch ON key (epoch);
CREATE TABLE delivery (          -- keys that wait for a slave, a row for each slave
    key_id TEXT NOT NULL,
    slave TEXT NOT NULL,
    master TEXT NOT NULL,
    peer TEXT NOT NULL,
    size INTEGER NOT NULL,       -- bits
    origin TEXT NOT NULL,
    hops INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    material BLOB,               -- wrapped; NULL once this slave has it and another has not
    token TEXT NOT NULL,         -- names the one offer that reserved the key
    since REAL NOT NULL,
    PRIMARY KEY (key_id, slave)
) WITHOUT ROWID;
CREATE INDEX delivery_peer ON delivery (peer);
CREATE INDEX delivery_since ON delivery (since);
CREATE INDEX delivery_epoch ON delivery (epoch);
"""
Seal = Callable[[bytes, bytes], tuple[int, bytes]]
"""label, bytes -> epoch, wrapped bytes."""


def unit_label(key_id: str, peer: str, own: int) -> bytes:
    """What the wrapping of a free unit is bound to."""
    return "\0".join(("unit", key_id, peer, str(own))).encode()


def delivery_label(key_id: str, slave: str, master: str) -> bytes:
    """What the wrapping of a waiting key is bound to: a row made over to another slave cannot be read."""
    return "\0".join(("delivery", key_id, slave, master)).encode()


def private_lock(path: Path) -> int:
    """Make folder (0700) and file (0600), and lock them against a second process.  Raises :class:`StoreError`."""
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


def connect(path: Path) -> sqlite3.Connection:
    """Raises :class:`StoreError`: no database, or one of a newer release."""
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA secure_delete=ON")
        version = _version(db)
        if version > VERSION:
            db.close()
            raise StoreError(f"{path}: a newer release wrote this store (version {version})")
        if version == 0 and not _has_tables(db):
            db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}{_KEYS}PRAGMA user_version={VERSION};COMMIT;")
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from None
    return db


def migrate(db: sqlite3.Connection, seal: Seal) -> bool:
    """Bring a store of the first release up to date; True where there was one."""
    if _version(db) == 0:
        db.execute("BEGIN IMMEDIATE")
        try:
            _first_release(db, seal)
            crashpoints.at("migrate.in-transaction")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        crashpoints.at("migrate.committed")
    if db.execute("SELECT 1 FROM meta WHERE name = 'unclean'").fetchone() is None:
        return False
    db.execute("VACUUM")  # no free page keeps a key in clear; done again where a crash came before the next line
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.execute("DELETE FROM meta WHERE name = 'unclean'")
    return True


def _first_release(db: sqlite3.Connection, seal: Seal) -> None:
    old = "SELECT key_id, peer, own, block, position, origin, hops, material, master, slave, token, since FROM key_v0"
    for index in ("key_order", "key_since"):
        db.execute(f"DROP INDEX IF EXISTS {index}")
    db.execute("ALTER TABLE key RENAME TO key_v0")
    for statement in _KEYS.split(";\n"):
        db.execute(statement)
    for row in db.execute(old).fetchall():
        key_id, peer, own, block, position, origin, hops, material, master, slave, token, since = row
        if master is None:
            sealed = seal(unit_label(key_id, peer, own), material)
            values = (key_id, peer, own, block, position, origin, hops, *sealed)
            db.execute("INSERT INTO key VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        else:
            sealed = seal(delivery_label(key_id, slave, master), material)
            waiting = (key_id, slave, master, peer, UNIT_BITS, origin, hops, *sealed, token, since)
            db.execute("INSERT INTO delivery VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", waiting)
    db.execute("DROP TABLE key_v0")
    db.execute("INSERT INTO meta VALUES ('unclean', 'keys lay here in clear')")
    db.execute(f"PRAGMA user_version={VERSION}")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _has_tables(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
