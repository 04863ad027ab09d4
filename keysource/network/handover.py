"""What the device sockets of a node must not forget: it is in the node's store."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from keysource.network.store import NodeStore


class StoreLedger:
    """A :class:`~keysource.device.server.Ledger` of one connection; ``erased`` is called when it has changed."""

    def __init__(self, store: NodeStore, connection: str, erased: Callable[[str], None]) -> None:
        self._store, self._connection, self._erased = store, connection, erased

    def erased(self, before: int) -> None:
        self._kept(before)

    def opened(self, block: int) -> None:
        self._kept(block + 1)

    def _kept(self, before: int) -> None:
        try:
            self._store.delivered(self._connection, before)
        except sqlite3.Error as error:
            raise OSError(5, str(error)) from None
        self._erased(self._connection)
