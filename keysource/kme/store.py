"""The store of one KME process in an SQLite file: WAL, ``synchronous=FULL``, what is deleted is overwritten."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

from keysource.kme import migrate
from keysource.kme.epochs import EpochKeys, new_site_key, read_site_key
from keysource.kme.keystore import KeyStore
from keysource.kme.records import StoreError
from keysource.kme.schema import connect, immediate, private_lock, revision_of


class Store(KeyStore):
    """One file, locked; what was deleted lives on in its log and in backups, as ciphertext of epochs that die."""

    _db: sqlite3.Connection
    _epochs: EpochKeys

    def __init__(
        self,
        path: Path,
        kme_id: str,
        *,
        max_keys: int,
        site_key: Path | None = None,
        epoch_keys: Path | None = None,
        now: float = 0.0,
    ) -> None:
        """``site_key`` must exist where it is given; else one is made beside the store.  ``now`` is in seconds.

        Raises:
            StoreError: see :class:`StoreError`.
        """
        super().__init__(str(path), max_keys=max_keys)
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
            revision = revision_of(self._db)
            self._settle_epochs(now, wrapped=revision != "0001")
            try:
                self.migrated = migrate.upgrade(self, self._db, revision)
            except sqlite3.Error as error:
                raise StoreError(f"{path}: it cannot be brought up to date: {error}") from None
            failed.pop_all()

    def close(self) -> None:
        self._db.close()
        self._epochs.close()
        os.close(self._lock)

    def health(self) -> dict[str, Any]:
        """For ``status``."""
        return {"kind": "sqlite", "where": self.where, "step": migrate.HEAD}

    def begin_epoch(self, now: float) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
        last = max(int(row[0]) if row else 0, self._epochs.current)
        with self._transaction():  # a number never comes back, even where the file of epoch keys does
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (str(last + 1),))
        self._epochs.begin(last + 1, now)

    def _settle_epochs(self, now: float, *, wrapped: bool) -> None:
        needed: set[int] = set()
        if wrapped:
            rows = self._db.execute("SELECT DISTINCT epoch FROM key UNION SELECT DISTINCT epoch FROM delivery")
            needed = {row[0] for row in rows}
        self._epochs.settle(needed)
        if not self._epochs.current:
            self.begin_epoch(now)

    def _adopt(self, kme_id: str) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE name = 'kme'").fetchone()
        if row is None:
            self._db.execute("INSERT INTO meta VALUES ('kme', ?)", (kme_id,))
        elif row[0] != kme_id:
            raise StoreError(f"{self.path}: this is the store of KME {row[0]!r}, not of {kme_id!r}")

    def _transaction(self) -> contextlib.AbstractContextManager[None]:
        return immediate(self._db)


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
