"""``simulated``: settings, the device's alarms and deaths, and the child process (a test link, really spawned)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from keysource.base import Claiming, End, Hop, Key, KeySource, Origin, Owner, SourceContext, derive_key_id
from keysource.device.messages import DeviceInfo
from keysource.device.server import DeviceServer
from keysource.device.source import DeviceSource
from keysource.errors import BadAnswer, BadSettings, Exhausted, Unavailable, UnknownKeyID
from keysource.private import write_private
from keysource.simulated.child import Child
from keysource.simulated.link_file import link_toml
from keysource.simulated.source import SimulatedSettings, SimulatedSource

LINK = {"role": "left", "listen": "127.0.0.1:1", "auth_key": "link.key"}
SIGNS = {k: v for k, v in LINK.items() if k != "auth_key"} | {
    "auth_bootstrap": "signature",
    "name": "l",
    "identity": "me.pem",
    "peer_identity": "peer.pub",
}


def context(folder: Path) -> SourceContext:
    return SourceContext("qkd", folder, folder, "left")


def info(**more: object) -> DeviceInfo:
    fields = {"device": "test", "link": "l", "end": End.A, "owner": Owner.ALTERNATE, "origin": Origin.SIMULATED}
    return DeviceInfo(**(fields | more))  # type: ignore[arg-type]


async def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[DeviceServer]:
    server = DeviceServer(tmp_path / "d.sock", info())
    await server.start()
    yield server
    await server.aclose()


@pytest.fixture
async def source(device: DeviceServer, tmp_path: Path) -> AsyncIterator[SimulatedSource]:
    made = SimulatedSource({"socket": "d.sock"}, context(tmp_path))
    await made.start()
    yield made
    await made.aclose()


async def drawn(source: KeySource) -> Key:
    """A key, as soon as one is there."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await source.get_key("x")
            except Unavailable:
                await asyncio.sleep(0.01)


# Settings


@pytest.mark.parametrize(
    "table,key,words",
    [
        ({}, "", '"role" is missing'),
        ({k: v for k, v in LINK.items() if k != "auth_key"}, "", '"auth_key" is missing'),
        ({"role": "left", "peer": "h:1", "auth_key": "k"}, "", '"listen" is missing'),
        ({"role": "right", "listen": "h:1", "auth_key": "k"}, "", '"peer" is missing'),
        (LINK | {"role": "middle"}, "role", "left"),
        (LINK | {"socket": "x"}, "", "no place beside"),
        ({"socket": "x", "preset": "demo"}, "", '"preset" has no place beside'),
        (LINK | {"peer": "h:1"}, "", '"peer" has no place at role "left"'),
        (LINK | {"role": "right", "peer": "h:1"}, "", '"listen" has no place at role "right"'),
        (LINK | {"pixels": 3}, "pixels", "no such key"),
        (LINK | {"owner": "eve"}, "owner", "alternate"),
        ({"socket": "x" * 200}, "socket", "107"),
        (LINK | {"listen": "::1:80"}, "listen", "brackets"),
        (LINK | {"fibre": "h"}, "fibre", "HOST:PORT"),
        (LINK | {"auth_bootstrap": "signature"}, "", '"name" is missing'),
        (SIGNS | {"auth_key": "k"}, "", '"auth_key" has no place beside auth_bootstrap'),
        (LINK | {"identity": "i"}, "", '"identity" has no place beside auth_bootstrap'),
        ({"socket": "x", "peer_identity": "p"}, "", '"peer_identity" has no place beside'),
    ],
)
def test_wrong_table_is_one_sentence(table: dict[str, object], key: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=words) as caught:
        SimulatedSource(table, context(tmp_path))
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_making_it_opens_nothing(tmp_path: Path) -> None:
    source = SimulatedSource(LINK, context(tmp_path))
    assert isinstance(source, KeySource)
    assert list(tmp_path.iterdir()) == []


