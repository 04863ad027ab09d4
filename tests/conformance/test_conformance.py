"""The conformance suite over our own sources and the example of a third party's; and that it can fail at all."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from keysource.base import End, Key, KeySource, Origin, Owner, SaePair, SourceContext, SourceStatus
from keysource.conformance import (
    CHECKS,
    DISTURBANCES,
    Check,
    NotConforming,
    Pair,
    concurrent_draws_share_no_key,
    run_all,
)
from keysource.conformance.__main__ import main
from keysource.device.messages import DeviceInfo
from keysource.device.server import DeviceServer
from keysource.errors import Unavailable, UnknownKeyID
from keysource.file.format import write_pair
from keysource.file.source import FileSource
from keysource.simulated.source import SimulatedSource

TOTAL_DRAWS = 10_000 if os.environ.get("QVPN_TEST_LONG") else 1_000


def context(folder: Path, site: str) -> SourceContext:
    (folder / site / "state").mkdir(parents=True, mode=0o700, exist_ok=True)
    return SourceContext("keys", folder / site, folder / site / "state", site)


@asynccontextmanager
async def running(*sources: KeySource) -> AsyncIterator[None]:
    for source in sources:
        await source.start()
    try:
        yield
    finally:
        for source in sources:
            await source.aclose()


@asynccontextmanager
async def renewing(ends: dict[str, Callable[[str], KeySource]]) -> AsyncIterator[Pair]:
    """A pair whose ends can be restarted."""
    sources = {end: make(end) for end, make in ends.items()}

    async def restart(old: KeySource) -> KeySource:
        end = next(end for end, source in sources.items() if source is old)
        await old.aclose()
        sources[end] = ends[end](end)
        await sources[end].start()
        return sources[end]

    for source in sources.values():
        await source.start()
    try:
        yield Pair(*sources.values(), restart=restart)
    finally:
        for source in sources.values():
            await source.aclose()


@asynccontextmanager
async def file_pair(folder: Path, owner: Owner = Owner.ALTERNATE) -> AsyncIterator[Pair]:
    left, right = context(folder, "left"), context(folder, "right")
    write_pair(left.base / "link.keys", right.base / "link.keys", TOTAL_DRAWS + 200, owner)

    def open_end(end: str) -> FileSource:
        return FileSource({"path": "link.keys", "end": end}, left if end == "a" else right)

    async with renewing({"a": open_end, "b": open_end}) as pair:
        yield pair


class TestLink:
    """Both devices of a link: the same block to both as soon as both have room; none while they are off."""

    __test__ = False

    def __init__(self, folder: Path, owner: Owner) -> None:
        self.folder, self.owner = folder, owner
        self.block = 0
        self.devices: list[DeviceServer] = []
        self._feeding: asyncio.Task[None] | None = None

    async def on(self) -> None:
        for end, site in ((End.A, "left"), (End.B, "right")):
            info = DeviceInfo("test device", "left-right", end, self.owner, Origin.SIMULATED)
            device = DeviceServer(self.folder / f"{site}.sock", info)
            device._next_block = self.block
            await device.start()
            device.void(self.block)  # what one end got and the other not is of no use to anybody
            self.devices.append(device)
        self._feeding = asyncio.create_task(self._feed())

    async def off(self) -> None:
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)
        devices, self.devices = self.devices, []
        for device in devices:
            await device.aclose()

    async def _feed(self) -> None:
        while True:
            keys = os.urandom(64 * 32)
            for device in self.devices:
                await device.wait_for_room(64)
            block, self.block = self.block, self.block + 1
            for device in self.devices:
                device.publish(block, keys)


@asynccontextmanager
async def simulated_pair(folder: Path, owner: Owner = Owner.ALTERNATE) -> AsyncIterator[Pair]:
    link = TestLink(folder, owner)
    await link.on()

    def open_end(end: str) -> SimulatedSource:
        site = "left" if end == "a" else "right"
        return SimulatedSource({"socket": f"../{site}.sock"}, context(folder, site))

    async def outage(down: bool) -> None:
        await (link.off() if down else link.on())

    async with renewing({"a": open_end, "b": open_end}) as pair:
        pair.outage = outage
        yield pair
    await link.off()


def example() -> Callable[..., KeySource]:
    path = Path(__file__).with_name("example_source.py")
    assert len(path.read_text().splitlines()) <= 50
    spec = importlib.util.spec_from_file_location("example_source", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SpoolSource  # type: ignore[no-any-return]


@asynccontextmanager
async def example_pair(folder: Path) -> AsyncIterator[Pair]:
    sites = [context(folder, "left"), context(folder, "right")]
    for issuing, fetching in (sites, sites[::-1]):
        for place in (issuing.base / "spool/issue", fetching.base / "spool/fetch"):
            place.mkdir(parents=True)
        for _ in range(200):
            name, key = str(uuid.uuid4()), os.urandom(32)
            (issuing.base / "spool/issue" / name).write_bytes(key)
            (fetching.base / "spool/fetch" / name).write_bytes(key)
    a, b = (example()({"path": "spool"}, site) for site in sites)
    async with running(a, b):
        yield Pair(a, b, "left", "right")


PAIRS: dict[str, Callable[[Path], AbstractAsyncContextManager[Pair]]] = {
    "file": file_pair,
    "file-one-owner": partial(file_pair, owner=Owner.B),
    "simulated": simulated_pair,
    "simulated-one-owner": partial(simulated_pair, owner=Owner.A),
    "example": example_pair,
}


NO_MEANS = {
    "example": DISTURBANCES,  # it cannot be restarted
    "file": DISTURBANCES[1:],  # nothing that it rests on can be away
    "file-one-owner": DISTURBANCES[1:],
}


@pytest.mark.parametrize("check", (*CHECKS, *DISTURBANCES), ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", PAIRS)
async def test_source_conforms(kind: str, check: Check, tmp_path: Path) -> None:
    if check in NO_MEANS.get(kind, ()):
        return
    await check(partial(PAIRS[kind], tmp_path))


@pytest.mark.timeout(600)  # the full count on a busy disk
@pytest.mark.parametrize("kind", [kind for kind in PAIRS if kind != "example"])
async def test_many_draws_from_both_sides_at_once(kind: str, tmp_path: Path) -> None:
    await concurrent_draws_share_no_key(partial(PAIRS[kind], tmp_path), TOTAL_DRAWS)


# Sources with one fault each: the suite must see it.


class Shared:
    """A perfect pair in memory, to be spoilt."""

    def __init__(self) -> None:
        self.keys: dict[tuple[str, str], bytes] = {}
        self.down = False


class Good:
    def __init__(self, shared: Shared, name: str, other: str) -> None:
        self.shared, self.name, self.other = shared, name, other
        self.open = True

    async def start(self) -> None: ...

    async def aclose(self) -> None:
        self.open = False

    def sae_pair(self, peer_sae: str) -> SaePair:
        return SaePair(self.name, self.other)

    async def status(self, peer_sae: str) -> SourceStatus:
        ready = self.open and not self.shared.down
        return SourceStatus(ready, "" if ready else "closed", Origin.EXTERNAL)

    async def get_key(self, peer_sae: str) -> Key:
        self.must_be_open()
        key = Key(str(uuid.uuid4()), bytearray(os.urandom(32)), Origin.EXTERNAL)
        self.shared.keys[self.other, key.key_id] = bytes(key.material)
        await asyncio.sleep(0)
        return key

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        self.must_be_open()
        await asyncio.sleep(0)
        material = self.shared.keys.pop((self.name, key_id), None)
        if material is None:
            raise UnknownKeyID("no such key")
        return Key(key_id, bytearray(material), Origin.EXTERNAL)

    def must_be_open(self) -> None:
        if not self.open or self.shared.down:
            raise Unavailable("closed")


class GivesAgain(Good):
    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        kept = self.shared.keys.get((self.name, key_id))
        key = await super().get_key_with_id(peer_sae, key_id)
        self.shared.keys[self.name, key_id] = kept or b""
        return key


class GivesTheMasterToo(Good):
    async def get_key(self, peer_sae: str) -> Key:
        key = await super().get_key(peer_sae)
        self.shared.keys[self.name, key.key_id] = bytes(key.material)
        return key


class OtherBytes(Good):
    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        key = await super().get_key_with_id(peer_sae, key_id)
        key.material[7] ^= 1
        return key


class OtherOrigin(Good):
    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        key = await super().get_key_with_id(peer_sae, key_id)
        key.origin = Origin.QKD
        return key


class ShortKeys(Good):
    async def get_key(self, peer_sae: str) -> Key:
        key = await super().get_key(peer_sae)
        del key.material[16:]
        return key


class MakesKeysUp(Good):
    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        try:
            return await super().get_key_with_id(peer_sae, key_id)
        except UnknownKeyID:
            return Key(key_id, bytearray(os.urandom(32)), Origin.EXTERNAL)


class KeyErrors(Good):
    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        if (self.name, key_id) not in self.shared.keys:
            raise KeyError(key_id)
        return await super().get_key_with_id(peer_sae, key_id)


class PutsBackOnCancel(Good):
    spare: Key | None = None

    async def get_key(self, peer_sae: str) -> Key:
        key, self.spare = self.spare or await super().get_key(peer_sae), None
        try:
            await asyncio.sleep(0)
            return Key(key.key_id, key.material, key.origin)
        finally:
            self.spare = key  # "so that it is not wasted"


class Talks(Good):
    async def get_key(self, peer_sae: str) -> Key:
        self.last = await super().get_key(peer_sae)
        return self.last

    def __repr__(self) -> str:
        return f"Talks({self.last.material.hex()})"


class SameSaeName(Good):
    def sae_pair(self, peer_sae: str) -> SaePair:
        return SaePair("me", "you")


class NeverCloses(Good):
    async def aclose(self) -> None: ...


class ReadyForNoReason(Good):
    async def status(self, peer_sae: str) -> SourceStatus:
        return SourceStatus(False, "", Origin.EXTERNAL)


class GivesAgainAfterARestart(Good):
    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        used = self.__dict__.setdefault("used", set())
        kept = self.shared.keys.get((self.name, key_id), b"")
        if key_id in used:
            raise UnknownKeyID("no such key")
        key = await super().get_key_with_id(peer_sae, key_id)
        used.add(key_id)
        self.shared.keys[self.name, key_id] = kept
        return key


class BreaksInAnOutage(Good):
    def must_be_open(self) -> None:
        if self.shared.down:
            raise ConnectionResetError(104, "Connection reset by peer")
        super().must_be_open()


class NeverComesBack(Good):
    def must_be_open(self) -> None:
        self.open = self.open and not self.shared.down
        super().must_be_open()


class ChokesOnStrangeNames(Good):
    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        peer_sae.encode()
        return await super().get_key_with_id(peer_sae, key_id)


@asynccontextmanager
async def memory_pair(kind: type[Good]) -> AsyncIterator[Pair]:
    shared = Shared()

    async def restart(old: KeySource) -> KeySource:
        assert isinstance(old, Good)
        return kind(shared, old.name, old.other)

    async def outage(down: bool) -> None:
        shared.down = down

    yield Pair(kind(shared, "a", "b"), kind(shared, "b", "a"), "a", "b", restart, outage)


async def test_suite_passes_a_perfect_source() -> None:
    assert len(await run_all(partial(memory_pair, Good))) == len(CHECKS) + len(DISTURBANCES)


FAULTS: list[type[Good]] = [
    GivesAgain,
    GivesTheMasterToo,
    OtherBytes,
    OtherOrigin,
    ShortKeys,
    MakesKeysUp,
    KeyErrors,
    PutsBackOnCancel,
    Talks,
    SameSaeName,
    NeverCloses,
    ReadyForNoReason,
    GivesAgainAfterARestart,
    BreaksInAnOutage,
    NeverComesBack,
    ChokesOnStrangeNames,
]


@pytest.mark.parametrize("kind", FAULTS)
async def test_suite_sees_a_fault(kind: type[Good], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keysource.conformance.disturbances.PATIENCE", 0.2)
    with pytest.raises((NotConforming, KeyError)):
        await run_all(partial(memory_pair, kind))


# The command that a third party runs

COMMAND = """
from contextlib import asynccontextmanager
from functools import partial
from tests.conformance.test_conformance import {kind}, memory_pair

pair = partial(memory_pair, {kind})
"""


@pytest.mark.parametrize(("kind", "code", "last"), [("Good", 0, "conforms"), ("ShortKeys", 1, "does not conform")])
def test_anybody_can_run_the_suite(
    kind: str, code: int, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(COMMAND.format(kind=kind))
    assert main([f"{file}:pair", "--draws", "100"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(last)
    assert len(lines) == len(CHECKS) + len(DISTURBANCES) + 1


def test_a_wrong_factory_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nothing", "no.such:pair", "/no/such.py:pair", "keysource.conformance:nobody"):
        assert main([name]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
