"""What a node must not forget, and must not use twice: link units, blocks about to be committed, blocks to deliver.

SQLite like the KME's store, its tables being others (:mod:`keysource.network.rows`): every method is one transaction,
on the disk (WAL, ``synchronous=FULL``) when it returns.  Units leave it *before* they mask anything, and a pad is
gone before its share is acknowledged.  Key bytes lie wrapped under the key of an epoch (:mod:`keysource.kme.epochs`),
bound to all that stands beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from keysource.base import KEY_BYTES, End, Origin, Owner, derive_key_id, wipe
from keysource.kme.epochs import EpochKeys, new_site_key, read_site_key
from keysource.kme.records import Damaged, StoreError, at_most
from keysource.kme.schema import MAX_BLOCK, immediate, private_lock
from keysource.network import crashes, rows
from keysource.network.errors import Lacking, TooFew
from keysource.network.rows import Block, Facts, LinkStore

_REWRAP_AT_ONCE = 256
_UNIT = "key_id, link, own, block, position, origin"
_BLOCK = "connection, block, transfer, prepared, facts, tag"


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
        self.damage: list[str] = []
        """Sentences about rows that were found edited or damaged, for the log; whoever logs them takes them out."""
        self._lock = private_lock(path)
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, self._lock)
            self._db = rows.connect(path, node)
            failed.callback(self._db.close)
            key = read_site_key(site_key or _own_site_key(path))
            self._epochs = EpochKeys(epoch_keys or path.with_name(path.name + ".epochs"), key, node)
            failed.callback(self._epochs.close)
            self._epochs.settle(rows.epochs_of(self._db))
            if not self._epochs.current:
                self.begin_epoch(now)
            if lost := rows.migrate(self._db, self._epochs):
                self.damage.append(f"{lost} units of a release that did not bind them to their link were dropped")
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
            found = self._old("unit", _UNIT)
            for *fields, epoch, blob in found:
                if material := self._opened(rows.unit_label(*fields), epoch, blob, _unit_name(fields)):
                    self._put_unit(fields, material)
                    wipe(material)
                else:  # else no old epoch could ever be destroyed, and the eight slots would fill
                    self._drop([fields[0]])
            blocks = self._old("block", _BLOCK)
            for *fields, epoch, blob in blocks:
                material = self._opened(rows.block_label(*fields), epoch, blob, _block_name(fields))
                self._delete_block(fields[0], fields[1])
                if material:
                    rows.insert_block(self._db, self._epochs, fields, material)
                    wipe(material)
        if not found and not blocks:
            for number in self._epochs.alive[:-1]:
                self._epochs.destroy(number)
        return bool(found or blocks)

    def _old(self, table: str, columns: str) -> list[Any]:
        query = f"SELECT {columns}, epoch, material FROM {table} WHERE epoch < ? LIMIT ?"
        return self._db.execute(query, (self._epochs.current, _REWRAP_AT_ONCE)).fetchall()

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

    def add_block(self, name: str, block: int, keys: bytearray, origin: Origin) -> bool:
        """Store a device's block; False where it was received before.  Older units make room for it.  ``origin`` is
        what the map says of the link."""
        link = self.link(name)
        if link is None or block >= MAX_BLOCK:
            raise StoreError(f"{self.path}: a block {block} of link {name!r}, which was not bound")
        if block < link.next_block:
            return False
        with self._transaction():
            for position in range(len(keys) // KEY_BYTES):
                own = int(link.owner.of(position) is link.end)
                fields = (derive_key_id(name, block, position), name, own, block, position, origin.value)
                self._put_unit(fields, keys[position * KEY_BYTES : (position + 1) * KEY_BYTES])
            self._db.execute("UPDATE link SET next_block = ? WHERE name = ?", (block + 1, name))
            self._make_room(name, link.own + link.peers + len(keys) // KEY_BYTES - self._max_units)
            crashes.at("block.in-transaction")
        crashes.at("block.stored")
        return True

    def drop_worse(self, name: str, origin: Origin) -> int:
        """Delete units of a link that came while the map claimed less of it than it claims now: they must not make a
        key that says more.  Returns how many."""
        worse = [known.value for known in Origin if not at_most(origin, known)]
        query = "DELETE FROM unit WHERE link = ? AND origin IN (SELECT value FROM json_each(?))"
        with self._transaction():
            return self._db.execute(query, (name, json.dumps(worse))).rowcount

    def void(self, name: str, before: int, *, own_only: bool = False) -> int:
        """Delete units of blocks below ``before``.  Returns how many."""
        query = "DELETE FROM unit WHERE link = ? AND block < ? AND own >= ?"
        with self._transaction():
            return self._db.execute(query, (name, min(before, MAX_BLOCK), int(own_only))).rowcount

    def draw(self, name: str, count: int) -> list[tuple[str, bytearray]]:
        """Delete the oldest own units and return them: whatever happens next, they are spent.

        Raises:
            TooFew: nothing was drawn.
        """
        order = "WHERE link = ? AND own = 1 ORDER BY block, position LIMIT ?"
        query = f"SELECT {_UNIT}, epoch, material FROM unit {order}"
        with self._transaction():
            found = self._db.execute(query, (name, count)).fetchall()
            if len(found) < count:
                raise TooFew(f"link {name!r} has {len(found)} units to send with; a hop costs {count}")
            drawn = [(row[0], self._unit(row)) for row in found]
            self._drop([row[0] for row in found])
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
        query = f"SELECT {_UNIT}, epoch, material FROM unit WHERE key_id = ? AND link = ? AND own = 0"
        with self._transaction():
            found = [self._db.execute(query, (key_id, name)).fetchone() for key_id in key_ids]
            if None in found:
                raise self._lacking(name)
            spent = [self._unit(row) for row in found]
            self._note_seen(name, max((row[3], row[4]) for row in found))
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

    def _note_seen(self, name: str, latest: tuple[int, int]) -> None:
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
            over -= self._db.execute("DELETE FROM unit WHERE link = ? AND block = ?", (name, oldest)).rowcount

    def _drop(self, key_ids: Iterable[str]) -> None:
        self._db.executemany("DELETE FROM unit WHERE key_id = ?", [(key_id,) for key_id in key_ids])

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
        with self._transaction():
            self._delete_block(block.connection, block.block)
            if committed:
                self._insert(block, prepared=0)
                self._committed(block)
            crashes.at("settle.in-transaction")
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
        query = "DELETE FROM block WHERE connection = ? AND block < ? AND prepared = 0"
        with self._transaction():
            self._db.execute(query, (connection, min(before, MAX_BLOCK)))
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
        fields = (block.connection, block.block, block.transfer, prepared, block.facts.text(), block.tag)
        rows.insert_block(self._db, self._epochs, fields, block.keys)

    def _delete_block(self, connection: str, block: int) -> None:
        self._db.execute("DELETE FROM block WHERE connection = ? AND block = ?", (connection, block))

    def _blocks(self, connection: str, *, prepared: int) -> list[Block]:
        where = "WHERE connection = ? AND prepared = ? ORDER BY block"
        query = f"SELECT {_BLOCK}, epoch, material FROM block {where}"
        found = []
        for *fields, epoch, blob in self._db.execute(query, (connection, prepared)).fetchall():
            keys = self._opened(rows.block_label(*fields), epoch, blob, _block_name(fields))
            if keys is None:  # nobody can have it; left there it would end the node at every start
                with self._transaction():
                    self._delete_block(fields[0], fields[1])
                continue
            _connection, block, transfer, _prepared, facts, tag = fields
            found.append(Block(connection, block, transfer, Facts.from_text(facts), keys, tag))
        return found

    # Rows

    def _put_unit(self, fields: Sequence[Any], material: bytes | bytearray) -> None:
        sealed = self._epochs.seal(rows.unit_label(*fields), material)
        query = "INSERT OR REPLACE INTO unit VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        self._db.execute(query, (*fields, self._epochs.current, sealed))

    def _unit(self, row: Sequence[Any]) -> bytearray | None:
        """None where it is damaged: it must go too, or it would stop every draw to come."""
        *fields, epoch, blob = row
        return self._opened(rows.unit_label(*fields), epoch, blob, _unit_name(fields))

    def _opened(self, label: bytes, epoch: int, blob: bytes, name: str) -> bytearray | None:
        try:
            return self._epochs.unseal(epoch, label, blob)
        except (Damaged, TypeError):
            self.damage.append(f"{name} was edited or damaged on the disk, and is gone")
            return None

    def _transaction(self) -> contextlib.AbstractContextManager[None]:
        return immediate(self._db)


def _unit_name(fields: Sequence[Any]) -> str:
    return f"the unit at block {fields[3]}, position {fields[4]} of link {fields[1]!r}"


def _block_name(fields: Sequence[Any]) -> str:
    return f"block {fields[1]} of connection {fields[0]!r}"


def _own_site_key(path: Path) -> Path:
    path = path.with_name(path.name + ".site-key")
    try:
        new_site_key(path)
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    return path
