"""The client's side of the device socket (``framing``): what a KME, or the ``simulated`` source, uses.

::

    device = await DeviceClient.connect("/run/qkd/alice.sock")     # says hello, checks version and SO_PEERCRED
    await device.subscribe(from_block=next_block)
    async for event in device.events():                            # BlockEvent | VoidEvent | AlarmEvent
        if isinstance(event, BlockEvent):
            store(event)                    # durably, or in memory:
            await device.ack(event.block)   # in memory: use a key only once this has returned

:func:`follow` does this for ever, with back-off.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from keysource.base import KEY_BYTES, Key, wipe
from keysource.device.framing import VERSION, Decoder, Frame, encode
from keysource.device.messages import BlockEvent, DeviceInfo, DeviceStatus, Event, event_untrusted
from keysource.device.server import peer_is_trusted
from keysource.errors import BadAnswer, Exhausted, KeySourceError, Unauthorized, Unavailable, UnknownKeyID

_READ_CHUNK = 64 * 1024
_MAX_WAITING_BYTES = 64 * 1024 * 1024
_REQUEST_TIMEOUT = 5.0


class DeviceClient:
    """One connection to a device.  After the first error it is of no more use: connect again."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.path = path
        self._reader, self._writer = reader, writer
        self._waiting: deque[tuple[str, asyncio.Future[Frame]]] = deque()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._queued_bytes = 0
        self._failure: KeySourceError | None = None
        self._info: DeviceInfo | None = None
        self._closed = False
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls, path: str | Path, *, timeout: float = _REQUEST_TIMEOUT, owner: int | None = None
    ) -> DeviceClient:
        """Connect and say hello.  ``owner`` is the number of the user that the device may run as, beside ours and
        root.

        Raises:
            Unavailable: nobody listens there, or no answer within ``timeout`` seconds.
            Unauthorized: the socket belongs to another user.
            BadAnswer: another version, or not a device.
        """
        path = Path(path)
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(os.fspath(path))
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"{path}: the device does not answer ({_reason(error)})", answered=True) from None
        if not peer_is_trusted(writer.get_extra_info("socket"), owner):
            writer.close()
            raise Unauthorized(f"{path}: the device there runs as another user")
        client = cls(path, reader, writer)
        try:
            answer = await client._request({"op": "hello", "version": VERSION}, timeout)
            client._info = DeviceInfo.from_untrusted(answer.header)
        except BaseException:
            await client.aclose()
            raise
        return client

    @property
    def info(self) -> DeviceInfo:
        """What the device said in ``hello``."""
        if self._info is None:
            raise BadAnswer(f"{self.path}: the device has not said hello")
        return self._info

    async def status(self) -> DeviceStatus:
        return DeviceStatus.from_untrusted((await self._request({"op": "status"})).header)

    async def subscribe(self, from_block: int) -> None:
        """Ask for all blocks with number >= ``from_block``, held or to come.

        Raises:
            Unauthorized: another client is subscribed.
        """
        await self._request({"op": "subscribe", "from": from_block})

    async def events(self) -> AsyncIterator[Event]:
        """Events in order; ends after :meth:`aclose`, raises what broke the connection."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, BlockEvent):
                self._queued_bytes -= len(event.keys)
            yield event
        self._events.put_nowait(None)  # for the next reader
        if self._failure is not None:
            raise self._failure

    async def ack(self, block: int) -> None:
        """All blocks up to ``block`` are safe here: the device erases them."""
        await self._request({"op": "ack", "block": block})

    async def discard(self, before: int) -> None:
        """The device erases all blocks below ``before``."""
        await self._request({"op": "discard", "before": before})

    async def get(self, key_id: str) -> Key:
        """One key of a block that nobody was sent.  Raises :class:`UnknownKeyID`."""
        info = self.info
        answer = await self._request({"op": "get", "key_id": key_id})
        if len(answer.trailer) != KEY_BYTES:
            raise BadAnswer(f"{self.path}: a key of {len(answer.trailer)} bytes")
        return Key(key_id, answer.trailer, info.origin, info.hops)

    async def aclose(self) -> None:
        """Close and wipe what was not taken.  May be called twice."""
        self._closed = True
        self._task.cancel()
        self._writer.close()  # before the first await: also when aclose itself is cancelled
        self._finish(None)
        while not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, BlockEvent):
                wipe(event.keys)
        self._events.put_nowait(None)
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _request(self, header: dict[str, Any], timeout: float = _REQUEST_TIMEOUT) -> Frame:
        if self._closed or self._task.done():
            raise self._failure or Unavailable(f"{self.path}: the connection to the device is closed")
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._waiting.append((header["op"], answer))
        try:
            async with asyncio.timeout(timeout):
                self._writer.write(bytes(encode(header)))
                await self._writer.drain()
                frame = await answer
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"{self.path}: the device gave no answer ({_reason(error)})") from None
        if frame.op == "error":
            raise _error(self.path, frame.header)
        return frame

    async def _read(self) -> None:
        decoder = Decoder()
        try:
            while data := await self._reader.read(_READ_CHUNK):
                for frame in decoder.feed_untrusted(data):
                    self._take(frame)
            self._finish(Unavailable(f"{self.path}: the device closed the connection"))
        except BadAnswer as error:
            self._finish(BadAnswer(f"{self.path}: {error}"))
        except OSError as error:
            self._finish(Unavailable(f"{self.path}: {_reason(error)}"))

    def _take(self, frame: Frame) -> None:
        event = event_untrusted(frame)
        if event is not None:
            if isinstance(event, BlockEvent):
                self._queued_bytes += len(event.keys)
            if self._queued_bytes > _MAX_WAITING_BYTES:
                raise BadAnswer("the device sends more than may be held without an acknowledgement")
            self._events.put_nowait(event)
            return
        if not self._waiting:
            raise BadAnswer(f"an answer {frame.op[:20]!r} that nobody asked for")
        op, answer = self._waiting[0]
        if frame.op not in (op, "error"):
            raise BadAnswer(f"an answer {frame.op[:20]!r} to {op!r}")
        self._waiting.popleft()
        if answer.done():  # the caller was cancelled: the key is burnt, not given to the next
            wipe(frame.trailer)
        else:
            answer.set_result(frame)

    def _finish(self, failure: KeySourceError | None) -> None:
        self._failure = self._failure or failure
        while self._waiting:
            _op, answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(failure or Unavailable(f"{self.path}: the connection was closed"))
                answer.exception()  # somebody cancelled may never look
        self._events.put_nowait(None)


class Follower(Protocol):
    """What :func:`follow` tells.  An exception of kind ``KeySourceError`` in any of them ends that connection."""

    def next_block(self) -> int:
        """First block wanted at the next ``subscribe``."""

    async def connected(self, device: DeviceClient) -> None:
        """Hello was said; check that it is the right link.  Subscription follows."""

    async def event(self, device: DeviceClient, event: Event) -> None:
        """An event; acknowledge blocks here."""

    def disconnected(self, error: KeySourceError) -> None:
        """The connection ended or did not come about; ``follow`` goes on trying."""


async def follow(
    path: str | Path,
    follower: Follower,
    *,
    first_wait: float = 0.1,
    longest_wait: float = 5.0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    owner: int | None = None,
) -> None:
    """Stay subscribed until cancelled; between attempts wait ``first_wait`` s, doubling up to ``longest_wait`` s."""
    wait = first_wait
    while True:
        try:
            device = await DeviceClient.connect(path, owner=owner)
            try:
                await follower.connected(device)
                await device.subscribe(follower.next_block())
                wait = first_wait
                async for event in device.events():
                    await follower.event(device, event)
                raise Unavailable(f"{path}: the connection to the device was closed")
            finally:
                await device.aclose()
        except KeySourceError as error:
            follower.disconnected(error)
        await sleep(wait)
        wait = min(2 * wait, longest_wait)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _error(path: Path, header: dict[str, Any]) -> KeySourceError:
    code, message = str(header.get("code"))[:30], str(header.get("message"))[:200]
    after = header.get("retry_after")
    retry_after = float(after) if isinstance(after, int | float) and 0 <= after < 3600 else 0.0
    said = f"{path}: the device says {code}: {message}"
    match code:
        case "unknown-id":
            return UnknownKeyID(said)
        case "exhausted":
            return Exhausted(said, retry_after=retry_after)
        case "not-authorised":
            return Unauthorized(said)
        case "device-fault":
            return Unavailable(said, answered=True, retry_after=retry_after)
    return BadAnswer(said)
