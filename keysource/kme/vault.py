"""The room under the store: its files, its transactions, and the wrapping of what lies in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from keysource.base import wipe
from keysource.kme import crashpoints
from keysource.kme.epochs import EpochKeys, new_site_key, read_site_key
from keysource.kme.records import StoreError
from keysource.kme.schema import connect, delivery_label, migrate, private_lock, unit_label

_REWRAP_AT_ONCE = 256


class Vault:
    """An opened database, locked, with the epochs that its rows are wrapped under."""

    def __init__(
        self, path: Path, kme_id: str, *, site_key: Path | None, epoch_keys: Path | None, now: float
    ) -> None:
        """Raises :class:`StoreError`."""
        self.path = path
        self._lock = private_lock(path)
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, self._lock)
            self._db = connect(path)
            failed.callback(self._db.close)
            self._adopt(kme_id)
            key = read_site_key(site_key or _own_site_key(path))
            self._epochs = EpochKeys(epoch_keys or path.with_name(path.name + ".epochs"), key, kme_id)
            failed.callback(self._epochs.close)
            self._settle_epochs(now)
            self.migrated = migrate(self._db, self._seal)
            failed.pop_all()

    def close(self) -> None:
        self._db.close()
        self._epochs.close()
        os.close(self._lock)

    # Epochs

    @property
    def epoch(self) -> tuple[int, float]:
        """Number of the current epoch, and when it began."""
        return self._epochs.current, self._epochs.begun

    def begin_epoch(self, now: float) -> None:
        """New rows are wrapped under a new key; the old ones follow with :meth:`rewrap`."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
        last = max(int(row[0]) if row else 0, self._epochs.current)
        with self._transaction():  # a number never comes back, even where the file of epoch keys does
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (str(last + 1),))
        self._epochs.begin(last + 1, now)

    def rewrap(self, limit: int = _REWRAP_AT_ONCE) -> bool:
        """Wrap at most ``limit`` old rows anew.  False when none is left: then all old epochs are destroyed."""
        current = self._epochs.current
        if self._epochs.alive == [current]:
            return False
        with self._transaction():
            left = self._rewrap_units(current, limit)
            left += self._rewrap_waiting(current, limit)
            crashpoints.at("epoch.in-rewrap")
        crashpoints.at("epoch.rewrapped")
        if left:
            return True
        for number in self._epochs.alive[:-1]:
            self._epochs.destroy(number)
        return False

    def _rewrap_units(self, current: int, limit: int) -> int:
        found = self._db.execute(
            "SELECT key_id, peer, own, epoch, material FROM key WHERE epoch < ? LIMIT ?", (current, limit)
        ).fetchall()
        for key_id, peer, own, epoch, blob in found:
            label = unit_label(key_id, peer, own)
            if (sealed := self._resealed(epoch, label, blob)) is None:
                self._db.execute("DELETE FROM key WHERE key_id = ?", (key_id,))
            else:
                self._db.execute("UPDATE key SET epoch = ?, material = ? WHERE key_id = ?", (*sealed, key_id))
        return len(found)

    def _rewrap_waiting(self, current: int, limit: int) -> int:
        found = self._db.execute(
            "SELECT key_id, slave, master, epoch, material FROM delivery WHERE epoch < ? LIMIT ?", (current, limit)
        ).fetchall()
        for key_id, slave, master, epoch, blob in found:
            sealed: tuple[int, bytes | None] | None = (current, None)
            if blob is not None:
                sealed = self._resealed(epoch, delivery_label(key_id, slave, master), blob)
            if sealed is None:
                self._db.execute("DELETE FROM delivery WHERE key_id = ?", (key_id,))
            else:
                where = "WHERE key_id = ? AND slave = ?"
                self._db.execute(f"UPDATE delivery SET epoch = ?, material = ? {where}", (*sealed, key_id, slave))
        return len(found)

    def _resealed(self, epoch: int, label: bytes, blob: bytes) -> tuple[int, bytes] | None:
        try:
            material = self._epochs.unseal(epoch, label, blob)
        except StoreError:
            return None
        sealed = self._seal(label, material)
        wipe(material)
        return sealed

    def _seal(self, label: bytes, material: bytes | bytearray) -> tuple[int, bytes]:
        return self._epochs.current, self._epochs.seal(label, material)

    def _settle_epochs(self, now: float) -> None:
        needed: set[int] = set()
        if self._db.execute("PRAGMA user_version").fetchone()[0]:
            rows = self._db.execute("SELECT DISTINCT epoch FROM key UNION SELECT DISTINCT epoch FROM delivery")
            needed = {row[0] for row in rows}
        self._epochs.settle(needed)
        if not self._epochs.current:
            self.begin_epoch(now)

    # Transactions

    def _adopt(self, kme_id: str) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE name = 'kme'").fetchone()
        if row is None:
            self._db.execute("INSERT INTO meta VALUES ('kme', ?)", (kme_id,))
        elif row[0] != kme_id:
            raise StoreError(f"{self.path}: this is the store of KME {row[0]!r}, not of {kme_id!r}")

    @contextlib.contextmanager
    def _taking(self) -> Iterator[list[str]]:
        """A transaction in which keys are unwrapped.  One that cannot be is deleted, so that it stops nobody twice.

        Yields the list in which :meth:`_take` keeps the key_ID that it is at.
        """
        damaged: list[str] = []
        try:
            with self._transaction():
                yield damaged
        except StoreError:
            self._delete(damaged)
            raise

    def _delete(self, key_ids: Iterable[str]) -> None:
        with self._transaction():
            for key_id in key_ids:
                self._db.execute("DELETE FROM key WHERE key_id = ?", (key_id,))
                self._db.execute("DELETE FROM delivery WHERE key_id = ?", (key_id,))

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


def _own_site_key(store: Path) -> Path:
    """Where the operator named none: one beside the store, made with it."""
    path = store.with_name(store.name + ".site-key")
    try:
        new_site_key(path)
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    return path
