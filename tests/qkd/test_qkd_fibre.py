"""The fibre's connections: sealed, nobody unseats an end, orders that do not fit are refused; an end's alarms."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qkd_lab import until

from keysource.base import End
from keysource.device.client import DeviceClient
from keysource.errors import KeySourceError
from keysource.qkd.config import Address, Pace, load
from keysource.qkd.distill.party import Outcome
from keysource.qkd.distill.wire import Reason
from keysource.qkd.engine import seal
from keysource.qkd.engine.control import ask
from keysource.qkd.engine.doubt import WATCHED
from keysource.qkd.engine.end import LinkEnd
from keysource.qkd.engine.fibre import Fibre
from keysource.qkd.engine.hardware import Hardware
from keysource.qkd.errors import BadFrame, LinkError, PeerLost
from keysource.qkd.ledger import Ledger
from keysource.qkd.optics.flight import Flight, make_flight
from keysource.qkd.optics.settings import fresh_seed
from keysource.qkd.pair import PairPlan, write_pair
from keysource.qkd.presets import PRESETS
from keysource.qkd.records import detections_untrusted
from tests.ports import free_ports

PRESET = PRESETS["demo"]
PLAN = PRESET.plan()
DIGEST = PLAN.digest(PRESET.optics, PRESET.security)
KEY = bytes(range(32))


@contextlib.asynccontextmanager
async def fibre_and(
    tmp_path: Path, *keys: tuple[End, bytes], pace: Pace = "fast"
) -> AsyncIterator[tuple[Fibre, list[Hardware]]]:
    address = Address("127.0.0.1", free_ports(1)[0])
    fibre = Fibre(address, PRESET, pace, tmp_path / "eve.sock", KEY)
    await fibre.start()
    sites = [Hardware(end, address, key, DIGEST) for end, key in keys]
    for site in sites:
        site.start()
    try:
        await until(lambda: all(site.ready for site in sites))
        yield fibre, sites
    finally:
        for site in sites:
            await site.aclose()
        await fibre.aclose()


async def test_both_ends_prepare_and_only_bob_gets_detections(tmp_path: Path) -> None:
    async with fibre_and(tmp_path, (End.A, KEY), (End.B, KEY)) as (fibre, (alice, bob)):
        flights = [site.fly(3, PLAN.pulses, fresh_seed(), 30) for site in (alice, bob)]
        nothing, seen = await asyncio.gather(*flights)
        assert nothing is None and seen is not None
        assert abs(len(seen.positions) / PLAN.pulses / PRESET.optics.mean_gain() - 1) < 0.02
        assert fibre.blocks == 1


async def test_a_stranger_without_the_key_is_refused_and_unseats_nobody(tmp_path: Path) -> None:
    async with fibre_and(tmp_path, (End.A, KEY), (End.B, KEY)) as (_fibre, (alice, bob)):
        connection = await asyncio.open_connection(alice._address.host, alice._address.port)
        stranger = await seal.dial(*connection, bytes(32), End.B)
        work = [asyncio.create_task(site.fly(1, PLAN.pulses, fresh_seed(), 30)) for site in (alice, bob)]
        await stranger.send(seal.PREPARE, bytes(seal.PREPARE_FORM.size))
        with pytest.raises(BadFrame, match="not sealed"):
            await stranger.receive()
        await stranger.aclose()
        assert (await asyncio.gather(*work))[1] is not None
        late = Hardware(End.B, alice._address, bytes(32), DIGEST)
        late.start()
        await until(lambda: "not sealed" in late.trouble)
        with pytest.raises(PeerLost):
            await late.fly(2, PLAN.pulses, fresh_seed(), 1)
        await late.aclose()


async def test_another_plan_is_refused(tmp_path: Path) -> None:
    async with fibre_and(tmp_path, (End.A, KEY)) as (_fibre, (alice,)):
        with pytest.raises(LinkError, match="another preset"):
            await alice.fly(1, PLAN.pulses + 1, fresh_seed(), 30)


async def test_one_end_alone_or_another_block_flies_nothing(tmp_path: Path) -> None:
    async with fibre_and(tmp_path, (End.A, KEY), (End.B, KEY)) as (fibre, (alice, bob)):
        flights = [alice.fly(1, PLAN.pulses, fresh_seed(), 0.4), bob.fly(2, PLAN.pulses, fresh_seed(), 0.4)]
        results = await asyncio.gather(*flights, return_exceptions=True)
        assert all(isinstance(result, PeerLost) for result in results) and fibre.blocks == 0


async def test_settings_of_one_site_fly_once_though_the_other_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Eve sees every pulse of Alice's twice, and no decoy shows it."""
    flown: list[bytes] = []

    def spy(optics: Any, alice: bytes, bob: bytes, *, test: bool) -> Flight:
        flown.append(alice)
        return make_flight(optics, alice, bob, test=test)

    monkeypatch.setattr("keysource.qkd.engine.fibre.make_flight", spy)
    async with fibre_and(tmp_path, (End.A, KEY), (End.B, KEY), pace="realtime") as (_fibre, (alice, bob)):
        hers, his = (asyncio.create_task(s.fly(1, PLAN.pulses, fresh_seed(), 8)) for s in (alice, bob))
        await until(lambda: flown)
        assert bob._sealed is not None
        await bob._sealed.aclose()
        with pytest.raises(PeerLost):
            await his
        await until(lambda: bob.ready)
        with pytest.raises(PeerLost):
            await bob.fly(1, PLAN.pulses, fresh_seed(), 0.5)
        assert len(flown) == 1 and not hers.done()
        hers.cancel()


