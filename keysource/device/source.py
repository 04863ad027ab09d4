"""A key source over a device socket: the keys wait in memory (``keysource.stock``), not on disk.

Nothing here belongs to the simulated link: any device that speaks ``framing`` will do.  A key enters the stock only
when the device has answered ``ack``, so that it erased its copy: a block that is delivered again after a broken
connection was never in use.  While the stock is full nothing is acknowledged; the device then waits.

The death of the device takes nothing away from the stock.  An alarm does: until it is cleared neither end of this
source gives keys, also none of the time before.

A restarted daemon has lost its stock while the other end still has its own.  So each end claims, inside the
authenticated handshake, from which block on it has keys (:class:`~keysource.base.Claiming`), and the other forgets
what is older: no draw is wasted on keys that are gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from keysource.base import End, Hop, Key, Origin, Owner, SaePair, SourceStatus, wipe
from keysource.device.client import DeviceClient, follow
from keysource.device.messages import AlarmEvent, BlockEvent, DeviceInfo, DeviceStatus, Event, VoidEvent
from keysource.errors import BadAnswer, Exhausted, KeySourceError, Unavailable
from keysource.stock import Stock

_STATUS_TIMEOUT = 1.0
_CLAIM = struct.Struct(">B16s1sQ")
_CLAIM_VERSION = 1


class DeviceSource:
    """A :class:`~keysource.base.KeySource`, and the ``Follower`` of its device.

    ``check`` may refuse a device after its hello (another end, owner or origin than configured).  ``owner`` is the
    number of the user that the device may run as, beside ours and root.
    """

    def __init__(
        self,
        socket: Path,
        *,
        capacity: int = 4096,
        check: Callable[[DeviceInfo], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        owner: int | None = None,
    ) -> None:
        self.socket = socket
        self._owner = owner
        self._capacity, self._check, self._clock = capacity, check, clock
        self._info: DeviceInfo | None = None
        self._stock: Stock | None = None
        self._device: DeviceClient | None = None
        self._device_status: DeviceStatus | None = None
        self._alarms: dict[str, str] = {}
        self._trouble = f"{socket}: the device has not answered yet"
        self._pending: deque[BlockEvent] = deque()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to follow the device; it need not be there yet."""
        self._tasks = [
            asyncio.create_task(follow(self.socket, self, owner=self._owner)),
            asyncio.create_task(self._feed()),
        ]

    async def aclose(self) -> None:
        """Stop, wipe the stock.  May be called twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        self._trouble = f"{self.socket}: the key source is closed"
        self._wipe_pending()
        if self._stock is not None:
            self._stock.wipe()
        await asyncio.gather(*tasks, return_exceptions=True)

    def sae_pair(self, peer_sae: str) -> SaePair:
        """Named after the link, which the device tells: the same at both sites.

        Raises:
            Unavailable: the device never answered yet.
        """
        if self._info is None:
            raise Unavailable(self._trouble, answered=True)
        return SaePair(f"{self._info.link}/{self._info.end}", f"{self._info.link}/{self._info.end.other}")

    async def status(self, peer_sae: str) -> SourceStatus:
        device = await self._ask_device()
        stock, alarm = self._stock, self._alarm()
        held = 0 if stock is None else stock.drawable + stock.fetchable
        reason = f"alarm: {alarm}" if alarm else "" if held else self._why_empty()
        return SourceStatus(
            ready=not reason,
            reason=reason,
            origin=None if self._info is None else self._info.origin,
            hop=Hop.LOCAL,
            stored_keys=0 if stock is None else stock.drawable,
            key_rate=None if stock is None else stock.key_rate(self._clock()),
            alarm=alarm,
            qber=None if device is None else device.qber,
        )

    async def look(self) -> SourceStatus:
        """See :class:`keysource.base.Looking`: a subscription would take the device's blocks for good."""
        try:
            device = await DeviceClient.connect(self.socket, owner=self._owner)
        except KeySourceError as error:
            return SourceStatus(False, str(error))
        try:
            if self._check is not None:
                self._check(device.info)
            said = await device.status()
        except KeySourceError as error:
            return SourceStatus(False, str(error))
        finally:
            await device.aclose()
        state = f"the link is {said.state}" + (f": {said.reason}" if said.reason else "")
        reason = f"alarm: {said.alarm}" if said.alarm else "" if said.state == "up" else state
        return SourceStatus(not reason, reason, device.info.origin, alarm=said.alarm, qber=said.qber)

    async def get_key(self, peer_sae: str) -> Key:
        stock = self._usable()
        try:
            return stock.draw()
        except Exhausted as error:
            raise Exhausted(f"{error}; {self._why_empty()}") from None
        finally:
            self._changed.set()

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        key = self._usable().fetch(key_id)
        self._changed.set()
        return key

    def claim(self) -> bytes:
        """Link, end, first block of which keys are here: 26 bytes; none before the first block."""
        stock = self._stock
        if stock is None or stock.first_block is None:
            return b""
        return _CLAIM.pack(_CLAIM_VERSION, _link_hash(stock.link), stock.end.encode(), stock.first_block)

    def check_claim(self, claim: bytes) -> None:
        """Forget keys that the peer no longer has.

        Raises:
            BadAnswer: the claim has another form, or is about another link or the same end.
        """
        stock = self._stock
        if stock is None:
            raise Unavailable(self._trouble, answered=True)
        if len(claim) != _CLAIM.size or claim[0] != _CLAIM_VERSION:
            raise BadAnswer(f"link {stock.link}: the peer's claim about its keys has another form")
        _version, link, end, first_block = _CLAIM.unpack(claim)
        if link != _link_hash(stock.link):
            raise BadAnswer(f"link {stock.link}: the peer's device belongs to another link")
        if end != stock.end.other.encode():
            raise BadAnswer(f'link {stock.link}: both sites have end "{stock.end}" of it')
        stock.void(min(first_block, stock.next_block))  # never what is still to come: the peer may be ahead of us
        self._changed.set()

    # What the device tells

    def next_block(self) -> int:
        return 0 if self._stock is None else self._stock.next_block

    async def connected(self, device: DeviceClient) -> None:
        info = device.info
        if self._check is not None:
            self._check(info)
        if self._info is not None and info != self._info:
            raise BadAnswer(
                f"{self.socket}: another device or link than before: {info.link!r}, not {self._info.link!r}"
            )
        alarm = (await device.status()).alarm
        self._alarms = {} if alarm is None else {"": alarm}
        if self._stock is None:
            self._stock = Stock(info.link, info.end, info.owner, info.origin, info.hops, capacity=self._capacity)
            self._stock.started(self._clock())
        self._info, self._device, self._trouble = info, device, ""

    async def event(self, device: DeviceClient, event: Event) -> None:
        match event:
            case BlockEvent():
                self._pending.append(event)
                self._changed.set()
            case VoidEvent(before):
                if self._stock is not None:
                    self._stock.void(before)
            case AlarmEvent(active, kind, detail):
                self._alarms.pop("", None)  # what status said at the connect; the device repeats it by kind
                self._alarms.pop(kind, None)
                if active:
                    self._alarms[kind] = detail

    def disconnected(self, error: KeySourceError) -> None:
        self._device = self._device_status = None
        self._trouble = str(error)
        self._wipe_pending()  # not acknowledged: these come again

    async def _feed(self) -> None:
        """From pending to stock, as far as there is room."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._pending and self._stock is not None and not self._stock.full:
                await self._accept(self._pending.popleft(), self._stock)

    async def _accept(self, event: BlockEvent, stock: Stock) -> None:
        try:
            if self._device is not None:
                await self._device.ack(event.block)
                stock.add_block(event.block, event.keys, self._clock())
        except KeySourceError:
            pass  # follow() sees the broken connection too, and says so
        finally:
            wipe(event.keys)

    def _usable(self) -> Stock:
        if not self._tasks:
            raise Unavailable(f"{self.socket}: the key source is closed", answered=True)
        if alarm := self._alarm():
            raise Unavailable(f"{self.socket}: the link has an alarm: {alarm}", answered=True)
        if self._stock is None:
            raise Unavailable(self._trouble, answered=True)
        return self._stock

    def _alarm(self) -> str | None:
        return "; ".join(f"{kind}: {text}" if kind else text for kind, text in self._alarms.items()) or None

    def _why_empty(self) -> str:
        state = self._device_status
        if self._trouble or state is None:
            return self._trouble or "no key has arrived yet"
        return f"the link is {state.state}" + (f": {state.reason}" if state.reason else " and has no key yet")

    async def _ask_device(self) -> DeviceStatus | None:
        if self._device is not None:
            try:
                async with asyncio.timeout(_STATUS_TIMEOUT):
                    self._device_status = await self._device.status()
            except (KeySourceError, TimeoutError):
                pass  # the last answer stands; a broken connection shows elsewhere
        return self._device_status

    def _wipe_pending(self) -> None:
        while self._pending:
            event = self._pending.popleft()
            wipe(event.keys)


def _link_hash(link: str) -> bytes:
    return hashlib.sha256(link.encode()).digest()[:16]


def expect(end: End | None, owner: Owner | None, origin: Origin) -> Callable[[DeviceInfo], None]:
    """A check that raises :class:`BadAnswer` where a device is not what the configuration says."""

    def check(info: DeviceInfo) -> None:
        for what, wanted, said in (
            ("end", end, info.end),
            ("owner", owner, info.owner),
            ("origin", origin, info.origin),
        ):
            if wanted is not None and wanted != said:
                raise BadAnswer(f'the device of link {info.link!r} has {what} "{said}", configured is "{wanted}"')

    return check
