"""The device's side of the device socket (``framing``): what a QKD engine, or a test device, embeds.

::

    device = DeviceServer("/run/qkd/alice.sock", DeviceInfo("lab link", "left-right", End.A))
    await device.start()
    device.set_status("up", qber=0.021, key_rate=5.0)
    if device.room() >= 64:
        device.publish(block=7, keys=keys)      # 64 x 32 bytes; the server owns and wipes them from here on

The server keeps a block until a client acknowledges or discards it, and no more than ``max_keys`` keys in
``max_blocks`` blocks: without room the engine waits, it does not drop (the other end would run ahead).

**Exactly once.** One subscription at a time; other clients may ask for ``status`` or take keys by ``get``.  Bytes go
out on one of the two ways only: a block that was sent to a subscriber answers no ``get``, and a block of which a
key was taken by ``get`` is not sent to a subscriber.  A subscriber may see an unacknowledged block again after a
reconnect: it uses keys only when ``ack`` was answered, or when it has stored them with their number.  A device
whose blocks outlive its process gives a :class:`Ledger`, which knows after a restart what was handed over before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any, Protocol

from keysource.base import KEY_BYTES, derive_key_id, wipe
from keysource.device.framing import VERSION, Decoder, Frame, encode
from keysource.device.messages import (
    ALARM_KINDS,
    MAX_BLOCK,
    STATES,
    BlockFacts,
    DeviceInfo,
    DeviceStatus,
    number_untrusted,
)
from keysource.errors import BadAnswer, KeySourceError
from keysource.sockets import path_mistake

_READ_CHUNK = 64 * 1024


class Ledger(Protocol):
    """What a device must not forget when it ends.  Each call returns when it is on the disk, or raises ``OSError``:
    then the client gets ``device-fault`` and no key."""

    def erased(self, before: int) -> None:
        """All blocks below ``before`` are handed over; they never come again."""

    def opened(self, block: int) -> None:
        """A key of this block was taken by ``get``: the block as a whole never comes again."""


def peer_is_trusted(connection: socket.socket, also: int | None = None) -> bool:
    """Is the process at the other end of a unix socket ours (same user), root's, or of the user with number
    ``also``?  By SO_PEERCRED, unix(7)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return uid in (os.geteuid(), 0, also)