def test_generated_file_is_what_the_link_reads(tmp_path: Path) -> None:
    from keysource.qkd.config import EndConfig, load  # needs numpy, the sources do not

    settings = SimulatedSettings(**LINK, owner=Owner.B, fibre="[::1]:9")  # type: ignore[arg-type]
    file = tmp_path / "link.toml"
    keys = {"auth_key": tmp_path / "link.key"}
    write_private(file, link_toml(settings.model_dump(), keys, tmp_path / "s", context(tmp_path)).encode())
    config = load(file)
    assert isinstance(config, EndConfig)
    assert (config.end, config.owner, str(config.classical)) == (End.A, Owner.B, "127.0.0.1:1")
    assert (config.auth_key, config.socket, str(config.fibre)) == (tmp_path / "link.key", tmp_path / "s", "[::1]:9")


def test_generated_file_of_a_signing_end_is_what_the_link_reads(tmp_path: Path) -> None:
    from keysource.qkd.config import EndConfig, load

    settings, file = SimulatedSettings(**SIGNS), tmp_path / "link.toml"  # type: ignore[arg-type]
    keys = {"identity": tmp_path / "me.pem", "peer_identity": tmp_path / "peer.pub"}
    write_private(file, link_toml(settings.model_dump(), keys, tmp_path / "s", context(tmp_path)).encode())
    config = load(file)
    assert isinstance(config, EndConfig) and config.name == "l"
    assert config.identities == (tmp_path / "me.pem", tmp_path / "peer.pub")


async def test_missing_identity_is_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="No such file") as caught:
        await SimulatedSource(SIGNS, context(tmp_path)).start()
    assert caught.value.key == "identity"


async def test_missing_auth_key_is_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="No such file") as caught:
        await SimulatedSource(LINK, context(tmp_path)).start()
    assert caught.value.key == "auth_key"


# The device


async def test_status_tells_what_the_device_measures(device: DeviceServer, source: SimulatedSource) -> None:
    device.set_status("up", qber=0.03, key_rate=7.0)
    device.publish(0, os.urandom(64 * 32))
    await drawn(source)
    status = await source.status("x")
    assert (status.ready, status.reason, status.origin, status.hop) == (True, "", Origin.SIMULATED, Hop.LOCAL)
    assert (status.stored_keys, status.qber, status.alarm) == (31, 0.03, None)
    assert status.key_rate is not None and status.key_rate > 0
    assert source.sae_pair("x").local == "l/a"
    assert source.sae_pair("x").remote == "l/b"


async def test_before_the_device_is_there(tmp_path: Path) -> None:
    source = SimulatedSource({"socket": "none.sock"}, context(tmp_path))
    await source.start()
    status = await source.status("x")
    assert not status.ready
    assert status.origin is Origin.SIMULATED
    for call in (source.get_key("x"), source.get_key_with_id("x", "y")):
        with pytest.raises(Unavailable):
            await call
    with pytest.raises(Unavailable):
        source.sae_pair("x")
    await source.aclose()


async def test_empty_stock_says_why(device: DeviceServer, source: SimulatedSource) -> None:
    device.set_status("aborted", "QBER 26 %")
    await until(lambda: source._info)
    status = await source.status("x")
    assert status.reason == "the link is aborted: QBER 26 %"
    with pytest.raises(Exhausted, match="QBER 26 %"):
        await source.get_key("x")


async def test_alarm_stops_keys_until_cleared(device: DeviceServer, source: SimulatedSource) -> None:
    device.publish(0, os.urandom(8 * 32))
    await drawn(source)
    device.alarm(True, "qber", "QBER 26 %")
    await until(lambda: source._alarms)
    status = await source.status("x")
    assert (status.ready, status.alarm, status.reason) == (False, "qber: QBER 26 %", "alarm: qber: QBER 26 %")
    with pytest.raises(Unavailable, match="QBER 26 %"):
        await source.get_key("x")
    with pytest.raises(Unavailable, match="QBER 26 %"):
        await source.get_key_with_id("x", derive_key_id("l", 0, 1))
    device.alarm(False, "qber", "")
    await until(lambda: not source._alarms)
    assert (await source.get_key("x")).key_id == derive_key_id("l", 0, 2)


