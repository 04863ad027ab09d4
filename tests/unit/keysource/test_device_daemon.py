"""The hardware daemon with its drivers: couriered files, a vendor's library, restarts, faults, configuration."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from keysource.base import End, Origin, SourceContext, derive_key_id
from keysource.device.client import DeviceClient
from keysource.device.daemon import DeviceDaemon, load
from keysource.device.driver import DriverContext
from keysource.device.hardware import HardwareSource
from keysource.device.marks import Marks
from keysource.device.messages import AlarmEvent, BlockEvent
from keysource.device.vendor import VendorBlock, VendorDriver
from keysource.errors import BadSettings, KeySourceError, Unavailable, UnknownKeyID

FILE = """
version = 1
[device]
name = "courier"
link = "left-right"
end = "{end}"
origin = "couriered"
socket = "d.sock"
[driver]
type = "{driver}"
{rest}
"""


def site(folder: Path, end: str = "a", driver: str = "courier", rest: str = 'path = "in"') -> Path:
    (folder / "in").mkdir(parents=True, exist_ok=True)
    file = folder / "device.toml"
    file.write_text(FILE.format(end=end, driver=driver, rest=rest))
    return file


def put(folder: Path, name: str, keys: bytes) -> Path:
    new = folder / "in" / f"{name}.part"
    new.write_bytes(keys)
    new.chmod(0o600)
    return new.rename(folder / "in" / name)


async def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(file: Path) -> AsyncIterator[DeviceDaemon]:
    async def quick(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))

    daemon = DeviceDaemon(file, sleep=quick)
    if hasattr(daemon.driver, "_sleep"):
        daemon.driver._sleep = quick
    ready = asyncio.Event()
    task = asyncio.create_task(daemon.run(ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    try:
        if task.done():
            task.result()
        yield daemon
    finally:
        task.cancel()
        waiting.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


def source(folder: Path, **more: object) -> HardwareSource:
    return HardwareSource({"socket": "d.sock", **more}, SourceContext("qkd", folder, folder, "left"))


async def next_block(client: DeviceClient) -> BlockEvent:
    async with asyncio.timeout(10):
        async for event in client.events():
            assert isinstance(event, BlockEvent)
            return event
    raise AssertionError("no event")


async def test_couriered_files_become_keys_at_both_ends_and_are_erased_when_used(tmp_path: Path) -> None:
    content = os.urandom(32 * 1500)
    files = [put(site(tmp_path / end, end).parent, "monday-7.key", content) for end in "ab"]
    async with running(tmp_path / "a/device.toml"), running(tmp_path / "b/device.toml"):
        left, right = source(tmp_path / "a", origin="couriered", end="a"), source(tmp_path / "b")
        await left.start()
        await right.start()
        await until(lambda: not any(file.exists() for file in files))
        await until(lambda: left.next_block() == right.next_block() == (7 << 24) + 2)
        drawn = [await left.get_key("x") for _ in range(700)]
        assert drawn[0].key_id == derive_key_id("left-right", 7 << 24, 0)
        assert bytes(drawn[0].material) == content[:32]
        assert bytes(drawn[600].material) == content[32 * 1200 : 32 * 1201]
        for key in drawn:
            copy = await right.get_key_with_id("x", key.key_id)
            assert (copy.material, copy.origin) == (key.material, Origin.COURIERED)
        for closing in (left, right):
            await closing.aclose()


async def test_what_was_acknowledged_never_comes_again_after_a_restart(tmp_path: Path) -> None:
    file = site(tmp_path)
    contents = {n: os.urandom(64) for n in (3, 4, 5)}
    for number, content in contents.items():
        put(tmp_path, f"{number}.key", content)
    async with running(file):
        client = await DeviceClient.connect(tmp_path / "d.sock")
        await client.subscribe(0)
        assert (await next_block(client)).keys == contents[3]
        await client.ack(3 << 24)
        assert (await next_block(client)).block == 4 << 24  # seen, not acknowledged
        await client.aclose()
    put(tmp_path, "3.key", contents[3])  # a courier who comes twice
    async with running(file):
        client = await DeviceClient.connect(tmp_path / "d.sock")
        await client.subscribe(0)
        assert [(await next_block(client)).keys for _ in range(2)] == [contents[4], contents[5]]
        await client.aclose()


async def test_a_block_opened_by_get_is_gone_after_a_restart(tmp_path: Path) -> None:
    file = site(tmp_path)
    put(tmp_path, "1.key", os.urandom(96))
    key_id = derive_key_id("left-right", 1 << 24, 2)
    async with running(file) as daemon:
        await until(lambda: daemon.server and daemon.server.holds(1 << 24))
        client = await DeviceClient.connect(tmp_path / "d.sock")
        await client.get(key_id)
        await client.aclose()
    put(tmp_path, "2.key", os.urandom(32))
    async with running(file) as daemon:
        await until(lambda: daemon.server and daemon.server.holds(2 << 24))
        client = await DeviceClient.connect(tmp_path / "d.sock")
        for position in range(3):
            with pytest.raises(UnknownKeyID):
                await client.get(derive_key_id("left-right", 1 << 24, position))
        await client.aclose()


@pytest.mark.parametrize(
    ("name", "content", "mode", "said"),
    [
        ("1.key", b"k" * 33, 0o600, "33 bytes are not a number of keys"),
        ("1.key", bytes(64), 0o600, "a key of zeros"),
        ("1.key", b"k" * 32, 0o644, "is open to others"),
    ],
)
async def test_a_bad_file_is_named_in_the_status(
    tmp_path: Path, name: str, content: bytes, mode: int, said: str
) -> None:
    file = site(tmp_path)
    put(tmp_path, name, content).chmod(mode)
    async with running(file) as daemon:
        await until(lambda: daemon.server and daemon.server.status().state == "down")
        assert daemon.server is not None
        assert said in daemon.server.status().reason
        assert "1.key" in daemon.server.status().reason


async def test_a_folder_that_comes_later_heals(tmp_path: Path) -> None:
    file = site(tmp_path)
    (tmp_path / "in").rmdir()
    async with running(file) as daemon:
        await until(lambda: daemon.server and daemon.server.status().state == "down")
        (tmp_path / "in").mkdir()
        put(tmp_path, "1.key", os.urandom(32))
        await until(lambda: daemon.server and daemon.server.holds(1 << 24))


async def test_two_daemons_do_not_share_a_folder(tmp_path: Path) -> None:
    async with running(site(tmp_path)):
        with pytest.raises(BadSettings, match="another device daemon"):
            await DeviceDaemon(tmp_path / "device.toml").run()


def test_marks_of_another_link_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    marks = Marks(tmp_path, "one", End.A)
    marks.open()
    marks.erased(5)
    marks.close()
    for other in (Marks(tmp_path, "two", End.A), Marks(tmp_path, "one", End.B)):
        with pytest.raises(BadSettings, match="belongs to another link"):
            other.open()
    (tmp_path / "handed-over.json").write_text("{}")
    with pytest.raises(BadSettings, match="damaged"):
        Marks(tmp_path, "one", End.A).open()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('end = "a"', 'end = "c"'), r"device\.toml: \[device\] end: "),
        (('name = "courier"', "colour = 1"), r"\[device\] (name: is required|colour: no such key)"),
        (('path = "in"', ""), r"\[driver\] path: is required"),
        (('path = "in"', 'path = "in"\nsize = 1'), r"\[driver\] size: no such key"),
        (('"courier"\npath', '"nobody"\npath'), r"\[driver\] type: unknown driver 'nobody'"),
        (('"courier"\npath', '"no.such:Thing"\npath'), r"\[driver\] type: driver 'no.such:Thing' does not load"),
        (("version = 1", "version = 2"), "version"),
        (("version = 1", "version = "), "not TOML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = site(tmp_path)
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(BadSettings, match=said) as error:
        DeviceDaemon(file)
    assert "\n" not in str(error.value)
    assert load(site(tmp_path)).device.end is End.A


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "socket: is required"),
        ({"socket": "s", "role": "left"}, "role: no such key"),
        ({"socket": "s", "user": "no-such-user-here"}, "user: there is no user"),
        ({"socket": "s" * 200}, "107"),
    ],
)
def test_a_wrong_source_table_is_one_sentence(tmp_path: Path, table: dict[str, object], said: str) -> None:
    with pytest.raises(BadSettings, match=said):
        HardwareSource(table, SourceContext("qkd", tmp_path, tmp_path, "left"))


async def test_a_device_that_is_not_what_is_configured_gives_no_key(tmp_path: Path) -> None:
    put(site(tmp_path).parent, "1.key", os.urandom(320))
    async with running(tmp_path / "device.toml"):
        wrong = source(tmp_path, origin="qkd")
        await wrong.start()
        async with asyncio.timeout(10):
            while "configured is" not in (await wrong.status("x")).reason:
                await asyncio.sleep(0.01)
        with pytest.raises(KeySourceError):
            await wrong.get_key("x")
        await wrong.aclose()


class Library:
    """A stand-in for a vendor's library: both ends of one 'fibre' in memory."""

    def __init__(self) -> None:
        self.fibre = {n: bytes([n]) * 31 + os.urandom(33) for n in range(1, 9)}
        self.said_alarm: str | None = None
        self.gone = False
        self.opened: list[int] = []
        self.next = 0

    def open(self, address: str, first_block: int) -> None:
        if self.gone:
            raise ConnectionRefusedError(111, "Connection refused")
        self.opened.append(first_block)
        self.next = max(1, first_block)

    def read_block(self, timeout: float) -> VendorBlock | None:
        if self.gone:
            raise TimeoutError
        if self.next not in self.fibre:
            return None
        self.next += 1
        return VendorBlock(self.next - 1, bytearray(self.fibre[self.next - 1]), qber=0.02)

    def alarm(self) -> str | None:
        return self.said_alarm

    def close(self) -> None:
        pass


