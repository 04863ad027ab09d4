"""The SQLite store's file: who may open it, what tables it has, and files of an older release.

A new file gets the tables of :data:`keysource.kme.migrate.HEAD` at once; an older one is brought there step by step
(:mod:`keysource.kme.migrate`).  SQLite's ``user_version`` tells the steps before there was a table for that; it is
:data:`VERSION` from then on, so that a release that only knows ``user_version`` leaves the file alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from keysource.kme.migrate import HEAD, known
from keysource.kme.records import StoreError

VERSION = 3
MAX_BLOCK = 2**63 - 1
TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE link (
    peer TEXT PRIMARY KEY,       -- KME at the other end
    name TEXT NOT NULL,          -- of the link, as both devices say it
    "end" TEXT NOT NULL,
    owner TEXT NOT NULL,
    origin TEXT NOT NULL,
    hops INTEGER NOT NULL,
    next_block INTEGER NOT NULL, -- all blocks below were received
    alarm TEXT NOT NULL,         -- '' or what the device said last
    issued INTEGER NOT NULL,     -- keys given to masters here
    fetched INTEGER NOT NULL     -- keys given to slaves here
) WITHOUT ROWID;
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
CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc
    PRIMARY KEY (version_num));
"""


def unit_label(key_id: str, peer: str, own: int, origin: str, hops: int) -> bytes:
    """What the wrapping of a free unit is bound to: all that is believed about it when it is issued."""
    return "\0".join(("unit 3", key_id, peer, str(int(own)), origin, str(hops))).encode()


def delivery_label(key_id: str, slave: str, master: str, peer: str, size: int, origin: str, hops: int) -> bytes:
    """What the wrapping of a waiting key is bound to: a row that is made over to another slave, or to a better
    origin, cannot be read."""
    return "\0".join(("delivery 3", key_id, slave, master, peer, str(size), origin, str(hops))).encode()


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
        if db.execute("PRAGMA user_version").fetchone()[0] == 0 and not _has_tables(db):
            stamp = f"INSERT INTO alembic_version VALUES ('{HEAD}');"
            db.executescript(f"BEGIN IMMEDIATE;{TABLES}{stamp}PRAGMA user_version={VERSION};COMMIT;")
        revision = revision_of(db)
        if not known(revision):
            db.close()
            raise StoreError(f"{path}: a newer release wrote this store (step {revision})")
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from None
    return db


@contextlib.contextmanager
def immediate(db: sqlite3.Connection) -> Iterator[None]:
    """All of it, on the disk when this returns, or nothing; the lock for writing is taken first."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk has rolled back already
            db.execute("ROLLBACK")
        raise


def revision_of(db: sqlite3.Connection) -> str:
    """The step that a file is at."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version < VERSION:
        return "0002" if version else "0001"
    if version > VERSION:
        return f"of user_version {version}"
    return str(db.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def _has_tables(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
