"""What all that one KME does stands on: its configuration, its store, and the state of its links.

The store works in threads of its own (one, or as many as there are connections to a database), each call in one of
them; everything else belongs to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import structlog

from keysource.kme.boundedlog import BoundedLog
from keysource.kme.config import KmeConfig
from keysource.kme.keystore import KeyStore
from keysource.kme.links import LinkState, link_named, links_of, links_to
from keysource.kme.peering import PeerClient
from keysource.kme.records import Alarmed, LinkRow
from keysource.kme.stores import is_shared, open_stores, workers

_T = TypeVar("_T")
EXHAUSTED = "exhausted"  # only for lack of keys
NOT_OWNER = "not-owner"  # all keys of the link are issued at its other end
log = structlog.get_logger("kme")


class NotNow(Exception):
    """No key now.  One sentence, and for programs a ``reason``: :data:`EXHAUSTED`, :data:`NOT_OWNER` or nothing."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def link_row(store: KeyStore, peer: str) -> LinkRow | None:
    return store.link(peer)


class Ground:
    """See the module."""

    def __init__(self, config: KmeConfig, peers: dict[str, PeerClient]) -> None:
        self.config = config
        self.links = links_of(config)
        self.peers = peers
        self.told = BoundedLog()
        """For what callers can cause at will."""
        self._store: KeyStore | None = None
        """The first of the open ones; which of them serves a call is the threads' matter."""
        self._stores: list[KeyStore] = []
        self._idle: SimpleQueue[KeyStore] = SimpleQueue()
        self._threads = ThreadPoolExecutor(workers(config), "store")

    async def open(self) -> None:
        """Raises :class:`~keysource.kme.store.StoreError`."""
        self._stores = await self._run(partial(open_stores, self.config))
        self._store = self._stores[0]
        for store in self._stores:
            self._idle.put(store)
        if not self.config.store.require_standby:
            log.warning("no synchronous standby is required: a failover of the database may give a key out twice")
        if self._store.migrated:
            log.info("the store of an older release was brought up to date; its keys are wrapped now")
        for peer, state in self.links.items():
            state.row = await self.db(partial(link_row, peer=peer))
            if state.row and state.row.alarm:
                state.alarms = {"last known": state.row.alarm}

    @property
    def shared(self) -> bool:
        """Are other processes at the same store?"""
        return is_shared(self.config)

    async def aclose(self) -> None:
        """Close store and connections to the other KMEs."""
        for peer in self.peers.values():
            await peer.aclose()
        self._store = None
        for store in self._stores:
            await self._run(store.close)
        self._threads.shutdown(wait=True)

    async def db(self, work: Callable[[KeyStore], _T]) -> _T:
        """Do something with the store.  Cancelling the caller does not stop it half-way."""
        if self._store is None:
            raise NotNow("the KME is stopping")
        return await self._run(partial(self._with_a_store, work))

    def _with_a_store(self, work: Callable[[KeyStore], _T]) -> _T:
        store = self._idle.get()  # there are as many as threads
        try:
            return work(store)
        except Alarmed as error:
            raise NotNow(str(error)) from None
        finally:
            self._idle.put(store)

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def links_to(self, peer: str) -> list[LinkState]:
        """All links to one KME."""
        return links_to(self.links, peer)

    def link_meant(self, peer: str, name: str) -> LinkState | None:
        """By the name that the devices say; None where it is another one."""
        return link_named(self.links, peer, name)

    def well(self, stock: str) -> LinkState:
        link = self.links[stock]
        if link.alarm:
            raise NotNow(f"the link to {stock!r} has an alarm ({link.alarm})")
        return link
