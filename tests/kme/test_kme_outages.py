"""What one end of two real KMEs does while the other KME, its device or the link is not well; then it heals."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import time

import pytest

from keysource import tls
from keysource.base import Origin
from keysource.errors import Exhausted, Unavailable
from keysource.kme import crashpoints
from keysource.kme.control import ControlError

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def lab(shared_lab):
    """One pair for all; every test begins with ``settle``, which makes well what the one before left."""
    return shared_lab


async def fetch_all(source, peer, keys):
    """What the other end has for each of these key_IDs."""
    return [await source.get_key_with_id(peer, key.key_id) for key in keys]


# The other KME is not there


async def impostor_at(port, ca, credential):
    """A TLS server that says yes to everything, at the address of a KME."""

    async def yes(reader, writer):
        body = b'{"missing": [], "first_block": 0, "next_block": 99}'
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    context = tls.server_context(ca, credential.certificate, credential.private_key)
    return await asyncio.start_server(yes, "127.0.0.1", port, ssl=context)


async def test_without_the_other_kme_nothing_is_issued_and_nothing_is_lost(lab):
    await lab.settle(keys=16)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    lab.stop_kme("bob")
    for _ in range(3):
        with pytest.raises(Unavailable) as caught:
            await alice.get_key("sae-bob")
        assert caught.value.answered
        assert "kme-bob" in str(caught.value)
    impostor = lab.authority.sae("sae-bob")  # knows the address, and has a certificate, though not that of the KME
    server = await impostor_at(lab.plans["bob"].peer_port, lab.authority.certificate, impostor)
    with pytest.raises(Unavailable, match="kme-bob"):
        await alice.get_key("sae-bob")
    server.close()
    assert lab.link("alice")["issued"] == 0
    lab.start_kme("bob")
    await lab.ready("bob")
    keys = [await alice.get_key("sae-bob") for _ in range(8)]  # all eight that end a owns
    assert [copy.material for copy in await fetch_all(bob, "sae-alice", keys)] == [key.material for key in keys]


async def test_a_kme_that_does_not_answer_costs_no_key(lab):
    """SIGSTOP: the request is sent and never answered.  The same key is offered again afterwards."""
    await lab.settle(keys=16)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    lab.processes["bob"].send_signal(signal.SIGSTOP)
    for _ in range(2):
        with pytest.raises(Unavailable, match="no answer within") as caught:
            await alice.get_key("sae-bob")
        assert caught.value.answered
    lab.processes["bob"].send_signal(signal.SIGCONT)
    keys = [await alice.get_key("sae-bob") for _ in range(8)]
    assert len(await fetch_all(bob, "sae-alice", keys)) == 8


# The two stocks differ


async def test_keys_that_only_one_end_has_are_left_out(lab):
    """Block 0 reached alice only, and is overtaken by block 1: its keys are dropped, not issued."""
    await lab.settle(keys=0)
    lab.publish(32, only=("alice",))
    lab.publish(32)
    await lab.stored(64, "alice")
    await lab.stored(32, "bob")
    alice, bob = await lab.source("alice"), await lab.source("bob")
    keys = [await alice.get_key("sae-bob") for _ in range(16)]
    assert [copy.material for copy in await fetch_all(bob, "sae-alice", keys)] == [key.material for key in keys]
    with pytest.raises(Exhausted):
        await alice.get_key("sae-bob")
    assert lab.link("alice")["own_free"] == 0


async def test_keys_that_the_other_end_will_still_get_are_kept(lab):
    await lab.settle(keys=0)
    await lab.stop_device("bob")
    lab.publish(8, only=("alice",))
    await lab.stored(8, "alice")
    alice = await lab.source("alice")
    for _ in range(3):
        with pytest.raises(Exhausted, match="not received"):
            await alice.get_key("sae-bob")
    assert lab.link("alice")["own_free"] == 4


async def test_void_blocks_are_deleted_and_reserved_keys_stay(lab):
    await lab.settle(keys=8)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    key = await alice.get_key("sae-bob")
    second = lab.publish(8)
    await lab.stored(15, "alice")
    await lab.stored(16, "bob")
    for device in lab.devices.values():
        device.void(second)
    await lab.stored(8, "alice")
    await lab.stored(9, "bob")
    assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material


# The device


async def test_an_alarm_stops_issuing_until_it_is_over(lab):
    await lab.settle(keys=16)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    before = await alice.get_key("sae-bob")
    for device in lab.devices.values():
        device.alarm(True, "qber", "QBER 0.14")
    await lab.until(lambda: all(lab.link(site)["alarm"] for site in ("alice", "bob")), "the alarm")
    with pytest.raises(Unavailable, match=r"QBER 0\.14"):
        await alice.get_key("sae-bob")
    status = await alice.status("sae-bob")
    assert not status.ready
    assert status.alarm == "qber: QBER 0.14"
    assert (await bob.get_key_with_id("sae-alice", before.key_id)).material == before.material

    lab.stop_kme("alice")  # an alarm outlives the KME, and the device's absence
    await lab.stop_device("alice")
    lab.start_kme("alice")
    await lab.until(lambda: "QBER 0.14" in (lab.link("alice")["alarm"] or ""), "the alarm after a restart")
    with pytest.raises(Unavailable, match=r"QBER 0\.14"):
        await alice.get_key("sae-bob")
    await lab.start_device("alice", next_block=lab.next_block)  # a device without an alarm
    lab.devices["bob"].alarm(False, "qber", "")
    await lab.until(lambda: not any(lab.link(site)["alarm"] for site in ("alice", "bob")), "the end of the alarm")
    key = await alice.get_key("sae-bob")
    assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material
    assert (await alice.status("sae-bob")).ready


async def test_an_alarm_at_the_other_end_alone_stops_issuing_too(lab):
    await lab.settle(keys=16)
    alice = await lab.source("alice")
    lab.devices["bob"].alarm(True, "monitor", "light in the fibre")
    await lab.until(lambda: lab.link("bob")["alarm"], "the alarm")
    with pytest.raises(Unavailable, match="light in the fibre"):
        await alice.get_key("sae-bob")
    assert lab.link("alice")["issued"] == 0


async def test_the_stock_serves_while_the_device_is_away_and_grows_when_it_is_back(lab):
    await lab.settle(keys=8)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    for site in ("alice", "bob"):
        await lab.stop_device(site)
    await lab.until(lambda: not lab.link("alice")["device_connected"], "the device's absence")
    key = await alice.get_key("sae-bob")
    assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material
    for site in ("alice", "bob"):
        await lab.start_device(site, next_block=lab.next_block)
    lab.publish(8)
    await lab.stored(15)


async def test_blocks_are_acknowledged_after_they_are_stored(lab):
    await lab.settle(keys=8)
    await lab.until(lambda: all(d.status().blocks_held == 0 for d in lab.devices.values()), "the acknowledgement")
    lab.kill_kme("alice")
    lab.publish(8)
    assert lab.devices["alice"].status().blocks_held == 1
    lab.start_kme("alice")
    await lab.stored(16)


async def test_a_block_that_was_stored_before_a_crash_is_acknowledged_when_the_kme_comes_back(lab, monkeypatch):
    """Else the device would keep it, and its room, until another block came."""
    await lab.settle(keys=8)
    lab.kill_kme("alice")
    monkeypatch.setenv(crashpoints.VARIABLE, "block.stored")
    lab.start_kme("alice")
    monkeypatch.delenv(crashpoints.VARIABLE)
    await lab.ready("alice")
    lab.publish(8)
    died = await asyncio.to_thread(lab.processes.pop("alice").wait, 20)
    assert died == -signal.SIGKILL
    assert lab.devices["alice"].status().blocks_held == 1
    lab.start_kme("alice")
    await lab.until(lambda: lab.devices["alice"].status().blocks_held == 0, "the acknowledgement")
    await lab.stored(16)


async def test_a_device_that_starts_anew_is_not_told_to_erase_what_it_numbers_as_before(lab):
    """Block 0 of the new one is no old block, though its number is one that the store has seen."""
    await lab.settle(keys=8)
    await lab.stop_device("alice")
    device = await lab.start_device("alice")
    device.publish(0, bytearray(32))
    await lab.until(lambda: any("starts anew" in line["event"] for line in lab.log("alice")), "the warning")
    await lab.ready("alice")
    assert device.status().blocks_held == 1


async def test_status_of_the_source_tells_what_the_device_measures(lab):
    await lab.settle(keys=8)
    source = await lab.source("alice")
    await lab.until(lambda: lab.link("alice")["qber"] is not None, "the device's status")
    status = await source.status("sae-bob")
    assert (status.ready, status.stored_keys, status.qber, status.key_rate) == (True, 4, 0.021, 12.5)
    assert status.origin is Origin.SIMULATED


async def test_a_device_of_another_link_is_refused(lab):
    await lab.settle(keys=8)
    lab.stop_kme("alice")
    await lab.stop_device("alice")
    bob = lab.devices["bob"].info
    from keysource.device.server import DeviceServer

    device = DeviceServer(lab.folder / "alice" / "link" / "device.sock", bob)  # cabled to the wrong end
    await device.start()
    try:
        lab.start_kme("alice")
        await lab.until(lambda: "end 'b'" in lab.link("alice")["trouble"], "the refusal")
    finally:
        await device.aclose()


# The store itself


async def test_a_store_that_fails_is_a_status_and_a_503_and_a_few_lines(lab):
    await lab.settle(keys=8)
    before = len(lab.log("alice"))
    file = lab.folder / "alice" / "kme-state" / "kme.sqlite"
    with contextlib.closing(sqlite3.connect(file, timeout=20, isolation_level=None)) as db:
        db.execute("ALTER TABLE key RENAME TO gone")
        try:
            assert lab._link("alice")["own_free"] is None
            for _ in range(30):
                answer = await lab.enc()
                assert (answer.status, answer.message) == (503, "the key store fails")
        finally:
            db.execute("ALTER TABLE gone RENAME TO key")
    failing = [line for line in lab.log("alice")[before:] if line["event"] == "the store fails"]
    assert 1 <= len(failing) < 30  # the rest is counted
    assert "Traceback" not in (lab.folder / "alice.log").read_text()
    assert (await lab.enc()).status == 200


# Beginning and end


async def test_one_process_per_store_and_an_orderly_stop(lab):
    await lab.settle(keys=4)
    first = lab.processes.pop("alice")
    lab.start_kme("alice")
    assert lab.processes["alice"].wait(20) == 1
    assert "another KME process uses this store" in (lab.folder / "alice.log").read_text()
    lab.processes["alice"] = first
    assert lab.status("alice")["pid"] == first.pid
    alice = await lab.source("alice")
    await alice.get_key("sae-bob")
    start = time.monotonic()
    assert lab.stop_kme("alice") == 0
    assert time.monotonic() - start < 5
    assert not lab.config("alice").control_path.exists()
    with pytest.raises(ControlError, match="no KME answers there"):
        lab.status("alice")
    assert "Traceback" not in (lab.folder / "alice.log").read_text()
