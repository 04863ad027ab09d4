"""The device socket, both sides: order, exactly once, bounds, alarms, and what a broken client or device does."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.device.client import DeviceClient, follow
from keysource.device.framing import Decoder, Frame, encode
from keysource.device.messages import (
    AlarmEvent,
    BlockEvent,
    BlockFacts,
    DeviceInfo,
    Event,
    VoidEvent,
    event_untrusted,
)
from keysource.device.server import DeviceServer, peer_is_trusted
from keysource.errors import BadAnswer, KeySourceError, Unauthorized, Unavailable, UnknownKeyID

INFO = DeviceInfo("test device", "left-right", End.A, Owner.ALTERNATE, Origin.SIMULATED, 0)


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[DeviceServer]:
    server = DeviceServer(tmp_path / "device.sock", INFO, max_blocks=4, max_keys=40)
    await server.start()
    yield server
    await server.aclose()


@pytest.fixture
async def client(device: DeviceServer) -> AsyncIterator[DeviceClient]:
    connected = await DeviceClient.connect(device.path)
    yield connected
    await connected.aclose()


def block(keys: int) -> bytearray:
    return bytearray(os.urandom(32 * keys))


async def take(client: DeviceClient, count: int) -> list[Event]:
    events = []
    async with asyncio.timeout(5):
        async for event in client.events():
            events.append(event)
            if len(events) == count:
                break
    return events


async def test_hello_and_status_say_what_the_engine_said(device: DeviceServer, client: DeviceClient) -> None:
    device.set_status("up", "fine", qber=0.02, key_rate=4.5)
    device.publish(3, block(2))
    status = await client.status()
    assert client.info == INFO
    assert (status.state, status.reason, status.qber, status.key_rate) == ("up", "fine", 0.02, 4.5)
    assert (status.alarm, status.next_block, status.blocks_held) == (None, 4, 1)


async def test_socket_is_private(device: DeviceServer) -> None:
    assert stat.S_IMODE(device.path.stat().st_mode) == 0o600


async def test_blocks_held_and_later_come_in_order_from_the_first_wanted(
    device: DeviceServer, client: DeviceClient
) -> None:
    contents = {number: block(3) for number in (1, 4, 5)}
    for number in (1, 4):
        device.publish(number, bytes(contents[number]))
    await client.subscribe(4)
    device.publish(5, bytes(contents[5]))
    events = await take(client, 2)
    assert events == [BlockEvent(4, contents[4]), BlockEvent(5, contents[5])]


async def test_ack_erases_and_wipes_and_makes_room(device: DeviceServer, client: DeviceClient) -> None:
    first, second = block(20), block(20)
    device.publish(0, first)
    device.publish(1, second)
    assert device.room() == 0
    waiting = asyncio.create_task(device.wait_for_room(20))
    await client.ack(0)
    async with asyncio.timeout(5):
        await waiting
    assert not any(first)
    assert any(second)
    assert device.room() == 20


async def test_full_device_refuses_instead_of_dropping(device: DeviceServer) -> None:
    for number in range(4):
        device.publish(number, block(1))
    assert device.room() == 0
    with pytest.raises(BufferError):
        device.publish(4, block(1))


@pytest.mark.parametrize("number,length", [(1, 32), (2, 31), (2, 0), (2**64, 32)])
async def test_publish_refuses_old_numbers_and_odd_lengths(device: DeviceServer, number: int, length: int) -> None:
    device.publish(1, block(1))
    with pytest.raises(ValueError, match="block"):
        device.publish(number, bytes(length))


async def test_unacknowledged_block_comes_again_after_reconnect(device: DeviceServer, client: DeviceClient) -> None:
    device.publish(0, block(2))
    await client.subscribe(0)
    seen = await take(client, 1)
    await client.aclose()
    again = await DeviceClient.connect(device.path)
    await _until_subscribed(again)
    assert await take(again, 1) == seen
    await again.aclose()


async def _until_subscribed(client: DeviceClient) -> None:
    """The device may notice the old connection's end a moment later."""
    async with asyncio.timeout(5):
        while True:
            try:
                return await client.subscribe(0)
            except Unauthorized:
                await asyncio.sleep(0)


async def test_two_subscribers_would_have_the_same_keys(device: DeviceServer, client: DeviceClient) -> None:
    await client.subscribe(0)
    other = await DeviceClient.connect(device.path)
    with pytest.raises(Unauthorized):
        await other.subscribe(0)
    assert (await other.status()).state == "starting"
    await other.aclose()