def bind_private(path: Path) -> socket.socket:
    """A unix stream socket at ``path``, mode 0600 before anybody can connect.

    A socket file left by a dead process is replaced.

    Raises:
        KeySourceError: the path is too long, is another file, or a living process listens there.
    """
    if mistake := path_mistake(path):
        raise KeySourceError(mistake)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise KeySourceError(f"{path}: exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(os.fspath(path)) == 0:
                raise KeySourceError(f"{path}: another process listens there")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        path.chmod(0o600)  # nobody can connect before listen()
    except OSError as error:
        listener.close()
        raise KeySourceError(f"{path}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


class _Block:
    """One held block.  ``key_ids`` is built when ``get`` first asks: most devices are only subscribed to."""

    def __init__(self, number: int, keys: bytearray, facts: BlockFacts | None) -> None:
        self.number = number
        self.keys = keys
        self.facts = facts
        self.sent = False
        self._positions: dict[str, int] | None = None

    @property
    def count(self) -> int:
        return len(self.keys) // KEY_BYTES

    def header(self) -> dict[str, Any]:
        facts = self.facts.fields() if self.facts else {}
        return {"op": "block", "block": self.number, "count": self.count, **facts}

    @property
    def touched(self) -> bool:
        """Was a key taken from it alone?"""
        return self._positions is not None and len(self._positions) < self.count

    @property
    def empty(self) -> bool:
        return self._positions is not None and not self._positions

    def take(self, link: str, key_id: str) -> bytearray | None:
        if self._positions is None:
            self._positions = {derive_key_id(link, self.number, i): i for i in range(self.count)}
        position = self._positions.pop(key_id, None)
        if position is None:
            return None
        where = slice(position * KEY_BYTES, (position + 1) * KEY_BYTES)
        key = self.keys[where]
        self.keys[where] = bytes(KEY_BYTES)
        return key

    def wipe(self) -> None:
        wipe(self.keys)


class DeviceServer:
    """Serves one end of a link at a unix socket.  Its synchronous methods belong to the event loop's thread."""

    def __init__(
        self,
        path: str | Path,
        info: DeviceInfo,
        *,
        max_blocks: int = 64,
        max_keys: int = 65_536,
        next_block: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        self.path = Path(path)
        self.info = info
        self._max_blocks, self._max_keys = max_blocks, max_keys
        self._blocks: dict[int, _Block] = {}
        self._next_block = next_block
        self._ledger = ledger
        self._void_before = 0
        self._alarms: dict[str, str] = {}
        self._status: tuple[str, str, float | None, float | None] = ("starting", "", None, None)
        self._clients: set[_Client] = set()
        self._server: asyncio.Server | None = None
        self._freed = asyncio.Event()
        self.subscriber: _Client | None = None

    async def start(self) -> None:
        """Listen.  Raises :class:`KeySourceError` where the path cannot be used."""
        listener = bind_private(self.path)
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    async def aclose(self) -> None:
        """Stop listening, cut the clients, wipe what is held.  May be called twice."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            self.path.unlink(missing_ok=True)
        clients = list(self._clients)
        for client in clients:
            client.task.cancel()
        await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
        self._erase_below(MAX_BLOCK + 1)

    # What the engine calls

    def room(self) -> int:
        """Keys that one more block may have now; 0 where the engine must wait."""
        if len(self._blocks) >= self._max_blocks:
            return 0
        return max(0, self._max_keys - sum(block.count for block in self._blocks.values()))

    async def wait_for_room(self, keys: int) -> None:
        """Return as soon as a block of ``keys`` keys has room."""
        while self.room() < keys:
            self._freed.clear()
            await self._freed.wait()

    def holds(self, block: int) -> bool:
        return block in self._blocks

    def publish(self, block: int, keys: bytearray | bytes, facts: BlockFacts | None = None) -> None:
        """Deliver a block of ``len(keys) / 32`` keys.  A bytearray is taken over and wiped later.  ``facts``: where
        the block is something else than ``hello`` says.

        Raises:
            ValueError: a block number that does not ascend, or not a whole number of keys.
            BufferError: no room (see :meth:`room`).
        """
        if not self._next_block <= block <= MAX_BLOCK:
            raise ValueError(f"block {block} after block {self._next_block - 1}")
        if not keys or len(keys) % KEY_BYTES:
            raise ValueError(f"a block of {len(keys)} bytes is not a number of keys")
        if len(keys) // KEY_BYTES > self.room():
            raise BufferError("the device holds as many keys as it may; nobody takes them")
        self._next_block = block + 1
        self._blocks[block] = _Block(block, keys if isinstance(keys, bytearray) else bytearray(keys), facts)
        self._wake()

    def void(self, before: int) -> None:
        """The other end does not have blocks below ``before``: erase them here and at the clients.  May raise
        ``OSError`` of the ledger."""
        self._void_before = max(self._void_before, before)
        self._next_block = max(self._next_block, before)
        self.erase(before)
        self._broadcast(self._void_header())

    def alarm(self, active: bool, kind: str, detail: str) -> None:
        """Raise or clear the alarm of one kind.  While any is active no block goes out."""
        if kind not in ALARM_KINDS:
            raise ValueError(f"alarm kind {kind!r}")
        if active:
            self._alarms[kind] = detail
        else:
            self._alarms.pop(kind, None)
        self._broadcast({"op": "alarm", "active": active, "kind": kind, "detail": detail})
        self._wake()

    def set_status(
        self, state: str, reason: str = "", *, qber: float | None = None, key_rate: float | None = None
    ) -> None:
        """What ``status`` answers from now on; ``state`` is one of ``messages.STATES``."""
        if state not in STATES:
            raise ValueError(f"device state {state!r}")
        self._status = (state, reason, qber, key_rate)

    # What a client's connection calls

    def status(self) -> DeviceStatus:
        state, reason, qber, key_rate = self._status
        alarm = "; ".join(f"{kind}: {detail}" for kind, detail in self._alarms.items()) or None
        return DeviceStatus(state, reason, qber, key_rate, alarm, self._next_block, len(self._blocks))

    def standing_events(self) -> list[dict[str, Any]]:
        """What a new subscriber has missed and must know before the first block."""
        events = [{"op": "alarm", "active": True, "kind": k, "detail": d} for k, d in self._alarms.items()]
        return [self._void_header(), *events] if self._void_before else events

    def next_to_send(self, first: int) -> _Block | None:
        """The oldest block with number >= ``first`` that may go to the subscriber now."""
        if self._alarms:
            return None
        return next((b for n, b in self._blocks.items() if n >= first and not b.touched), None)

    def take(self, key_id: str) -> bytearray | None:
        """One key for ``get``; None where no block that is still wholly here has it."""
        for block in list(self._blocks.values()):
            untouched = not block.touched
            key = None if block.sent else block.take(self.info.link, key_id)
            if key is None:
                continue
            if untouched:
                self._note_opened(block, key)
            if block.empty:
                del self._blocks[block.number]
                self._freed.set()
            return key
        return None

    def _note_opened(self, block: _Block, key: bytearray) -> None:
        """Raises ``OSError`` where the ledger cannot keep it; then the whole block is gone."""
        try:
            if self._ledger is not None:
                self._ledger.opened(block.number)
        except OSError:
            wipe(key)
            self._blocks.pop(block.number).wipe()
            self._freed.set()
            raise

    def erase(self, before: int) -> None:
        """Raises ``OSError`` where the ledger cannot keep it; then nothing is erased."""
        if self._ledger is not None:
            self._ledger.erased(before)
        self._erase_below(before)

    def forget(self, client: _Client) -> None:
        self._clients.discard(client)
        if self.subscriber is client:
            self.subscriber = None

    def _erase_below(self, before: int) -> None:
        for number in [n for n in self._blocks if n < before]:
            self._blocks.pop(number).wipe()
        self._freed.set()

    def _void_header(self) -> dict[str, Any]:
        return {"op": "void", "before": self._void_before}

    def _broadcast(self, header: dict[str, Any]) -> None:
        if self.subscriber is not None:
            self.subscriber.send(header)

    def _wake(self) -> None:
        if self.subscriber is not None:
            self.subscriber.wake.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        connection = writer.get_extra_info("socket")
        if task is None or self._server is None or not peer_is_trusted(connection):
            writer.close()
            return
        client = _Client(self, reader, writer, task)
        self._clients.add(client)
        with contextlib.suppress(asyncio.CancelledError):  # our own aclose; the task ends here in any case
            await client.run()


class _Client:
    """One connection: reads requests, answers, and sends the blocks of its subscription."""

    def __init__(
        self,
        device: DeviceServer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ) -> None:
        self.task = task
        self.wake = asyncio.Event()
        self._device, self._reader, self._writer = device, reader, writer
        self._greeted = False
        self._first = 0
        self._pump: asyncio.Task[None] | None = None

    async def run(self) -> None:
        decoder = Decoder()
        try:
            while data := await self._reader.read(_READ_CHUNK):
                for frame in decoder.feed_untrusted(data):
                    self._answer(frame)
                await self._writer.drain()
        except (BadAnswer, OSError):
            pass  # a client that breaks the framing, or went away: nothing to tell it
        finally:
            self._device.forget(self)
            self._writer.close()
            if self._pump is not None:
                self._pump.cancel()
                await asyncio.gather(self._pump, return_exceptions=True)
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    def send(self, header: dict[str, Any], trailer: bytes | bytearray = b"") -> None:
        if not self._writer.is_closing():
            frame = encode(header, trailer)
            self._writer.write(bytes(frame))
            wipe(frame)

    def _answer(self, frame: Frame) -> None:
        if not self._greeted and frame.op != "hello":
            self._error("bad-request", "the first request is hello")
            return
        try:
            match frame.op:
                case "hello":
                    self._hello(frame)
                case "status":
                    self.send(self._device.status().header())
                case "subscribe":
                    self._subscribe(number_untrusted(frame.header, "from", MAX_BLOCK + 1))
                case "ack":
                    block = number_untrusted(frame.header, "block", MAX_BLOCK)
                    self._device.erase(block + 1)
                    self.send({"op": "ack", "block": block})
                case "discard":
                    before = number_untrusted(frame.header, "before", MAX_BLOCK + 1)
                    self._device.erase(before)
                    self.send({"op": "discard", "before": before})
                case "get":
                    self._get(frame.header.get("key_id"))
                case _:
                    self._error("unknown-op", "no such request")
        except BadAnswer as error:
            self._error("bad-request", str(error))
        except OSError as error:
            self._error("device-fault", f"the device cannot keep what it handed over ({error.strerror})", 5.0)

    def _hello(self, frame: Frame) -> None:
        if frame.header.get("version") != VERSION:
            self._error("bad-request", f"this device speaks version {VERSION}")
            return
        self._greeted = True
        self.send(self._device.info.header())

    def _subscribe(self, first: int) -> None:
        if self._device.subscriber not in (None, self):
            self._error("not-authorised", "another client is subscribed; each key goes to one only", 1.0)
            return
        self._device.subscriber = self
        self._first = first
        self.send({"op": "subscribe", "from": first})
        for header in self._device.standing_events():
            self.send(header)
        self.wake.set()
        if self._pump is None:
            self._pump = asyncio.create_task(self._send_blocks())

    async def _send_blocks(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.wake.clear()
                while block := self._device.next_to_send(self._first):
                    block.sent = True
                    self._first = block.number + 1
                    self.send(block.header(), block.keys)
                    await self._writer.drain()
                await self.wake.wait()

    def _get(self, key_id: object) -> None:
        if alarm := self._device.status().alarm:
            self._error("device-fault", f"while an alarm stands nothing is delivered ({alarm[:150]})", 1.0)
            return
        key = self._device.take(key_id) if isinstance(key_id, str) else None
        if key is None:
            self._error("unknown-id", "no such key, or it was delivered before")
            return
        self.send({"op": "get", "key_id": key_id}, key)
        wipe(key)

    def _error(self, code: str, message: str, retry_after: float = 0.0) -> None:
        self.send({"op": "error", "code": code, "message": message, "retry_after": retry_after})
