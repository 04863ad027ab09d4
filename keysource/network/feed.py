"""Units from the device at this end of a link into the node's store, and how the device is."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import structlog

from keysource.base import End, Owner, wipe
from keysource.device.client import DeviceClient, follow
from keysource.device.messages import AlarmEvent, BlockEvent, DeviceInfo, Event, VoidEvent
from keysource.errors import BadAnswer, KeySourceError, Unavailable
from keysource.kme.records import StoreError, at_most
from keysource.network.core import Core

_STATUS_INTERVAL = 1.0
_UNNAMED = "unnamed"
log = structlog.get_logger("network")


class LinkFeed:
    """Follows one device; ``changed`` is called after every change."""

    def __init__(self, core: Core, name: str, path: Path, changed: Callable[[], None]) -> None:
        self._core, self._path, self._changed = core, path, changed
        self._state = core.links[name]
        self._link = self._state.entry
        self._alarms: dict[str, str] = {}
        self._watch: asyncio.Task[None] | None = None
        self._said = ""
        stored = core.store.link(name)
        if stored and stored.alarm:
            self._state.alarm = stored.alarm
        self._next_block = stored.next_block if stored else 0
        if gone := core.store.drop_worse(name, self._link.origin):
            log.warning("the map claims more of a link than when its units came", link=name, dropped=gone)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await follow(self._path, self, longest_wait=2.0)
        finally:
            await self._stop_watch()

    def next_block(self) -> int:
        return self._next_block

    async def connected(self, device: DeviceClient) -> None:
        await self._stop_watch()
        self._check(device.info)
        status = await device.status()
        try:
            self._next_block = self._core.store.bind_link(self._link.name, device.info.end, device.info.owner)
            self._set_alarms({_UNNAMED: status.alarm} if status.alarm else {})
        except (sqlite3.Error, StoreError) as error:
            raise Unavailable(str(error)) from None
        if 0 < self._next_block <= status.next_block:  # a crash came between storing and acknowledging
            await device.ack(self._next_block - 1)
        self._state.up, self._state.trouble, self._said = True, "", ""
        self._watch = asyncio.create_task(self._watch_status(device))
        log.info("device connected", link=self._link.name, origin=device.info.origin.value)
        self._changed()

    async def event(self, device: DeviceClient, event: Event) -> None:
        try:
            match event:
                case BlockEvent():
                    if event.facts and (event.facts.hops or not at_most(self._link.origin, event.facts.origin)):
                        wipe(event.keys)
                        raise BadAnswer(f"{self._path}: a block that claims less than the map says of the link")
                    try:
                        self._core.store.add_block(self._link.name, event.block, event.keys, self._link.origin)
                    finally:
                        wipe(event.keys)
                    self._next_block = max(self._next_block, event.block + 1)
                    await device.ack(event.block)
                case VoidEvent(before):
                    self._core.store.void(self._link.name, before)
                case AlarmEvent(active, kind, detail):
                    alarms = {name: text for name, text in self._alarms.items() if name not in (_UNNAMED, kind)}
                    self._set_alarms(alarms | ({kind: detail} if active else {}))
        except (sqlite3.Error, StoreError) as error:
            raise Unavailable(f"the store fails: {error}") from None
        self._changed()

    def disconnected(self, error: KeySourceError) -> None:
        """What was received stays good; an alarm stays until the device says that it is over."""
        self._state.up, self._state.trouble = False, str(error)
        if str(error) != self._said:
            self._said = str(error)
            log.warning("device away", link=self._link.name, reason=str(error))
        self._changed()

    def _check(self, info: DeviceInfo) -> None:
        """Raises :class:`BadAnswer` where it is not what the map says."""
        if info.link != self._link.name:
            raise BadAnswer(f"{self._path}: the device belongs to link {info.link!r}, not {self._link.name!r}")
        mine = End.A if self._link.ends[0] == self._core.name else End.B
        if info.end is not mine or info.owner is not Owner.ALTERNATE:  # else both ends might draw the same pads
            raise BadAnswer(
                f'{self._path}: the device says end "{info.end}", owner "{info.owner}"; by the map it is end "{mine}"'
                ' of a link with owner "alternate"'
            )
        if not at_most(self._link.origin, info.origin):
            raise BadAnswer(
                f'{self._path}: the device of link {info.link!r} says origin "{info.origin}"; the map claims'
                f' "{self._link.origin}" for it'
            )
        if info.hops:
            raise BadAnswer(f"{self._path}: the keys of link {info.link!r} pass trusted nodes that the map has not")

    def _set_alarms(self, alarms: dict[str, str]) -> None:
        self._alarms = alarms
        alarm = "; ".join(f"{kind}: {text}" if text else kind for kind, text in alarms.items())
        if alarm != self._state.alarm:
            log.warning("alarm" if alarm else "alarm cleared", link=self._link.name, alarm=alarm)
            self._state.alarm = alarm
            self._core.store.set_alarm(self._link.name, alarm)

    async def _watch_status(self, device: DeviceClient) -> None:
        with contextlib.suppress(KeySourceError):
            while True:
                status = await device.status()
                self._state.qber, self._state.key_rate = status.qber, status.key_rate
                await asyncio.sleep(_STATUS_INTERVAL)

    async def _stop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