async def test_alarm_raised_while_away_and_cleared_while_away(device: DeviceServer, tmp_path: Path) -> None:
    device.alarm(True, "monitor", "bright light")
    source = SimulatedSource({"socket": "d.sock"}, context(tmp_path))
    await source.start()
    await until(lambda: source._alarms == {"monitor": "bright light"})
    await device.aclose()
    await until(lambda: source._device is None)
    assert (await source.status("x")).alarm == "monitor: bright light"
    again = DeviceServer(device.path, info())
    await again.start()
    await until(lambda: not source._alarms)
    await source.aclose()
    await again.aclose()


async def test_keys_in_stock_outlive_the_device(device: DeviceServer, source: SimulatedSource) -> None:
    device.publish(0, os.urandom(8 * 32))
    await drawn(source)
    await device.aclose()
    await until(lambda: source._device is None)
    status = await source.status("x")
    assert (status.ready, status.stored_keys) == (True, 3)
    for _ in range(3):
        await source.get_key("x")
    with pytest.raises(Exhausted, match=r"d\.sock"):
        await source.get_key("x")
    assert (await source.get_key_with_id("x", derive_key_id("l", 0, 7))).material


async def test_void_reaches_the_stock(device: DeviceServer, source: SimulatedSource) -> None:
    device.publish(0, os.urandom(8 * 32))
    await drawn(source)
    device.void(1)
    await until(lambda: source._stock and not source._stock.fetchable)
    with pytest.raises(UnknownKeyID):
        await source.get_key_with_id("x", derive_key_id("l", 0, 1))


async def test_another_link_or_origin_is_not_taken(device: DeviceServer, tmp_path: Path) -> None:
    for changed, words in (
        ({"end": End.B}, "has end"),
        ({"origin": Origin.QKD}, "has origin"),
        ({"owner": Owner.A}, "has owner"),
    ):
        path = tmp_path / "other.sock"
        other = DeviceServer(path, info(**changed))
        await other.start()
        source = SimulatedSource({"socket": str(path), "role": "left", "owner": "alternate"}, context(tmp_path))
        await source.start()
        await until(lambda source=source, words=words: words in source._trouble)
        assert words in (await source.status("x")).reason
        await source.aclose()
        await other.aclose()


async def test_full_stock_takes_no_more_until_a_key_is_used(device: DeviceServer) -> None:
    source = DeviceSource(device.path, capacity=4)
    await source.start()
    for block in range(4):
        device.publish(block, os.urandom(4 * 32))
    await until(lambda: source._stock and source._stock.full)
    await until(lambda: len(source._pending) == 2)
    assert device.status().blocks_held == 2  # not acknowledged: the device waits with us
    await source.get_key("x")
    await until(lambda: device.status().blocks_held == 1)
    await source.aclose()


async def test_peer_that_lost_its_stock_costs_no_key(device: DeviceServer, tmp_path: Path) -> None:
    other_device = DeviceServer(tmp_path / "b.sock", info(end=End.B))
    await other_device.start()
    for block in range(3):
        keys = os.urandom(4 * 32)
        device.publish(block, keys)
        other_device.publish(block, keys)
    a, b = DeviceSource(device.path), DeviceSource(other_device.path)
    await a.start()
    await b.start()
    assert a.claim() == b""
    await until(lambda: all(s._stock and s._stock.next_block == 3 for s in (a, b)))
    await b.aclose()
    restarted = DeviceSource(other_device.path)
    await restarted.start()
    keys = os.urandom(4 * 32)
    device.publish(5, keys)
    other_device.publish(5, keys)
    await until(lambda: restarted.claim() and a._stock and a._stock.next_block == 6)
    a.check_claim(restarted.claim())
    restarted.check_claim(a.claim())
    assert isinstance(a, Claiming)
    drawn_by_a = await a.get_key("x")
    assert drawn_by_a.key_id == derive_key_id("l", 5, 0)
    assert await restarted.get_key_with_id("x", drawn_by_a.key_id) == drawn_by_a
    for source in (a, restarted):
        await source.aclose()
    await other_device.aclose()