async def test_get_gives_once_and_takes_the_block_from_subscribers(
    device: DeviceServer, client: DeviceClient
) -> None:
    content = block(4)
    copy = bytes(content)
    device.publish(7, content)
    device.publish(8, block(1))
    key_id = derive_key_id("left-right", 7, 2)
    key = await client.get(key_id)
    assert (key.key_id, bytes(key.material)) == (key_id, copy[64:96])
    assert (key.origin, key.hops) == (Origin.SIMULATED, 0)
    assert not any(content[64:96])
    with pytest.raises(UnknownKeyID):
        await client.get(key_id)
    await client.subscribe(0)
    [event] = await take(client, 1)
    assert isinstance(event, BlockEvent)
    assert event.block == 8


async def test_get_knows_nothing_of_a_block_that_was_sent(device: DeviceServer, client: DeviceClient) -> None:
    device.publish(7, block(4))
    await client.subscribe(0)
    await take(client, 1)
    with pytest.raises(UnknownKeyID):
        await client.get(derive_key_id("left-right", 7, 2))


async def test_block_whose_keys_are_all_taken_makes_room(device: DeviceServer, client: DeviceClient) -> None:
    device.publish(0, block(40))
    for i in range(40):
        await client.get(derive_key_id("left-right", 0, i))
    assert device.room() == 40


async def test_void_reaches_present_and_later_subscribers(device: DeviceServer, client: DeviceClient) -> None:
    first = block(1)
    device.publish(0, first)
    device.void(5)
    assert not any(first)
    with pytest.raises(ValueError, match="block"):
        device.publish(4, block(1))
    await client.subscribe(0)
    assert await take(client, 1) == [VoidEvent(5)]
    device.void(9)
    assert await take(client, 1) == [VoidEvent(9)]


async def test_alarm_holds_blocks_back_until_all_kinds_are_cleared(
    device: DeviceServer, client: DeviceClient
) -> None:
    await client.subscribe(0)
    device.alarm(True, "qber", "11 %")
    device.alarm(True, "monitor", "light")
    device.publish(0, block(1))
    assert (await client.status()).alarm == "qber: 11 %; monitor: light"
    device.alarm(False, "qber", "")
    device.alarm(False, "monitor", "")
    events = await take(client, 5)
    assert events[:4] == [
        AlarmEvent(True, "qber", "11 %"),
        AlarmEvent(True, "monitor", "light"),
        AlarmEvent(False, "qber", ""),
        AlarmEvent(False, "monitor", ""),
    ]
    assert isinstance(events[4], BlockEvent)


async def test_discard_erases_below(device: DeviceServer, client: DeviceClient) -> None:
    device.publish(0, block(1))
    device.publish(1, block(1))
    await client.discard(1)
    assert (await client.status()).blocks_held == 1


async def test_close_wipes_and_tells_clients(device: DeviceServer, client: DeviceClient) -> None:
    content = block(2)
    device.alarm(True, "device", "held back")
    device.publish(0, content)
    await client.subscribe(0)
    await device.aclose()
    await device.aclose()
    assert not any(content)
    assert not device.path.exists()
    with pytest.raises(Unavailable):
        await take(client, 9)
    with pytest.raises(KeySourceError):
        await client.status()


async def test_cancelled_get_burns_the_key_and_keeps_the_order(device: DeviceServer, client: DeviceClient) -> None:
    device.publish(0, block(2))
    lost, kept = derive_key_id("left-right", 0, 0), derive_key_id("left-right", 0, 1)
    task = asyncio.create_task(client.get(lost))
    await asyncio.sleep(0)  # the request is out, the answer not yet in
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await client.get(kept)).key_id == kept
    with pytest.raises(UnknownKeyID):
        await client.get(lost)


async def test_nobody_there() -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        await DeviceClient.connect("/nonexistent/device.sock")


async def test_second_device_on_one_path_is_refused_and_a_dead_socket_replaced(
    device: DeviceServer, tmp_path: Path
) -> None:
    with pytest.raises(KeySourceError, match="another process"):
        await DeviceServer(device.path, INFO).start()
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    second = DeviceServer(dead, INFO)
    await second.start()
    await second.aclose()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(KeySourceError, match="not a socket"):
        await DeviceServer(tmp_path / "file", INFO).start()
    with pytest.raises(KeySourceError, match="107"):
        await DeviceServer(tmp_path / ("x" * 200), INFO).start()


