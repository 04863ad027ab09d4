"""The room under a store of either kind: its transactions, and the wrapping of what lies in it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from keysource.base import wipe
from keysource.kme import crashpoints
from keysource.kme.epochs import Epochs
from keysource.kme.records import Damaged
from keysource.kme.schema import delivery_label, unit_label

_REWRAP_AT_ONCE = 256


class Rows(Protocol):
    """What came of a statement."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class Database(Protocol):
    """An SQL connection; placeholders are ``?`` and ``:name``.  ``sqlite3.Connection`` is one as it stands."""

    def execute(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ..., /) -> Rows: ...

    def executemany(self, query: str, rows: Iterable[Sequence[Any]], /) -> Rows: ...


class Vault(ABC):
    """A database, with the epochs that its rows are wrapped under.  Who opens it sets ``_db`` and ``_epochs``."""

    _db: Database
    _epochs: Epochs
    _skip_locked = ""
    """What a query says to leave rows alone that another process is at."""

    # Epochs

    @property
    def epoch(self) -> tuple[int, float]:
        """Number of the current epoch, and when it began."""
        return self._epochs.current, self._epochs.begun

    @abstractmethod
    def begin_epoch(self, now: float) -> None:
        """New rows are wrapped under a new key; the old ones follow with :meth:`rewrap`."""

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
        columns = "key_id, peer, own, origin, hops, epoch, material"
        query = f"SELECT {columns} FROM key WHERE epoch < ? LIMIT ?{self._skip_locked}"
        found = self._db.execute(query, (current, limit)).fetchall()
        for key_id, peer, own, origin, hops, epoch, blob in found:
            label = unit_label(key_id, peer, own, origin, hops)
            if (sealed := self.resealed(epoch, label, blob, label)) is None:
                self._db.execute("DELETE FROM key WHERE key_id = ?", (key_id,))
            else:
                self._db.execute("UPDATE key SET epoch = ?, material = ? WHERE key_id = ?", (*sealed, key_id))
        return len(found)

    def _rewrap_waiting(self, current: int, limit: int) -> int:
        columns = "key_id, slave, master, peer, size, origin, hops, epoch, material"
        query = f"SELECT {columns} FROM delivery WHERE epoch < ? LIMIT ?{self._skip_locked}"
        found = self._db.execute(query, (current, limit)).fetchall()
        for key_id, slave, master, peer, size, origin, hops, epoch, blob in found:
            sealed: tuple[int, bytes | None] | None = (current, None)
            if blob is not None:
                label = delivery_label(key_id, slave, master, peer, size, origin, hops)
                sealed = self.resealed(epoch, label, blob, label)
            if sealed is None:
                self._db.execute("DELETE FROM delivery WHERE key_id = ?", (key_id,))
            else:
                where = "WHERE key_id = ? AND slave = ?"
                self._db.execute(f"UPDATE delivery SET epoch = ?, material = ? {where}", (*sealed, key_id, slave))
        return len(found)

    def resealed(self, epoch: int, label: bytes, blob: bytes, new_label: bytes) -> tuple[int, bytes] | None:
        """Wrapped under the current epoch and ``new_label``; None where it cannot be unwrapped."""
        try:
            material = self._epochs.unseal(epoch, label, blob)
        except Damaged:
            return None
        sealed = self.seal(new_label, material)
        wipe(material)
        return sealed

    def seal(self, label: bytes, material: bytes | bytearray) -> tuple[int, bytes]:
        """Current epoch, and ``material`` wrapped under it."""
        return self._epochs.current, self._epochs.seal(label, material)

    # Transactions

    @contextlib.contextmanager
    def _taking(self) -> Iterator[list[str]]:
        """A transaction in which keys are unwrapped.  One that cannot be is deleted, so that it stops nobody twice.

        Yields the list in which :meth:`_take` keeps the key_ID that it is at.
        """
        damaged: list[str] = []
        try:
            with self._transaction():
                yield damaged
        except Damaged:
            self._delete(damaged)
            raise

    def _delete(self, key_ids: Iterable[str]) -> None:
        with self._transaction():
            for key_id in key_ids:
                self._db.execute("DELETE FROM key WHERE key_id = ?", (key_id,))
                self._db.execute("DELETE FROM delivery WHERE key_id = ?", (key_id,))

    @abstractmethod
    def _transaction(self) -> contextlib.AbstractContextManager[None]:
        """All of it, on the disk when this returns, or nothing."""