@pytest.mark.parametrize("where", [0, 20, -1])
async def test_what_is_sealed_cannot_be_changed(where: int) -> None:
    """A flipped bit of a frame on its way is noticed by the fibre."""
    outcome: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _end, sealed = await seal.accept(reader, writer, KEY)
            outcome.append(await sealed.receive())
            outcome.append(await sealed.receive())
        except LinkError as error:
            outcome.append(error)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sealed = await seal.dial(reader, writer, KEY, End.B)
    await sealed.send(seal.PREPARE, b"good")
    honest = writer.write

    def flip(data: bytes) -> None:
        text = bytearray(data)
        text[4:][where]  # inside the sealed part
        text[4 + where if where >= 0 else where] ^= 4
        honest(bytes(text))

    writer.write = flip  # type: ignore[method-assign]
    await sealed.send(seal.PREPARE, bytes(64))
    await until(lambda: len(outcome) == 2)
    assert outcome[0] == (seal.PREPARE, b"good") and isinstance(outcome[1], BadFrame)
    await sealed.aclose()
    server.close()


async def test_nothing_of_the_settings_is_in_clear_on_the_connection() -> None:
    seen = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await reader.readexactly(24))
        writer.write(bytes(16))
        while data := await reader.read(1000):
            seen.extend(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    sealed = await seal.dial(
        *await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1]), KEY, End.A
    )
    secret = os.urandom(32)
    await sealed.send(seal.PREPARE, secret)
    await sealed.aclose()
    await until(lambda: len(seen) >= 24 + 4 + 33 + 16)
    assert secret not in seen and KEY not in seen
    server.close()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, "all", True, [1]])
async def test_eve_takes_only_fractions(tmp_path: Path, fraction: object) -> None:
    async with fibre_and(tmp_path) as (_fibre, _):
        with pytest.raises(KeySourceError, match="fraction"):
            await ask(tmp_path / "eve.sock", {"fraction": fraction})
        assert (await ask(tmp_path / "eve.sock", {}))["fraction"] == 0.0
        assert (await ask(tmp_path / "eve.sock", {"fraction": 0.25}))["fraction"] == 0.25


@pytest.mark.parametrize("data", [b"", b"\0\0\0\5", b"\0\0\0\1" + b"\xff" * 4 + b"\x80", bytes(100)])
def test_detections_of_another_form_are_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        detections_untrusted(data, 1000)


# An end's counts and alarms


@contextlib.asynccontextmanager
async def lone_end(tmp_path: Path) -> AsyncIterator[tuple[LinkEnd, DeviceClient]]:
    write_pair(tmp_path, PairPlan(Address("127.0.0.1", 1), Address("127.0.0.1", 2), pad_bytes=4096))
    config = load(tmp_path / "bob" / "link.toml")
    link = LinkEnd(config)  # type: ignore[arg-type]
    await link.device.start()
    device = await DeviceClient.connect(config.socket)  # type: ignore[union-attr]
    try:
        yield link, device
    finally:
        await device.aclose()
        await link.device.aclose()


