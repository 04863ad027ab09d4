"""One KME's keys at rest, written to the disk before anybody is told.  Synchronous; one thread at a time.

The two KMEs of a link have a store each and never share one.  A link delivers *units* of 256 bits; a key is made of
one or more of them.  A unit belongs to one end, a key is in one of two states::

    own units (this end issues them)    free ──── issue() ───▶ gone, bytes go to the master SAE
    the other end's units               free ─ reserve() ─▶ waiting for its slaves ─ fetch() ─▶ gone

Each arrow is one transaction, on the disk when it returns: in an SQLite file (:mod:`keysource.kme.store`), or at a
PostgreSQL server and its standby (:mod:`keysource.kme.postgres`), where several processes are at it at once and lock
the rows that they decide about.  So a crash may lose a key that was on its way out, and can never give one out twice.
Key bytes lie wrapped under the key of an epoch (:mod:`keysource.kme.epochs`): copies of what was deleted die with it.
"""

from __future__ import annotations

import hmac
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from keysource.base import KEY_BYTES, End, Origin, Owner, derive_key_id, wipe
from keysource.kme import crashpoints
from keysource.kme.records import (
    ANY,
    BadDeposit,
    Counts,
    Deposit,
    KeysNotFound,
    LinkRow,
    NotTheSlave,
    Offer,
    Reservation,
    StoredKey,
    StoreError,
    Terms,
    Unit,
    Wanted,
    at_most,
    deposit_tag,
    weakest,
    xor,
)
from keysource.kme.schema import MAX_BLOCK, delivery_label, unit_label
from keysource.kme.vault import Vault

Label = tuple[Origin, int]
"""Origin and hops of a key."""


def _rows_of(peer: str, terms: Terms, token: str) -> set[tuple[object, ...]]:
    """What a key that was reserved on these terms has, for each of its slaves."""
    return {(slave, peer, terms.master, terms.size, token) for slave in terms.slaves}


