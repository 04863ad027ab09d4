"""What a node must not forget, and must not use twice: link units, blocks about to be committed, blocks to deliver.

SQLite like the KME's store, its tables being others: every method is one transaction, on the disk (WAL,
``synchronous=FULL``) when it returns.  Units leave it *before* they mask anything, and a pad is gone before its
share is acknowledged.  Key bytes lie wrapped under the key of an epoch (:mod:`keysource.kme.epochs`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keysource.base import KEY_BYTES, End, Origin, Owner, derive_key_id, wipe
from keysource.kme.epochs import EpochKeys, new_site_key, read_site_key
from keysource.kme.records import Damaged, StoreError
from keysource.kme.schema import MAX_BLOCK, immediate, private_lock
from keysource.network import crashes
from keysource.network.errors import Lacking, TooFew

_VERSION = 1
_REWRAP_AT_ONCE = 256
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE link (name TEXT PRIMARY KEY, end TEXT NOT NULL, owner TEXT NOT NULL, next_block INTEGER NOT NULL,
    alarm TEXT NOT NULL, seen_block INTEGER NOT NULL, seen_position INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE unit (key_id TEXT PRIMARY KEY, link TEXT NOT NULL, own INTEGER NOT NULL, block INTEGER NOT NULL,
    position INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX unit_order ON unit (link, own, block, position);
CREATE TABLE connection (name TEXT PRIMARY KEY, next_block INTEGER NOT NULL, last_transfer TEXT NOT NULL)
    WITHOUT ROWID;
CREATE TABLE block (connection TEXT NOT NULL, block INTEGER NOT NULL, transfer TEXT NOT NULL, prepared INTEGER NOT
    NULL, facts TEXT NOT NULL, tag BLOB NOT NULL, PRIMARY KEY (connection, block)) WITHOUT ROWID;
CREATE TABLE secret (name TEXT PRIMARY KEY, epoch INTEGER NOT NULL, material BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX secret_epoch ON secret (epoch);
"""


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