@pytest.mark.parametrize(
    "header,code",
    [
        ({"op": "status"}, "bad-request"),
        ({"op": "hello", "version": 2}, "bad-request"),
        ({"op": "hello", "version": 1}, None),
        ({"op": "launch"}, "unknown-op"),
        ({"op": "ack", "block": -1}, "bad-request"),
        ({"op": "ack", "block": True}, "bad-request"),
        ({"op": "subscribe"}, "bad-request"),
        ({"op": "get", "key_id": 7}, "unknown-id"),
    ],
)
async def test_wrong_requests_get_an_error_answer(
    device: DeviceServer, header: dict[str, object], code: str | None
) -> None:
    reader, writer = await asyncio.open_unix_connection(str(device.path))
    if header["op"] not in ("status", "hello"):
        writer.write(encode({"op": "hello", "version": 1}))
    writer.write(encode(header))
    writer.write_eof()
    last = Decoder().feed_untrusted(await reader.read())[-1]
    assert last.header.get("code") == code
    writer.close()
    await writer.wait_closed()


async def test_client_with_broken_framing_is_cut_and_others_go_on(device: DeviceServer, client: DeviceClient) -> None:
    reader, writer = await asyncio.open_unix_connection(str(device.path))
    writer.write(b"\xff" * 64)
    assert await reader.read() == b""
    writer.close()
    assert (await client.status()).state == "starting"


GOOD_HELLO = INFO.header()


@pytest.mark.parametrize(
    "answers",
    [
        [GOOD_HELLO | {"version": 2}],
        [GOOD_HELLO | {"key_bits": 128}],
        [GOOD_HELLO | {"origin": "magic"}],
        [GOOD_HELLO | {"link": ""}],
        [GOOD_HELLO | {"hops": -1}],
        [GOOD_HELLO | {"end": None}],
        [{"op": "status"}],
    ],
)
async def test_client_refuses_a_wrong_hello(tmp_path: Path, answers: list[dict[str, object]]) -> None:
    async with _liar(tmp_path / "s", answers), asyncio.timeout(5):
        with pytest.raises(BadAnswer):
            await DeviceClient.connect(tmp_path / "s")


@pytest.mark.parametrize(
    "event",
    [
        encode({"op": "block", "block": 1, "count": 2}, bytes(63)),
        encode({"op": "block", "block": 1, "count": 0}),
        encode({"op": "block", "block": -1, "count": 1}, bytes(32)),
        encode({"op": "alarm", "active": 1, "kind": "qber", "detail": ""}),
        encode({"op": "alarm", "active": True, "kind": "boredom", "detail": ""}),
        encode({"op": "void", "before": "all"}),
        encode({"op": "ack", "block": 1}),
        b"\x00\x00\x00\x00\x00\x00\x00\x00",
    ],
)
async def test_client_refuses_a_wrong_event(tmp_path: Path, event: bytes) -> None:
    async with _liar(tmp_path / "s", [GOOD_HELLO], bytes(event)), asyncio.timeout(5):
        with pytest.raises(BadAnswer):
            client = await DeviceClient.connect(tmp_path / "s")
            try:
                await take(client, 1)
            finally:
                await client.aclose()


