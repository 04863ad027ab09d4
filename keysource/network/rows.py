"""The file of a node's store: its tables, what each wrapped row is bound to, and files of an older release.

A row's key bytes are wrapped with AES-GCM over a label that says everything the node will believe about them: whose
unit it is and what it claims to be, or where a block came from and over which ways.  A row that is edited, or that
gets another row's bytes, cannot be unwrapped; it is deleted, and the log says so.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keysource.base import End, Origin, Owner, wipe
from keysource.kme.epochs import Epochs
from keysource.kme.records import Damaged, StoreError
from keysource.kme.schema import immediate
from keysource.network import crashes

VERSION = 2
_SAME = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE link (
    name TEXT PRIMARY KEY,
    end TEXT NOT NULL,
    owner TEXT NOT NULL,
    next_block INTEGER NOT NULL,    -- all blocks below were received
    alarm TEXT NOT NULL,            -- '' or what the device said last
    seen_block INTEGER NOT NULL,    -- how far the other end was seen to use its units
    seen_position INTEGER NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE connection (
    name TEXT PRIMARY KEY,
    next_block INTEGER NOT NULL,    -- lowest number that was never used
    last_transfer TEXT NOT NULL     -- of the last block that was committed
) WITHOUT ROWID""",
)
_SINCE_2 = (
    """CREATE TABLE unit (             -- free units of a link
    key_id TEXT PRIMARY KEY,
    link TEXT NOT NULL,
    own INTEGER NOT NULL,           -- 1: masks what is sent from here
    block INTEGER NOT NULL,
    position INTEGER NOT NULL,
    origin TEXT NOT NULL,           -- what the map said of the link when the unit came
    epoch INTEGER NOT NULL,
    material BLOB NOT NULL          -- wrapped under the epoch's key
) WITHOUT ROWID""",
    "CREATE INDEX unit_order ON unit (link, own, block, position)",
    "CREATE INDEX unit_epoch ON unit (epoch)",
    """CREATE TABLE block (            -- keys of a connection
    connection TEXT NOT NULL,
    block INTEGER NOT NULL,
    transfer TEXT NOT NULL,
    prepared INTEGER NOT NULL,      -- 1: the target was, or may have been, asked; 0: to be delivered
    facts TEXT NOT NULL,            -- origin, trusted nodes and paths
    tag BLOB NOT NULL,
    epoch INTEGER NOT NULL,
    material BLOB NOT NULL,
    PRIMARY KEY (connection, block)
) WITHOUT ROWID""",
    "CREATE INDEX block_epoch ON block (epoch)",
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What travels with a block's keys."""

    origin: Origin
    hops: int
    paths: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        return json.dumps({"origin": self.origin.value, "hops": self.hops, "paths": self.paths})

    @classmethod
    def from_text(cls, text: str) -> Facts:
        read = json.loads(text)
        return cls(Origin(read["origin"]), read["hops"], tuple(tuple(path) for path in read["paths"]))


@dataclass(frozen=True, slots=True)
class Block:
    """Keys of a connection."""

    connection: str
    block: int
    transfer: str
    facts: Facts
    keys: bytearray = field(repr=False)
    tag: bytes = field(default=b"", repr=False)
    """The initiator's confirmation, while the block is only prepared."""


@dataclass(frozen=True, slots=True)
class LinkStore:
    """What is remembered of a link; ``own`` and ``peers`` count free units."""

    name: str
    end: End
    owner: Owner
    next_block: int
    alarm: str
    own: int
    peers: int


def unit_label(key_id: str, link: str, own: int, block: int, position: int, origin: str) -> bytes:
    """What the wrapping of a free unit is bound to.  With ``own`` turned round both ends would mask under it."""
    return json.dumps(["unit 2", key_id, link, own, block, position, origin], default=repr).encode()


def block_label(connection: str, block: int, transfer: str, prepared: int, facts: str, tag: bytes) -> bytes:
    """What the wrapping of a block is bound to: origin, trusted nodes and paths are in ``facts``."""
    fields = ["block 2", connection, block, transfer, prepared, facts, repr(tag)]
    return json.dumps(fields, default=repr).encode()


def connect(path: Path, node: str) -> sqlite3.Connection:
    """The file, with tables; perhaps those of an older release.  Raises :class:`StoreError`."""
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from None
    try:
        _set_up(db, path, node)
    except sqlite3.Error as error:
        db.close()
        raise StoreError(f"{path}: {error}") from None
    except StoreError:
        db.close()
        raise
    return db


def _set_up(db: sqlite3.Connection, path: Path, node: str) -> None:
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA secure_delete=ON")
    if _version(db) == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        with immediate(db):
            _make(db, (*_SAME, *_SINCE_2))
    if not 1 <= (version := _version(db)) <= VERSION:
        raise StoreError(f"{path}: this is no node's store of this release (version {version})")
    db.execute("INSERT OR IGNORE INTO meta VALUES ('node', ?)", (node,))
    (known,) = db.execute("SELECT value FROM meta WHERE name = 'node'").fetchone()
    if known != node:
        raise StoreError(f"{path}: this is the store of node {known!r}, not of {node!r}")


def epochs_of(db: sqlite3.Connection) -> set[int]:
    """Epochs that rows are wrapped under."""
    tables = ("secret",) if _version(db) == 1 else ("unit", "block")
    query = " UNION ".join(f"SELECT epoch FROM {table}" for table in tables)
    return {row[0] for row in db.execute(query)}


def migrate(db: sqlite3.Connection, epochs: Epochs) -> int:
    """Bring a store of release 1 up to date, all of it or nothing.  Returns how many units it lost.

    Its units were bound to nothing but their key_ID, so whose they are and what they claim cannot be believed: they
    go, and the link makes new ones.  Its blocks stay, for the other end may have them already; from now on they are
    bound to what stands beside them.
    """
    if _version(db) == VERSION:
        return 0
    with immediate(db):
        (lost,) = db.execute("SELECT count(*) FROM unit").fetchone()
        found = db.execute(
            "SELECT connection, block, transfer, prepared, facts, tag, epoch, material FROM block"
            " JOIN secret ON name = 'block/' || block || '/' || connection"
        ).fetchall()
        for table in ("unit", "block", "secret"):
            db.execute(f"DROP TABLE {table}")
        _make(db, _SINCE_2)
        for *fields, epoch, blob in found:
            try:
                material = epochs.unseal(epoch, f"block/{fields[1]}/{fields[0]}".encode(), blob)
            except Damaged:  # nobody can have it
                continue
            insert_block(db, epochs, fields, material)
            wipe(material)
        crashes.at("migrate.in-transaction")
    return int(lost)


def insert_block(db: sqlite3.Connection, epochs: Epochs, fields: Sequence[Any], material: bytes | bytearray) -> None:
    """``fields`` are those of :func:`block_label`."""
    sealed = epochs.seal(block_label(*fields), material)
    db.execute("INSERT INTO block VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*fields, epochs.current, sealed))


def _make(db: sqlite3.Connection, tables: tuple[str, ...]) -> None:
    for table in tables:
        db.execute(table)
    db.execute(f"PRAGMA user_version={VERSION}")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