class NodeStore:
    """See the module.  One thread at a time."""

    def __init__(
        self,
        path: Path,
        node: str,
        *,
        max_units: int,
        site_key: Path | None = None,
        epoch_keys: Path | None = None,
        now: float = 0.0,
    ) -> None:
        """Raises :class:`StoreError`."""
        self.path, self._max_units = path, max_units
        self._lock = private_lock(path)
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, self._lock)
            self._db = _connect(path, node)
            failed.callback(self._db.close)
            key = read_site_key(site_key or _own_site_key(path))
            self._epochs = EpochKeys(epoch_keys or path.with_name(path.name + ".epochs"), key, node)
            failed.callback(self._epochs.close)
            self._epochs.settle({row[0] for row in self._db.execute("SELECT DISTINCT epoch FROM secret")})
            if not self._epochs.current:
                self.begin_epoch(now)
            failed.pop_all()

    def close(self) -> None:
        self._db.close()
        self._epochs.close()
        os.close(self._lock)

    # Epochs

    @property
    def epoch_began(self) -> float:
        return self._epochs.begun

    def begin_epoch(self, now: float) -> None:
        """New rows are wrapped under a new key; the old ones follow with :meth:`rewrap`."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
        last = max(int(row[0]) if row else 0, self._epochs.current)
        with self._transaction():  # a number never comes back
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (str(last + 1),))
        self._epochs.begin(last + 1, now)

    def rewrap(self) -> bool:
        """Wrap some old rows anew.  False when none is left: then all old epochs are destroyed."""
        current = self._epochs.current
        if self._epochs.alive == [current]:
            return False
        with self._transaction():
            query = "SELECT name, epoch, material FROM secret WHERE epoch < ? LIMIT ?"
            found = self._db.execute(query, (current, _REWRAP_AT_ONCE)).fetchall()
            for name, epoch, blob in found:
                try:
                    material = self._epochs.unseal(epoch, name.encode(), blob)
                except Damaged:  # else no old epoch could ever be destroyed, and the eight slots would fill
                    self._db.execute("DELETE FROM secret WHERE name = ?", (name,))
                    continue
                self._put(name, material)
                wipe(material)
        if not found:
            for number in self._epochs.alive[:-1]:
                self._epochs.destroy(number)
        return bool(found)

    # Links

    def link(self, name: str) -> LinkStore | None:
        row = self._db.execute("SELECT end, owner, next_block, alarm FROM link WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        query = "SELECT own, count(*) FROM unit WHERE link = ? GROUP BY own"
        free = dict(self._db.execute(query, (name,)).fetchall())
        return LinkStore(name, End(row[0]), Owner(row[1]), row[2], row[3], free.get(1, 0), free.get(0, 0))

    def sendable(self, name: str, most: int) -> int:
        """Own free units, counted up to ``most``."""
        query = "SELECT count(*) FROM (SELECT 1 FROM unit WHERE link = ? AND own = 1 LIMIT ?)"
        return int(self._db.execute(query, (name, most)).fetchone()[0])

    def bind_link(self, name: str, end: End, owner: Owner) -> int:
        """Remember what the device says; the end never changes.  Returns the next block.  ``StoreError``."""
        known = self.link(name)
        if known and known.end is not end:
            raise StoreError(f"{self.path}: link {name!r} was end {known.end.value!r} here, not {end.value!r}")
        with self._transaction():
            self._db.execute(
                "INSERT INTO link VALUES (?, ?, ?, 0, '', -1, -1)"
                " ON CONFLICT (name) DO UPDATE SET owner = excluded.owner",
                (name, end.value, owner.value),
            )
        return known.next_block if known else 0

    def set_alarm(self, name: str, alarm: str) -> None:
        with self._transaction():
            self._db.execute("UPDATE link SET alarm = ? WHERE name = ?", (alarm, name))

    def add_block(self, name: str, block: int, keys: bytearray) -> bool:
        """Store a device's block; False where it was received before.  Older units make room for it."""
        link = self.link(name)
        if link is None or block >= MAX_BLOCK:
            raise StoreError(f"{self.path}: a block {block} of link {name!r}, which was not bound")
        if block < link.next_block:
            return False
        with self._transaction():
            for position in range(len(keys) // KEY_BYTES):
                key_id = derive_key_id(name, block, position)
                own = int(link.owner.of(position) is link.end)
                self._db.execute("INSERT INTO unit VALUES (?, ?, ?, ?, ?)", (key_id, name, own, block, position))
                self._put(f"unit/{key_id}", keys[position * KEY_BYTES : (position + 1) * KEY_BYTES])
            self._db.execute("UPDATE link SET next_block = ? WHERE name = ?", (block + 1, name))
            self._make_room(name, link.own + link.peers + len(keys) // KEY_BYTES - self._max_units)
        crashes.at("block.stored")
        return True

    def void(self, name: str, before: int, *, own_only: bool = False) -> int:
        """Delete units of blocks below ``before``.  Returns how many."""
        query = "SELECT key_id FROM unit WHERE link = ? AND block < ? AND own >= ?"
        with self._transaction():
            rows = self._db.execute(query, (name, min(before, MAX_BLOCK), int(own_only))).fetchall()
            self._drop([row[0] for row in rows])
        return len(rows)

    def draw(self, name: str, count: int) -> list[tuple[str, bytearray]]:
        """Delete the oldest own units and return them: whatever happens next, they are spent.

        Raises:
            TooFew: nothing was drawn.
        """
        query = "SELECT key_id FROM unit WHERE link = ? AND own = 1 ORDER BY block, position LIMIT ?"
        with self._transaction():
            key_ids = [row[0] for row in self._db.execute(query, (name, count))]
            if len(key_ids) < count:
                raise TooFew(f"link {name!r} has {len(key_ids)} units to send with; a hop costs {count}")
            drawn = [(key_id, self._unit(key_id)) for key_id in key_ids]
            self._drop(key_ids)
            crashes.at("pad.in-transaction")
        crashes.at("pad.drawn")
        if any(unit is None for _key_id, unit in drawn):
            raise TooFew(f"a stored unit of link {name!r} is damaged; it is gone, with those drawn beside it")
        return [(key_id, unit) for key_id, unit in drawn if unit is not None]

    def spend(self, name: str, key_ids: Sequence[str]) -> list[bytearray]:
        """Delete units of the other end and return them, all or none.

        Raises:
            Lacking: one is not here.
        """
        with self._transaction():
            for key_id in key_ids:
                query = "SELECT 1 FROM unit WHERE key_id = ? AND link = ? AND own = 0"
                if self._db.execute(query, (key_id, name)).fetchone() is None:
                    raise self._lacking(name)
            self._note_seen(name, key_ids)
            spent = [self._unit(key_id) for key_id in key_ids]
            self._drop(key_ids)
            crashes.at("share.in-transaction")
        crashes.at("share.spent")
        if any(unit is None for unit in spent):
            raise self._lacking(name)
        return [unit for unit in spent if unit is not None]

    def seen(self, name: str) -> tuple[int, int]:
        """(block, position) of the other end's latest unit that was spent here; (-1, -1) where none was."""
        row = self._db.execute("SELECT seen_block, seen_position FROM link WHERE name = ?", (name,)).fetchone()
        return (row[0], row[1]) if row else (-1, -1)

    def is_behind(self, name: str, seen: tuple[int, int]) -> bool:
        """Is an own unit free that is no later than one that the other end has seen us use?

        Units are drawn in order, so this store is older than what was done with it: a restored backup or snapshot.
        """
        query = "SELECT 1 FROM unit WHERE link = ? AND own = 1 AND (block, position) <= (?, ?) LIMIT 1"
        return self._db.execute(query, (name, *seen)).fetchone() is not None

    def _note_seen(self, name: str, key_ids: Sequence[str]) -> None:
        marks = ", ".join("?" * len(key_ids))
        order = "ORDER BY block DESC, position DESC LIMIT 1"
        query = f"SELECT block, position FROM unit WHERE key_id IN ({marks}) {order}"
        latest = self._db.execute(query, list(key_ids)).fetchone()
        later = "name = ? AND (seen_block, seen_position) < (?, ?)"
        query = f"UPDATE link SET seen_block = ?, seen_position = ? WHERE {later}"
        self._db.execute(query, (*latest, name, *latest))

    def _lacking(self, name: str) -> Lacking:
        row = self._db.execute("SELECT min(block) FROM unit WHERE link = ? AND own = 0", (name,)).fetchone()
        link = self.link(name)
        next_block = link.next_block if link else 0
        return Lacking(next_block if row[0] is None else row[0], next_block)

    def _make_room(self, name: str, over: int) -> None:
        while over > 0:
            (oldest,) = self._db.execute("SELECT min(block) FROM unit WHERE link = ?", (name,)).fetchone()
            query = "SELECT key_id FROM unit WHERE link = ? AND block = ?"
            gone = [row[0] for row in self._db.execute(query, (name, oldest))]
            self._drop(gone)
            over -= len(gone)

    def _drop(self, key_ids: Sequence[str]) -> None:
        self._db.executemany("DELETE FROM unit WHERE key_id = ?", [(key_id,) for key_id in key_ids])
        self._db.executemany("DELETE FROM secret WHERE name = ?", [(f"unit/{key_id}",) for key_id in key_ids])

    # Blocks of connections

    def next_number(self, connection: str) -> int:
        """A block number that was never used; it is used now."""
        with self._transaction():
            number, _last = self._connection(connection)
            self._db.execute("UPDATE connection SET next_block = ? WHERE name = ?", (number + 1, connection))
        return number

    def last(self, connection: str) -> tuple[int, str]:
        """Lowest block number that may still come, and the transfer of the last block that was committed."""
        with self._transaction():
            return self._connection(connection)

    def prepare(self, block: Block) -> None:
        """The initiator's half: the block may be committed at the target from now on."""
        with self._transaction():
            self._insert(block, prepared=1)
            crashes.at("prepare.in-transaction")
        crashes.at("prepare.stored")

    def prepared(self, connection: str) -> Block | None:
        """The block about which the target was, or may have been, asked."""
        return next(iter(self._blocks(connection, prepared=1)), None)

    def settle(self, block: Block, *, committed: bool) -> None:
        """The target's word on a prepared block: it is to be delivered, or nobody ever has it."""
        key = (block.connection, block.block)
        with self._transaction():
            if committed:
                self._db.execute("UPDATE block SET prepared = 0 WHERE connection = ? AND block = ?", key)
                self._committed(block)
            else:
                self._db.execute("DELETE FROM block WHERE connection = ? AND block = ?", key)
                self._db.execute("DELETE FROM secret WHERE name = ?", (_secret_name(*key),))
        crashes.at("settle.stored")

    def commit(self, block: Block) -> None:
        """The target's half: to be delivered, and the word to the initiator is kept."""
        with self._transaction():
            self._insert(block, prepared=0)
            self._committed(block)
            crashes.at("commit.in-transaction")
        crashes.at("commit.stored")

    def outbox(self, connection: str) -> list[Block]:
        """Blocks to deliver, in order."""
        return self._blocks(connection, prepared=0)

    def delivered(self, connection: str, before: int) -> None:
        """Blocks below this number are safe at whoever uses them."""
        query = "SELECT block FROM block WHERE connection = ? AND block < ? AND prepared = 0"
        with self._transaction():
            for (number,) in self._db.execute(query, (connection, min(before, MAX_BLOCK))).fetchall():
                key = (connection, number)
                self._db.execute("DELETE FROM block WHERE connection = ? AND block = ?", key)
                self._db.execute("DELETE FROM secret WHERE name = ?", (_secret_name(*key),))
        crashes.at("delivered.stored")

    def _connection(self, name: str) -> tuple[int, str]:
        self._db.execute("INSERT OR IGNORE INTO connection VALUES (?, 0, '')", (name,))
        query = "SELECT next_block, last_transfer FROM connection WHERE name = ?"
        number, last = self._db.execute(query, (name,)).fetchone()
        return number, last

    def _committed(self, block: Block) -> None:
        self._connection(block.connection)
        query = "UPDATE connection SET next_block = max(next_block, ?), last_transfer = ? WHERE name = ?"
        self._db.execute(query, (block.block + 1, block.transfer, block.connection))

    def _insert(self, block: Block, *, prepared: int) -> None:
        values = (block.connection, block.block, block.transfer, prepared, block.facts.text(), block.tag)
        self._db.execute("INSERT INTO block VALUES (?, ?, ?, ?, ?, ?)", values)
        self._put(_secret_name(block.connection, block.block), block.keys)

    def _blocks(self, connection: str, *, prepared: int) -> list[Block]:
        query = "SELECT block, transfer, facts, tag FROM block WHERE connection = ? AND prepared = ? ORDER BY block"
        found = []
        for block, transfer, facts, tag in self._db.execute(query, (connection, prepared)).fetchall():
            try:
                keys = self._get(_secret_name(connection, block))
            except StoreError:  # nobody can have it; left there it would end the node at every start
                with self._transaction():
                    self._db.execute("DELETE FROM block WHERE connection = ? AND block = ?", (connection, block))
                    self._db.execute("DELETE FROM secret WHERE name = ?", (_secret_name(connection, block),))
                continue
            found.append(Block(connection, block, transfer, Facts.from_text(facts), keys, tag))
        return found

    # Rows

    def _put(self, name: str, material: bytes | bytearray) -> None:
        sealed = self._epochs.seal(name.encode(), material)
        self._db.execute("INSERT OR REPLACE INTO secret VALUES (?, ?, ?)", (name, self._epochs.current, sealed))

    def _unit(self, key_id: str) -> bytearray | None:
        """None where it is damaged: it must go too, or it would stop every draw to come."""
        try:
            return self._get(f"unit/{key_id}")
        except StoreError:
            return None

    def _get(self, name: str) -> bytearray:
        row: Any = self._db.execute("SELECT epoch, material FROM secret WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise StoreError(f"{self.path}: a stored key is missing")
        return self._epochs.unseal(row[0], name.encode(), row[1])

    def _transaction(self) -> contextlib.AbstractContextManager[None]:
        return immediate(self._db)


def _secret_name(connection: str, block: int) -> str:
    return f"block/{block}/{connection}"


def _connect(path: Path, node: str) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA secure_delete=ON")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={_VERSION};COMMIT;")
            version = _VERSION
        if version != _VERSION:
            raise StoreError(f"{path}: this is no node's store of this release (version {version})")
        db.execute("INSERT OR IGNORE INTO meta VALUES ('node', ?)", (node,))
        (known,) = db.execute("SELECT value FROM meta WHERE name = 'node'").fetchone()
        if known != node:
            raise StoreError(f"{path}: this is the store of node {known!r}, not of {node!r}")
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from None
    return db


def _own_site_key(store: Path) -> Path:
    path = store.with_name(store.name + ".site-key")
    try:
        new_site_key(path)
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    return path