LIBRARY = Library()


def lab_driver(settings: dict[str, object], context: DriverContext) -> VendorDriver:
    return VendorDriver(settings, context, sdk=lambda: LIBRARY)


async def test_the_vendor_skeleton_over_a_library_delivers_alarms_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    global LIBRARY
    LIBRARY = Library()
    monkeypatch.setattr("keysource.device.daemon.driver_factory", lambda kind: lab_driver)
    file = site(tmp_path, driver="lab", rest='address = "10.0.0.7"')
    async with running(file) as daemon:
        keys = source(tmp_path)
        await keys.start()
        await until(lambda: keys.next_block() == 9)
        assert bytes((await keys.get_key("x")).material) == LIBRARY.fibre[1][:32]
        assert (await keys.status("x")).qber == 0.02
        LIBRARY.said_alarm = "qber over its limit"
        await until(lambda: daemon.server and daemon.server.status().alarm)
        async with asyncio.timeout(10):
            while (await keys.status("x")).alarm is None:
                await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="alarm"):
            await keys.get_key("x")
        LIBRARY.said_alarm = None
        await until(lambda: daemon.server and not daemon.server.status().alarm)
        LIBRARY.gone = True
        await until(lambda: daemon.server and daemon.server.status().state == "down")
        assert daemon.server is not None
        assert "10.0.0.7" in daemon.server.status().reason
        LIBRARY.gone = False
        LIBRARY.fibre[9] = os.urandom(64)
        await until(lambda: keys.next_block() == 10)
        assert LIBRARY.opened[0] == 0
        assert LIBRARY.opened[-1] > 0
        await keys.aclose()