class _liar:
    """A device that answers each request with the next of ``answers`` and then sends ``more``."""

    def __init__(self, path: Path, answers: list[dict[str, object]], more: bytes = b"") -> None:
        self._path, self._answers, self._more = path, answers, more

    async def __aenter__(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in self._answers:
            await reader.read(4096)
            writer.write(encode(answer))
        writer.write(self._more)
        await reader.read()
        writer.close()


class _Recorder:
    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.errors: list[KeySourceError] = []
        self.changed = asyncio.Event()

    def next_block(self) -> int:
        return self.blocks[-1] + 1 if self.blocks else 0

    async def connected(self, device: DeviceClient) -> None:
        assert device.info == INFO

    async def event(self, device: DeviceClient, event: Event) -> None:
        if isinstance(event, BlockEvent):
            await device.ack(event.block)
            self.blocks.append(event.block)
            self.changed.set()

    def disconnected(self, error: KeySourceError) -> None:
        self.errors.append(error)
        self.changed.set()


async def test_follow_comes_back_after_the_device_died(tmp_path: Path) -> None:
    recorder, waits = _Recorder(), []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    task = asyncio.create_task(follow(tmp_path / "s", recorder, sleep=sleep))
    async with asyncio.timeout(10):
        while len(waits) < 10:
            await asyncio.sleep(0)
        assert waits[:7] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
        for number in range(3):
            server = DeviceServer(tmp_path / "s", INFO)
            await server.start()
            server.publish(number, block(2))
            while number not in recorder.blocks:
                recorder.changed.clear()
                await recorder.changed.wait()
            await server.aclose()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorder.blocks == [0, 1, 2]
    assert all(isinstance(error, Unavailable) for error in recorder.errors)


class _Credentials:
    """A socket whose peer runs as ``uid``; unix(7): pid, uid, gid."""

    def __init__(self, uid: int) -> None:
        self._uid = uid

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return struct.pack("3i", 1, self._uid, 0)


def test_only_our_own_user_and_root_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    trusted = [uid for uid in (0, 1, 999, 1000, 1001) if peer_is_trusted(_Credentials(uid))]  # type: ignore[arg-type]
    assert trusted == [0, 1000]


async def test_both_sides_ask_for_the_peers_credentials(
    device: DeviceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("keysource.device.client.peer_is_trusted", lambda *_: False)
        with pytest.raises(Unauthorized, match="another user"):
            await DeviceClient.connect(device.path)
    with monkeypatch.context() as patch:
        patch.setattr("keysource.device.server.peer_is_trusted", lambda *_: False)
        with pytest.raises(Unavailable):
            await DeviceClient.connect(device.path)
    await (await DeviceClient.connect(device.path)).aclose()


async def test_large_blocks_and_a_slow_reader(tmp_path: Path) -> None:
    server = DeviceServer(tmp_path / "big.sock", INFO, max_keys=200_000)
    await server.start()
    contents = [os.urandom(32 * 60_000) for _ in range(3)]
    for number, content in enumerate(contents):
        server.publish(number, content)
    client = await DeviceClient.connect(server.path)
    await client.subscribe(0)
    assert [event.keys for event in await take(client, 3) if isinstance(event, BlockEvent)] == contents
    await client.aclose()
    await server.aclose()


async def test_get_gives_nothing_while_an_alarm_stands(device: DeviceServer, client: DeviceClient) -> None:
    device.publish(7, block(2))
    key_id = derive_key_id("left-right", 7, 1)
    device.alarm(True, "qber", "12 %")
    with pytest.raises(Unavailable, match="qber: 12 %") as error:
        await client.get(key_id)
    assert error.value.answered  # and the key is still there
    device.alarm(False, "qber", "")
    assert (await client.get(key_id)).key_id == key_id


HOSTILE_FACTS = [
    {"origin": "magic", "hops": 1},
    {"origin": 3, "hops": 1},
    {"origin": "relayed"},
    {"origin": "relayed", "hops": -1},
    {"origin": "relayed", "hops": 256},
    {"origin": "relayed", "hops": 1, "paths": "a"},
    {"origin": "relayed", "hops": 1, "paths": ["a"]},
    {"origin": "relayed", "hops": 1, "paths": [["a", 1]]},
    {"origin": "relayed", "hops": 1, "paths": [["a\x1b"]]},
    {"origin": "relayed", "hops": 1, "paths": [[]] * 17},
]


@pytest.mark.parametrize("fields", HOSTILE_FACTS)
def test_facts_of_a_block_that_are_none_are_refused(fields: dict[str, object]) -> None:
    header = {"op": "block", "block": 1, "count": 1, **fields}
    with pytest.raises(BadAnswer):
        event_untrusted(Frame(header, bytearray(32)))


def test_facts_of_a_block_come_through() -> None:
    facts = BlockFacts(Origin.RELAYED, 2, (("a", "b", "c", "d"), ("a", "e", "d")))
    (frame,) = Decoder().feed_untrusted(encode({"op": "block", "block": 1, "count": 1, **facts.fields()}, bytes(32)))
    event = event_untrusted(frame)
    assert isinstance(event, BlockEvent) and event.facts == facts
    plain = event_untrusted(Frame({"op": "block", "block": 1, "count": 1}, bytearray(32)))
    assert isinstance(plain, BlockEvent) and plain.facts is None