class KeyStore(Vault):
    """See the module.  Used from one thread at a time; :mod:`~keysource.kme.store` and
    :mod:`~keysource.kme.postgres` open one."""

    _for_update = ""
    """What a query says to have the rows for itself until the transaction is over."""

    def __init__(self, where: str, *, max_keys: int) -> None:
        """``where`` names it in messages."""
        self.where = where
        self._max_keys = max_keys
        self.migrated = False

    @abstractmethod
    def close(self) -> None:
        """Nothing is held any more."""

    @abstractmethod
    def health(self) -> dict[str, Any]:
        """For ``status``: kind, where it is, and what is special about it."""

    # Links

    def link(self, peer: str) -> LinkRow | None:
        columns = 'peer, name, "end", owner, origin, hops, next_block, alarm'
        row = self._db.execute(f"SELECT {columns} FROM link WHERE peer = ?", (peer,)).fetchone()
        if row is None:
            return None
        return LinkRow(row[0], row[1], End(row[2]), Owner(row[3]), Origin(row[4]), row[5], row[6], row[7])

    def bind_link(self, link: LinkRow) -> LinkRow:
        """Remember what the device says; name and end never change.  Raises :class:`StoreError`."""
        known = self.link(link.peer)
        if known and (known.name, known.end) != (link.name, link.end):
            raise StoreError(
                f"{self.where}: keys of the link to {link.peer!r} come from end {known.end.value!r} of"
                f" {known.name!r}; the device there says that it is end {link.end.value!r} of {link.name!r}"
            )
        if self._db.execute("SELECT 1 FROM link WHERE name = ? AND peer != ?", (link.name, link.peer)).fetchone():
            raise StoreError(
                f"{self.where}: another link is called {link.name!r} too; key_IDs come from a link's name, so two"
                " keys would have the same one: rename one of them at both its ends"
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

    # Units that arrive

    def add_block(self, link: LinkRow, block: int, keys: bytearray) -> bool:
        """Store a block; False where it was received before.  Older free units make room for it.

        Raises:
            StoreError: a block number that SQLite cannot hold.
        """
        if block > MAX_BLOCK - 1:
            raise StoreError(f"block number {block} is too large")
        with self._transaction():
            query = f"SELECT next_block FROM link WHERE peer = ?{self._for_update}"
            (next_block,) = self._db.execute(query, (link.peer,)).fetchone()
            if block < next_block:
                return False
            rows = self._rows(link, block, keys)
            self._db.executemany("INSERT INTO key VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.execute("UPDATE link SET next_block = ? WHERE peer = ?", (block + 1, link.peer))
            self._make_room(link.peer)
            crashpoints.at("block.in-transaction")
        crashpoints.at("block.stored")
        return True

    def void(self, peer: str, before: int) -> int:
        """The other end does not have blocks below ``before``: delete their free units.  Returns how many."""
        with self._transaction():
            return self._db.execute(
                "DELETE FROM key WHERE peer = ? AND block < ?", (peer, min(before, MAX_BLOCK))
            ).rowcount

    def _rows(self, link: LinkRow, block: int, keys: bytearray) -> Iterator[tuple[object, ...]]:
        for position in range(len(keys) // KEY_BYTES):
            material = keys[position * KEY_BYTES : (position + 1) * KEY_BYTES]
            own = int(link.owner.of(position) is link.end)
            key_id = derive_key_id(link.name, block, position)
            sealed = self.seal(unit_label(key_id, link.peer, own, link.origin.value, link.hops), material)
            wipe(material)
            yield key_id, link.peer, own, block, position, link.origin.value, link.hops, *sealed

    def _make_room(self, peer: str) -> None:
        count = "SELECT (SELECT count(*) FROM key WHERE peer = :p) + (SELECT count(*) FROM delivery WHERE peer = :p)"
        over = self._db.execute(count, {"p": peer}).fetchone()[0] - self._max_keys
        while over > 0:
            (oldest,) = self._db.execute("SELECT min(block) FROM key WHERE peer = ?", (peer,)).fetchone()
            if oldest is None:
                return  # all that is left waits for its slaves
            over -= self._db.execute("DELETE FROM key WHERE peer = ? AND block = ?", (peer, oldest)).rowcount

    # Master's side

    def free_own(self, peer: str, limit: int, wanted: Wanted = ANY) -> list[Unit]:
        """At most ``limit`` own free units, oldest first; of those, none that another process may offer now."""
        where, values = self._own(peer, wanted)
        query = f"SELECT key_id, block FROM key WHERE {where} ORDER BY block, position LIMIT ?"
        return [Unit(*row) for row in self._db.execute(query, [*values, limit])]

    @staticmethod
    def _own(peer: str, wanted: Wanted) -> tuple[str, list[object]]:
        """Condition and values for own free units of this kind."""
        where, values = "peer = ? AND own = 1", list[object]([peer])
        if wanted != ANY:
            where += f" AND hops <= ? AND origin IN ({', '.join('?' * len(wanted.origins))})"
            values += [wanted.max_hops, *(origin.value for origin in wanted.origins)]
        return where, values

    def drop_own(self, peer: str, key_ids: Collection[str], *, below: int, keep: Collection[str]) -> int:
        """Delete own free units that the other KME does not hold: ``key_ids`` and all below block ``below``, except
        ``keep``.  Returns how many."""
        with self._transaction():
            others, values = self._not_others()
            query = f"SELECT key_id FROM key WHERE peer = ? AND own = 1 AND block < ?{others}"
            found = self._db.execute(query, (peer, min(below, MAX_BLOCK), *values))
            gone = {row[0] for row in found} - set(keep) | set(key_ids)
            rows = [(key_id, peer) for key_id in gone]
            return self._db.executemany("DELETE FROM key WHERE key_id = ? AND peer = ? AND own = 1", rows).rowcount

    def issue(self, peer: str, keys: Sequence[Sequence[str]], size: int) -> list[StoredKey]:
        """Delete own free units and return the keys of ``size`` bits that they make, all or none.

        Each key is a list of units' key_IDs; the first names it.

        Raises:
            KeysNotFound: a unit is gone meanwhile.
            Alarmed: another process has heard of an alarm.
        """
        with self._taking() as taking:
            self._must_be_well(peer)
            taken = self._take(peer, [unit for units in keys for unit in units], 1, taking)
            made = [self.joined([taken[unit] for unit in units], size) for units in keys]
            self._count(peer, issued=len(made))
            crashpoints.at("enc.in-transaction")
        crashpoints.at("enc.committed")
        return made

    def take(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> list[list[StoredKey]]:
        """Delete own free units of several links, all or none: for keys that go to slaves at several KMEs.

        Raises:
            KeysNotFound: a unit is gone meanwhile.
        """
        with self._taking() as taking:
            for peer, _units in wanted:
                self._must_be_well(peer)
            taken = [list(self._take(peer, units, 1, taking).values()) for peer, units in wanted]
            crashpoints.at("multicast.in-transaction")
        crashpoints.at("multicast.taken")
        return taken

    def count_issued(self, peer: str, number: int) -> None:
        """Keys whose units were taken before went out."""
        with self._transaction():
            self._count(peer, issued=number)

    # Slave's side

    def reserve(self, peer: str, terms: Terms, offers: Sequence[Offer], now: float) -> Reservation:
        """Reserve keys made of the other end's units; the same offer may come twice.  ``now`` is in seconds."""
        missing: list[str] = []
        with self._taking() as taking:
            self._must_be_well(peer)
            units = [unit.key_id for offer in offers for unit in offer.units]
            self._lock_units(units)
            waiting = self._terms_of([offer.key_id for offer in offers])
            free, fresh, again = self._free(peer, units), list[Offer](), list[str]()
            for offer in offers:
                known = waiting.get(offer.key_id, set())
                if known == _rows_of(peer, terms, offer.token):
                    again.append(offer.key_id)
                    continue
                lacking = [unit.key_id for unit in offer.units if unit.key_id not in free]
                if lacking or known:  # a deposit came first under that name
                    missing += lacking or [offer.key_id]
                    continue
                fresh.append(offer)
            taken = self._take(peer, [unit.key_id for offer in fresh for unit in offer.units], 0, taking)
            keys = [self.joined([taken[unit.key_id] for unit in offer.units], terms.size) for offer in fresh]
            labels = self._wait(peer, terms, keys, [offer.token for offer in fresh], now)
            answer = self._reach(peer, missing, labels + self._labels(again))
            crashpoints.at("reserve.in-transaction")
        crashpoints.at("reserve.committed")
        return answer

    def deposit(self, peer: str, terms: Terms, deposits: Sequence[Deposit], now: float) -> Reservation:
        """Unmask keys that another link made, and have them wait for their slaves; all or none.

        Raises:
            BadDeposit: one is not authentic, claims a better origin than this link has, or takes another key's name.
        """
        link = self.link(peer)
        if link is None:
            return Reservation([unit.key_id for deposit in deposits for unit in deposit.units], 0, 0)
        fresh: list[Deposit] = []
        try:
            with self._taking() as taking:
                self._must_be_well(peer)
                units = [unit.key_id for deposit in deposits for unit in deposit.units]
                self._lock_units(units)
                waiting, free = self._terms_of([deposit.key_id for deposit in deposits]), self._free(peer, units)
                fresh = [d for d in deposits if waiting.get(d.key_id, set()) != _rows_of(peer, terms, d.token)]
                missing = [u.key_id for d in fresh for u in d.units if u.key_id not in free]
                labels = self._labels(waiting.keys() - {d.key_id for d in fresh})
                for deposit in fresh if not missing else ():
                    key = self._unmasked(link, terms, deposit, taking)
                    labels += self._wait(peer, terms, [key], [deposit.token], now)
                answer = self._reach(peer, missing, labels)
                crashpoints.at("deposit.in-transaction")
        except BadDeposit:
            self._delete(unit.key_id for deposit in fresh for unit in deposit.units)  # a pad serves once
            raise
        crashpoints.at("deposit.committed")
        return answer

    def withdraw(self, peer: str, tokens: Sequence[str]) -> int:
        """The other KME will not issue what it offered under these tokens.  Returns how many keys are gone."""
        with self._transaction():
            gone = 0
            for token in tokens:
                deleted = self._db.execute(
                    "DELETE FROM delivery WHERE peer = ? AND token = ? RETURNING key_id", (peer, token)
                )
                gone += len({row[0] for row in deleted.fetchall()})
            crashpoints.at("withdraw.in-transaction")
        crashpoints.at("withdraw.committed")
        return gone

    def fetch(self, master: str, slave: str, key_ids: Sequence[str], *, may: bool = True) -> list[StoredKey]:
        """Delete keys that wait for this slave of this master and return them, all or none.

        ``may``: these two may (still) share keys.

        Raises:
            NotTheSlave: one waits, or waited, for other slaves only; or they may not.
            KeysNotFound: one is not here, was fetched, or is another master's.
        """
        with self._taking() as taking:
            self._lock_waiting(key_ids)
            waiting = self._waiting(key_ids)
            if any(slave not in slaves for slaves in waiting.values()):
                raise NotTheSlave
            mine = [waiting.get(key_id, {}).get(slave) for key_id in key_ids]
            if len(waiting) != len(key_ids) or any(row is None or row != (master, False) for row in mine):
                raise KeysNotFound
            if not may:
                raise NotTheSlave
            keys = self._hand_over(key_ids, slave, master, taking)
            crashpoints.at("dec.in-transaction")
        crashpoints.at("dec.committed")
        return keys

    def expire(self, before: float) -> int:
        """Delete keys reserved before a time for which a slave never came.  Returns how many it were."""
        with self._transaction():
            rows = self._db.execute("DELETE FROM delivery WHERE since < ? RETURNING key_id", (before,)).fetchall()
        return len({row[0] for row in rows})

    def counts(self, peer: str) -> Counts:
        free = dict(self._db.execute("SELECT own, count(*) FROM key WHERE peer = ? GROUP BY own", (peer,)).fetchall())
        (waiting,) = self._db.execute(
            "SELECT count(DISTINCT key_id) FROM delivery WHERE peer = ? AND material IS NOT NULL", (peer,)
        ).fetchone()
        return Counts(free.get(1, 0), free.get(0, 0), waiting, *self._counted(peer))

    # What is special where several processes are at it

    def _not_others(self) -> tuple[str, list[object]]:
        """Condition and values for units that no other process may be offering."""
        return "", []

    def _must_be_well(self, peer: str) -> None:
        """Raises :class:`Alarmed`.  Here the only process knows about alarms by itself."""

    def _lock_units(self, key_ids: Collection[str]) -> None:
        """Free units: nobody else decides about them until the transaction is over."""

    def _lock_waiting(self, key_ids: Collection[str]) -> None:
        """The same of waiting keys, for all their slaves."""

    def _count(self, peer: str, *, issued: int = 0, fetched: int = 0) -> None:
        self._db.execute(
            "UPDATE link SET issued = issued + ?, fetched = fetched + ? WHERE peer = ?", (issued, fetched, peer)
        )

    def _counted(self, peer: str) -> tuple[int, int]:
        """Keys issued and fetched."""
        row = self._db.execute("SELECT issued, fetched FROM link WHERE peer = ?", (peer,)).fetchone()
        return tuple(row) if row else (0, 0)

    # Rows

    def _among(self, column: str, values: Collection[str]) -> tuple[str, tuple[object]]:
        """Condition, with one value."""
        return f"{column} IN (SELECT value FROM json_each(?))", (json.dumps(list(values)),)

    def _free(self, peer: str, key_ids: Collection[str]) -> set[str]:
        """Which of them are free units of the other end."""
        among, value = self._among("key_id", key_ids)
        query = f"SELECT key_id FROM key WHERE {among} AND peer = ? AND own = 0"
        return {row[0] for row in self._db.execute(query, (*value, peer))}

    def _terms_of(self, key_ids: Collection[str]) -> dict[str, set[tuple[object, ...]]]:
        """What is known of waiting keys, as :func:`_rows_of` has it."""
        among, value = self._among("key_id", key_ids)
        found: dict[str, set[tuple[object, ...]]] = {}
        query = f"SELECT key_id, slave, peer, master, size, token FROM delivery WHERE {among}"
        for key_id, *terms in self._db.execute(query, value):
            found.setdefault(key_id, set()).add(tuple(terms))
        return found

    def _waiting(self, key_ids: Collection[str]) -> dict[str, dict[str, tuple[str, bool]]]:
        """key_ID -> slave -> (master, whether it has the key already)."""
        among, value = self._among("key_id", key_ids)
        query = f"SELECT key_id, slave, master, material IS NULL FROM delivery WHERE {among}"
        found: dict[str, dict[str, tuple[str, bool]]] = {}
        for key_id, slave, master, gone in self._db.execute(query, value):
            found.setdefault(key_id, {})[slave] = master, bool(gone)
        return found

    def _take(self, peer: str, key_ids: Sequence[str], own: int, damaged: list[str]) -> dict[str, StoredKey]:
        """All of these units, in this order, deleted; raises :class:`KeysNotFound` where one is not there."""
        among, value = self._among("key_id", key_ids)
        query = (
            f"DELETE FROM key WHERE {among} AND peer = ? AND own = ? RETURNING key_id, epoch, material, origin, hops"
        )
        rows = {row[0]: row[1:] for row in self._db.execute(query, (*value, peer, own)).fetchall()} if key_ids else {}
        if len(rows) != len(key_ids):
            raise KeysNotFound
        taken = {}
        for key_id in key_ids:
            epoch, blob, origin, hops = rows[key_id]
            damaged.append(key_id)
            material = self._epochs.unseal(epoch, unit_label(key_id, peer, own, origin, hops), blob)
            damaged.pop()
            taken[key_id] = StoredKey(key_id, material, Origin(origin), hops)
        return taken

    @staticmethod
    def joined(units: Sequence[StoredKey], size: int) -> StoredKey:
        """Units one after the other, cut to ``size`` bits; the units are wiped."""
        material = bytearray().join(unit.material for unit in units)[: size // 8]
        for unit in units:
            wipe(unit.material)
        return StoredKey(units[0].key_id, material, weakest(u.origin for u in units), max(u.hops for u in units))

    def _unmasked(self, link: LinkRow, terms: Terms, deposit: Deposit, taking: list[str]) -> StoredKey:
        *pad, mac = self._take(link.peer, [unit.key_id for unit in deposit.units], 0, taking).values()
        tag = deposit_tag(mac.material, link.name, terms, deposit)
        if not hmac.compare_digest(tag, deposit.tag) or len(deposit.masked) != terms.size // 8:
            raise BadDeposit("a deposited key is not authentic")
        origin = terms.origin or weakest(part.origin for part in pad)
        if not all(at_most(origin, part.origin) and terms.hops >= part.hops for part in pad):
            raise BadDeposit("a deposited key claims more than the link it came over")
        taken = "SELECT 1 FROM key WHERE key_id = :id UNION ALL SELECT 1 FROM delivery WHERE key_id = :id"
        if self._db.execute(taken, {"id": deposit.key_id}).fetchone():
            raise BadDeposit("a deposited key has the key_ID of another")
        mask = self.joined(pad, terms.size)
        material = xor(deposit.masked, mask.material)
        wipe(mask.material)
        wipe(mac.material)
        return StoredKey(deposit.key_id, material, origin, terms.hops)

    def _wait(
        self, peer: str, terms: Terms, keys: Sequence[StoredKey], tokens: Sequence[str], now: float
    ) -> list[Label]:
        """What each claims."""
        rows, labels = [], list[Label]()
        for key, token in zip(keys, tokens, strict=True):
            origin, hops = weakest((key.origin, terms.origin or key.origin)), max(key.hops, terms.hops)
            labels.append((origin, hops))
            for slave in terms.slaves:
                named = (key.key_id, slave, terms.master, peer, terms.size, origin.value, hops)
                rows.append((*named, *self.seal(delivery_label(*named), key.material), token, now))
            wipe(key.material)
        if rows:
            self._db.executemany("INSERT INTO delivery VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        return labels

    def _labels(self, key_ids: Collection[str]) -> list[Label]:
        """What keys claim that wait already."""
        if not key_ids:  # nearly always: an offer comes a second time only after an outage
            return []
        among, value = self._among("key_id", key_ids)
        found = self._db.execute(f"SELECT origin, hops FROM delivery WHERE {among}", value).fetchall()
        return [(Origin(origin), hops) for origin, hops in found]

    def _hand_over(self, key_ids: Sequence[str], slave: str, master: str, damaged: list[str]) -> list[StoredKey]:
        """One slave has its keys: the bytes go; a row goes when no other slave waits for the same key."""
        among, value = self._among("key_id", key_ids)
        columns = "key_id, peer, size, origin, hops, epoch, material"
        query = f"SELECT {columns} FROM delivery WHERE {among} AND slave = ?"
        rows = {row[0]: row[1:] for row in self._db.execute(query, (*value, slave)).fetchall()}
        keys = []
        for key_id in key_ids:
            peer, size, origin, hops, epoch, blob = rows[key_id]
            damaged.append(key_id)
            label = delivery_label(key_id, slave, master, peer, size, origin, hops)
            keys.append(StoredKey(key_id, self._epochs.unseal(epoch, label, blob), Origin(origin), hops))
            damaged.pop()
        query = f"UPDATE delivery SET material = NULL WHERE {among} AND slave = ? AND material IS NOT NULL"
        if self._db.execute(query, (*value, slave)).rowcount != len(key_ids):
            raise KeysNotFound  # cannot be: the rows are locked, or nobody else is here
        others = "SELECT 1 FROM delivery AS other WHERE other.key_id = delivery.key_id AND other.material IS NOT NULL"
        self._db.execute(f"DELETE FROM delivery WHERE {among} AND NOT EXISTS ({others})", value)
        for peer, number in Counter(row[0] for row in rows.values()).items():
            self._count(peer, fetched=number)
        return keys

    def _reach(self, peer: str, missing: list[str], held: Sequence[Label]) -> Reservation:
        first, following = self._db.execute(
            "SELECT (SELECT min(block) FROM key WHERE peer = :p AND own = 0), next_block FROM link WHERE peer = :p",
            {"p": peer},
        ).fetchone() or (0, 0)
        origin = weakest(origin for origin, _hops in held) if held else None
        hops = max((hops for _origin, hops in held), default=0)
        return Reservation(missing, following if first is None else first, following, origin, hops)