async def test_an_alarm_is_told_before_the_block_it_came_with_and_again_after_a_break(tmp_path: Path) -> None:
    library = Library()
    context = DriverContext("left-right", End.A, tmp_path, tmp_path)
    driver = VendorDriver({"address": "10.0.0.7"}, context, sdk=lambda: library)
    read = library.read_block

    def read_and_break(timeout: float) -> VendorBlock | None:
        library.said_alarm = "qber over its limit"
        return read(timeout)

    async def next_of(kind: type) -> list[object]:
        told: list[object] = []
        while not told or not isinstance(told[-1], kind):
            told.append(await driver.next_report())
        return told

    library.read_block = read_and_break  # type: ignore[method-assign]
    await driver.start(0)
    told = await next_of(BlockEvent)
    assert any(isinstance(one, AlarmEvent) and one.active for one in told)
    await driver.aclose()  # as the daemon does where the device broke; the alarm may not have been told yet
    await driver.start(2)
    told = await next_of(BlockEvent)
    assert any(isinstance(one, AlarmEvent) and one.active for one in told)
    await driver.aclose()


async def test_an_alarm_of_a_kind_that_there_is_not_is_an_alarm(tmp_path: Path) -> None:
    async with running(site(tmp_path)) as daemon:
        assert daemon.server is not None
        await daemon._pass_on(daemon.server, AlarmEvent(True, "QBER", "12 %"))
        assert daemon.server.status().alarm == "device: QBER: 12 %"
        await daemon._pass_on(daemon.server, AlarmEvent(False, "QBER", ""))
        assert daemon.server.status().alarm is None


def test_the_skeleton_as_it_stands_says_what_it_is(tmp_path: Path) -> None:
    file = site(tmp_path, driver="keysource.device.vendor:VendorDriver", rest='address = "10.0.0.7"')
    with pytest.raises(BadSettings, match=r"\[driver\] type: this is the skeleton"):
        DeviceDaemon(file)


KILLS = 50 if os.environ.get("QVPN_TEST_LONG") else 5


@pytest.mark.timeout(300)
async def test_kill_9_of_the_daemon_gives_no_block_twice(tmp_path: Path) -> None:
    """Whoever subscribes from 0 each time sees after a kill nothing that it had acknowledged."""
    file = site(tmp_path)
    for number in range(1, 8 * KILLS):
        put(tmp_path, f"{number}.key", os.urandom(32))
    accepted: list[bytes] = []
    for kill in range(KILLS):
        command = [sys.executable, "-m", "keysource.device", "serve", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            client = await DeviceClient.connect(tmp_path / "d.sock")
            await client.subscribe(0)
            for _ in range(kill % 4):
                event = await next_block(client)
                await client.ack(event.block)
                accepted.append(bytes(event.keys))
            process.send_signal(signal.SIGKILL)
            process.wait()
            await client.aclose()
    assert len(accepted) > KILLS
    assert len(set(accepted)) == len(accepted)


def test_check_and_a_wrong_file_as_commands(tmp_path: Path) -> None:
    file = site(tmp_path)
    command = [sys.executable, "-m", "keysource.device", "check", str(file)]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    file.write_text("version = 1")
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(bad.stderr.splitlines()) == 1
    assert "device" in bad.stderr
