"""Keys from the device at this end of a link into the store, for as long as the KME runs.

A block is acknowledged after it is on the disk.  While the device is away the KME goes on with its stock; an alarm
that was active when the device went away stays active until the device says that it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import structlog

from keysource.base import wipe
from keysource.device.client import DeviceClient, follow
from keysource.device.messages import AlarmEvent, BlockEvent, BlockFacts, Event, VoidEvent
from keysource.errors import KeySourceError, Unavailable
from keysource.kme import crashpoints
from keysource.kme.records import LinkRow, StoreError
from keysource.kme.site import Site

_STATUS_INTERVAL = 1.0
_UNNAMED = "unnamed"  # an alarm known from the device's status only; its events tell the kinds
log = structlog.get_logger("kme")


class Feed:
    """Follows one device."""

    def __init__(self, site: Site, stock: str, path: Path) -> None:
        self._site, self._peer, self._path = site, stock, path
        self._link = site.links[stock]
        self._watch: asyncio.Task[None] | None = None
        self._said = ""

    async def run(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Until cancelled."""
        try:
            await follow(self._path, self, sleep=sleep)
        finally:
            await self._stop_watch()

    def next_block(self) -> int:
        return self._link.row.next_block if self._link.row else 0

    async def connected(self, device: DeviceClient) -> None:
        """Is it the device that belongs here?  And what became of an alarm while nobody listened?"""
        await self._stop_watch()
        info = device.info
        status = await device.status()
        try:
            row = await self._site.bind(LinkRow(self._peer, info.link, info.end, info.owner, info.origin, info.hops))
            await self._site.set_alarms(self._peer, {_UNNAMED: status.alarm} if status.alarm else {})
        except (sqlite3.Error, StoreError) as error:
            raise Unavailable(str(error)) from None
        if status.next_block < row.next_block:
            log.error("the device starts anew", peer=self._peer, next_block=status.next_block, stored=row.next_block)
        elif row.next_block:  # a crash may have come between storing and acknowledging: the device holds it still
            await device.ack(row.next_block - 1)
        self._link.connected, self._link.trouble, self._said = True, "", ""
        self._watch = asyncio.create_task(self._watch_status(device))
        log.info("device connected", peer=self._peer, link=info.link, end=info.end.value, origin=info.origin.value)

    async def event(self, device: DeviceClient, event: Event) -> None:
        try:
            match event:
                case BlockEvent():
                    await self._block(device, event)
                case VoidEvent():
                    gone = await self._site.db(lambda store: store.void(self._peer, event.before))
                    log.warning(
                        "blocks are void at the other end", peer=self._peer, before=event.before, dropped=gone
                    )
                case AlarmEvent():
                    await self._alarm(event)
        except (sqlite3.Error, StoreError) as error:
            raise Unavailable(f"the store fails: {error}") from None

    def disconnected(self, error: KeySourceError) -> None:
        self._link.connected, self._link.trouble = False, str(error)
        if str(error) != self._said:  # once, not at every attempt
            self._said = str(error)
            log.warning("device away", peer=self._peer, reason=str(error))

    async def _block(self, device: DeviceClient, event: BlockEvent) -> None:
        row = self._link.row
        if row is None:
            raise Unavailable("a block before hello")
        crashpoints.at("block.received")
        facts = event.facts or BlockFacts(row.origin, row.hops)
        labelled = replace(row, origin=facts.origin, hops=facts.hops)
        try:
            new = await self._site.db(lambda store: store.add_block(labelled, event.block, event.keys))
        finally:
            wipe(event.keys)
        self._link.row = await self._site.db(lambda store: store.link(self._peer))
        await device.ack(event.block)
        crashpoints.at("block.acknowledged")
        if new:
            told = {"hops": facts.hops, "paths": facts.paths} if event.facts else {}
            self._link.hops, self._link.paths = facts.hops, facts.paths
            log.info("block stored", peer=self._peer, block=event.block, keys=event.count, **told)
        else:
            log.warning("a block came again and was left out", peer=self._peer, block=event.block)

    async def _alarm(self, event: AlarmEvent) -> None:
        alarms = {kind: detail for kind, detail in self._link.alarms.items() if kind != _UNNAMED}
        if event.active:
            alarms[event.kind] = event.detail
        else:
            alarms.pop(event.kind, None)
        await self._site.set_alarms(self._peer, alarms)

    async def _watch_status(self, device: DeviceClient) -> None:
        with contextlib.suppress(KeySourceError):
            while True:
                status = await device.status()
                self._link.qber, self._link.key_rate = status.qber, status.key_rate
                await asyncio.sleep(_STATUS_INTERVAL)

    async def _stop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