async def test_claim_never_voids_what_is_still_to_come(device: DeviceServer) -> None:
    a = DeviceSource(device.path)
    await a.start()
    with pytest.raises(Unavailable):
        a.check_claim(bytes(26))
    device.publish(0, os.urandom(4 * 32))
    await drawn(a)
    lie = a.claim()[:17] + b"b" + b"\xff" * 8
    a.check_claim(lie)
    device.publish(1, os.urandom(4 * 32))
    assert (await drawn(a)).key_id == derive_key_id("l", 1, 0)
    with pytest.raises(BadAnswer, match='both sites have end "a"'):
        a.check_claim(a.claim())
    with pytest.raises(BadAnswer, match="another link"):
        a.check_claim(b"\x01" + bytes(16) + b"b" + bytes(8))
    await a.aclose()


async def test_close_wipes_what_was_pending_too(device: DeviceServer) -> None:
    source = DeviceSource(device.path, capacity=2)
    await source.start()
    for block in range(3):
        device.publish(block, os.urandom(4 * 32))
    await until(lambda: len(source._pending) == 2)
    pending = [event.keys for event in source._pending]
    await source.aclose()
    assert not any(any(keys) for keys in pending)
    with pytest.raises(Unavailable, match="closed"):
        await source.get_key("x")


# The child

TEST_LINK = """
import asyncio, os, sys, tomllib
from keysource.base import End, Origin, Owner
from keysource.device.messages import DeviceInfo
from keysource.device.server import DeviceServer

async def main():
    assert sys.argv[1] == "run"
    with open(sys.argv[2], "rb") as file:
        table = tomllib.load(file)
    if os.path.exists(os.path.join(os.path.dirname(sys.argv[2]), "fail")):
        raise SystemExit("no light in the fibre")
    server = DeviceServer(table["socket"], DeviceInfo("test", "l", End.A, Owner.ALTERNATE, Origin.SIMULATED))
    await server.start()
    server.publish(os.getpid(), os.urandom(320))
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def test_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[SimulatedSource]:
    (tmp_path / "test_link_program.py").write_text(TEST_LINK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    (tmp_path / "link.key").write_text("secret")
    (tmp_path / "link.key").chmod(0o600)
    return type("TestLinkSource", (SimulatedSource,), {"module": "test_link_program"})


async def test_child_is_started_and_started_again_and_stopped(
    test_link: type[SimulatedSource], tmp_path: Path
) -> None:
    source = test_link(LINK | {"preset": 'de"mo\\', "owner": "alternate"}, context(tmp_path))
    await source.start()
    await drawn(source)
    table = tomllib.loads((tmp_path / "qkd.link.toml").read_text())
    assert table["preset"] == 'de"mo\\'
    assert (tmp_path / "qkd.link.toml").stat().st_mode & 0o777 == 0o600
    first = source.child_pid
    assert first is not None
    assert (await source.status("x")).restarts == 0
    os.kill(first, signal.SIGKILL)
    await until(lambda: source.child_pid not in (None, first))
    assert (await source.status("x")).restarts == 1
    second = source.child_pid
    for _ in range(4):
        await drawn(source)  # the rest of the first block
    if second is not None and second > first:  # the test link numbers its only block by its process id
        await drawn(source)
    await source.aclose()
    await source.aclose()
    for pid in (first, second):
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_last_words_of_the_child_are_the_reason(test_link: type[SimulatedSource], tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    source = test_link(LINK, context(tmp_path))
    await source.start()
    await until(lambda: source._child and source._child.last_words)
    status = await source.status("x")
    assert not status.ready
    assert status.reason == "the process of the link ended with exit code 1: no light in the fibre"
    await source.aclose()


async def test_back_off_doubles_up_to_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends_at_once.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    child = Child("ends_at_once", [], first_wait=1.0, longest_wait=3.0, sleep=sleep)
    child.start()
    await until(lambda: len(waits) >= 4)
    await child.aclose()
    assert waits[:4] == [1.0, 2.0, 3.0, 3.0]
    assert child.restarts == len(waits)  # each wait is followed by one start; the first start is none
    assert child.last_words == "ended with exit code 3"


PARENT = """
import asyncio, sys
from keysource.simulated.child import Child

async def main():
    child = Child("sleeps_for_ever", [])
    child.start()
    while child.pid is None:
        await asyncio.sleep(0.01)
    print(child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_child_dies_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "sleeps_for_ever.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('up').touch()\ntime.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))
        await until((tmp_path / "up").exists)
        parent.kill()
    await until(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    """Running, and not a zombie that nobody in this container reaps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