def outcome(block: int, reason: Reason | None = None, qber: float = 0.005) -> Outcome:
    keys = bytearray(64) if reason is None else bytearray()
    return Outcome(block, reason, Ledger(), keys, qber)


async def test_a_preset_whose_blocks_err_more_than_the_limit_says_so_and_not_that_it_is_used_up(
    tmp_path: Path,
) -> None:
    async with lone_end(tmp_path) as (link, _device):
        assert "error of one block" not in str(link.waiting_for())
        link.preset = PRESETS["small10"]
        assert "of one block of preset small10 is up to 0.01, more than error_limit" in str(link.waiting_for())


@pytest.mark.parametrize(("reason", "kind"), [
    (Reason.QBER, "qber"), (Reason.CHSH, "qber"), (Reason.MONITOR, "monitor"),
])  # fmt: skip
async def test_each_abort_raises_its_alarm_until_a_block_passes(tmp_path: Path, reason: Reason, kind: str) -> None:
    async with lone_end(tmp_path) as (link, device):
        link.session_up = True
        link.finish(outcome(1, reason, 0.25), 1.0)
        assert kind in (await device.status()).alarm
        link.finish(outcome(2), 2.0)
        status = await device.status()
        assert status.alarm is None and status.blocks_held == 1


@pytest.mark.parametrize(("reason", "kind", "chance"), [
    (Reason.STATISTICS, "qber", 2), (Reason.LEAK, "qber", 2), (Reason.SHORT, "device", 1), (Reason.VERIFY, "qber", 2),
])  # fmt: skip
async def test_what_chance_can_do_is_an_alarm_only_when_chance_cannot(
    tmp_path: Path, reason: Reason, kind: str, chance: int
) -> None:
    """Blocks of two seconds: so many in a row may be lost by chance within a year."""
    async with lone_end(tmp_path) as (link, device):
        for number in range(chance):
            link.finish(outcome(number, reason), 1.0)
            assert (await device.status()).alarm is None and link.pause > 0
        for number in range(10, 10 + WATCHED):
            link.finish(outcome(number), 2.0)
        for number in range(50, 50 + chance):
            link.finish(outcome(number, reason), 3.0)
        assert (await device.status()).alarm is None, "blocks have passed between them"
        link.finish(outcome(60, reason), 4.0)
        assert kind in (await device.status()).alarm
        link.finish(outcome(61), 5.0)
        assert (await device.status()).alarm is None


async def test_four_of_thirty_two_blocks_that_miss_their_thresholds_are_not_chance(tmp_path: Path) -> None:
    async with lone_end(tmp_path) as (link, device):
        for number in range(0, 6, 2):
            link.finish(outcome(number, Reason.STATISTICS), 1.0)
            link.finish(outcome(number + 1), 1.0)
            assert (await device.status()).alarm is None
        link.finish(outcome(6, Reason.STATISTICS), 5.0)
        assert "qber" in (await device.status()).alarm, "every other block is not chance either"


async def test_failures_in_a_row_slow_the_link_down_and_a_passed_block_frees_it(tmp_path: Path) -> None:
    async with lone_end(tmp_path) as (link, _device):
        pauses = []
        for number in range(6):
            link.finish(outcome(number, Reason.QBER), 1.0)
            pauses.append(link.pause)
        assert pauses == sorted(pauses) and pauses[0] > 0 and pauses[-1] == link.preset.abort_wait
        link.finish(outcome(9), 2.0)
        assert link.pause == 0.0


async def test_key_rate_is_what_was_delivered_over_the_last_half_minute(tmp_path: Path) -> None:
    async with lone_end(tmp_path) as (link, _device):
        assert link.key_rate(0.0) is None
        for number in range(10):
            link.finish(outcome(number), 2.0 * number)
        assert link.key_rate(18.0) == pytest.approx(1.0)
        assert link.key_rate(1000.0) == 0.0


async def test_an_acknowledged_block_is_remembered_on_disk_and_a_foreign_number_is_not(tmp_path: Path) -> None:
    async with lone_end(tmp_path) as (link, device):
        link.finish(outcome(4), 1.0)
        link.finish(outcome(6), 2.0)
        await device.ack(4)
        assert link.state.acked == 4 and link.held == {6}
        await device.discard(10**12)
        assert link.state.acked == 6 and not link.held
