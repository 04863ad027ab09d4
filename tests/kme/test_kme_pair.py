"""Two real KMEs as a pair: every key once, equal at both ends, on the other end's disk before it is issued."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import pytest

from keysource.base import Origin, Owner
from keysource.errors import (
    BadAnswer,
    Exhausted,
    KeySourceError,
    NotOwner,
    Unauthorized,
    Unavailable,
    UnknownKeyID,
)
from keysource.etsi014 import tls
from keysource.kme.control import ControlError


async def fetch_all(source, peer, keys, at_once=8):
    """What the other end has for each of these key_IDs."""
    gate = asyncio.Semaphore(at_once)

    async def fetch(key):
        async with gate:
            return await source.get_key_with_id(peer, key.key_id)

    return await asyncio.gather(*(fetch(key) for key in keys))


async def test_draws_from_both_sides_at_once_share_no_key(make_lab, counts):
    """10,000 draws in all (a tenth in the quick run): no key_ID twice, bytes equal, a second fetch fails."""
    total = counts(10_000)
    lab = make_lab()
    await lab.start(keys=0)
    for _ in range(-(-total // 500)):
        lab.publish(512)
    await lab.until(lambda: min(lab.held("alice"), lab.held("bob")) >= total, "all blocks", seconds=60)
    clients = {site: lab.client(f"sae-{site}", site, keep_alive=True) for site in ("alice", "bob")}

    async def draw(site, other, number):
        """One of several at once: draw ``number`` keys, and fetch each at the other end."""
        pairs = []
        for _ in range(number):
            [key] = await clients[site].enc_keys(f"sae-{other}")
            [copy] = await clients[other].dec_keys(f"sae-{site}", [key.key_id])
            pairs.append((key, copy))
        return pairs

    at_once = 3
    share = total // (2 * at_once)
    halves = [("alice", "bob"), ("bob", "alice")] * at_once
    done = await asyncio.gather(*(draw(site, other, share) for site, other in halves))
    pairs = [pair for some in done for pair in some]
    assert len(pairs) == 2 * at_once * share > 0.99 * total
    assert len({key.key_id for key, _copy in pairs}) == len(pairs)
    assert len({bytes(key.material) for key, _copy in pairs}) == len(pairs)
    assert all((key.key_id, key.material) == (copy.key_id, copy.material) for key, copy in pairs)
    for key, _copy in done[0][:20]:
        with pytest.raises(UnknownKeyID):
            await clients["bob"].dec_keys("sae-alice", [key.key_id])
    for site in ("alice", "bob"):
        assert (lab.link(site)["issued"], lab.link(site)["fetched"]) == (at_once * share, at_once * share)


async def test_where_one_end_owns_all_keys_the_other_says_so(make_lab):
    lab = make_lab(owner=Owner.B)
    await lab.start(keys=4)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    with pytest.raises(NotOwner):
        await alice.get_key("sae-bob")
    keys = [await bob.get_key("sae-alice") for _ in range(4)]
    assert [copy.material for copy in await fetch_all(alice, "sae-bob", keys)] == [key.material for key in keys]
    with pytest.raises(Exhausted):
        await bob.get_key("sae-alice")


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


async def test_without_the_other_kme_nothing_is_issued_and_nothing_is_lost(make_lab):
    lab = make_lab()
    await lab.start(keys=16)
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


async def test_a_kme_that_does_not_answer_costs_no_key(make_lab):
    """SIGSTOP: the request is sent and never answered.  The same key is offered again afterwards."""
    lab = make_lab()
    await lab.start(keys=16)
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


async def test_keys_that_only_one_end_has_are_left_out(make_lab):
    """Block 0 reached alice only, and is overtaken by block 1: its keys are dropped, not issued."""
    lab = make_lab()
    await lab.start(keys=0)
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


async def test_keys_that_the_other_end_will_still_get_are_kept(make_lab):
    lab = make_lab()
    await lab.start(keys=0)
    await lab.devices["bob"].aclose()
    lab.publish(8, only=("alice",))
    await lab.stored(8, "alice")
    alice, _bob = await lab.source("alice"), await lab.source("bob")
    for _ in range(3):
        with pytest.raises(Exhausted, match="not received"):
            await alice.get_key("sae-bob")
    assert lab.link("alice")["own_free"] == 4


async def test_void_blocks_are_deleted_and_reserved_keys_stay(make_lab):
    lab = make_lab()
    await lab.start(keys=8)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    key = await alice.get_key("sae-bob")
    lab.publish(8)
    await lab.stored(15, "alice")
    await lab.stored(16, "bob")
    for device in lab.devices.values():
        device.void(1)
    await lab.stored(8, "alice")
    await lab.stored(9, "bob")
    assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material


# The device


async def test_an_alarm_stops_issuing_until_it_is_over(make_lab):
    lab = make_lab()
    await lab.start(keys=16)
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
    await lab.devices["alice"].aclose()
    lab.start_kme("alice")
    await lab.until(lambda: "QBER 0.14" in (lab.link("alice")["alarm"] or ""), "the alarm after a restart")
    with pytest.raises(Unavailable, match=r"QBER 0\.14"):
        await alice.get_key("sae-bob")
    await lab.start_device("alice", next_block=1)  # a device without an alarm
    lab.devices["bob"].alarm(False, "qber", "")
    await lab.until(lambda: not any(lab.link(site)["alarm"] for site in ("alice", "bob")), "the end of the alarm")
    key = await alice.get_key("sae-bob")
    assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material
    assert (await alice.status("sae-bob")).ready


async def test_an_alarm_at_the_other_end_alone_stops_issuing_too(make_lab):
    lab = make_lab()
    await lab.start(keys=16)
    alice = await lab.source("alice")
    lab.devices["bob"].alarm(True, "monitor", "light in the fibre")
    await lab.until(lambda: lab.link("bob")["alarm"], "the alarm")
    with pytest.raises(Unavailable, match="light in the fibre"):
        await alice.get_key("sae-bob")
    assert lab.link("alice")["issued"] == 0


async def test_the_stock_serves_while_the_device_is_away_and_grows_when_it_is_back(make_lab):
    lab = make_lab()
    await lab.start(keys=8)
    alice, bob = await lab.source("alice"), await lab.source("bob")
    for device in lab.devices.values():
        await device.aclose()
    await lab.until(lambda: not lab.link("alice")["device_connected"], "the device's absence")
    key = await alice.get_key("sae-bob")
    assert (await bob.get_key_with_id("sae-alice", key.key_id)).material == key.material
    for site in ("alice", "bob"):
        await lab.start_device(site, next_block=1)
    lab.publish(8)
    await lab.stored(15)


async def test_blocks_are_acknowledged_after_they_are_stored(make_lab):
    lab = make_lab()
    await lab.start(keys=8)
    await lab.until(lambda: all(d.status().blocks_held == 0 for d in lab.devices.values()), "the acknowledgement")
    lab.kill_kme("alice")
    lab.publish(8)
    assert lab.devices["alice"].status().blocks_held == 1
    lab.start_kme("alice")
    await lab.stored(16)


async def test_status_of_the_source_tells_what_the_device_measures(make_lab):
    lab = make_lab()
    await lab.start(keys=8)
    source = await lab.source("alice")
    await lab.until(lambda: lab.link("alice")["qber"] is not None, "the device's status")
    status = await source.status("sae-bob")
    assert (status.ready, status.stored_keys, status.qber, status.key_rate) == (True, 4, 0.021, 12.5)
    assert status.origin is Origin.SIMULATED


async def test_a_device_of_another_link_is_refused(make_lab):
    lab = make_lab()
    await lab.start(keys=8)
    lab.stop_kme("alice")
    await lab.devices["alice"].aclose()
    bob = lab.devices["bob"].info
    from keysource.device.server import DeviceServer

    device = DeviceServer(lab.folder / "alice" / "link" / "device.sock", bob)  # cabled to the wrong end
    await device.start()
    try:
        lab.start_kme("alice")
        await lab.until(lambda: "end 'b'" in lab.link("alice")["trouble"], "the refusal")
    finally:
        await device.aclose()


# Bounds


async def test_a_full_store_drops_the_oldest_keys_and_the_pair_stays_in_step(make_lab):
    lab = make_lab(limits="[limits]\nmax_key_count = 20\nmax_key_per_request = 2\n")
    await lab.start(keys=0)
    for _ in range(5):
        lab.publish(8)
    await lab.until(lambda: lab.link("alice")["next_block"] == lab.link("bob")["next_block"] == 5, "five blocks")
    assert lab.held("alice") == lab.held("bob") == 16
    alice, bob = await lab.source("alice"), await lab.source("bob")
    keys = [await alice.get_key("sae-bob") for _ in range(8)]
    assert len(await fetch_all(bob, "sae-alice", keys)) == 8


# kill -9


async def test_killed_at_random_during_draws_no_key_goes_out_twice(make_lab, counts):
    """Both sides draw and fetch without pause while one or the other KME is killed (50 times in the long run)."""
    kills = counts(50)
    lab = make_lab()
    await lab.start(keys=0)
    for _ in range(4 + kills):
        lab.publish(512)
    await lab.until(lambda: min(lab.held("alice"), lab.held("bob")) >= 2048, "blocks")
    alice = await lab.source("alice")
    bob = await lab.source("bob")
    drawn, fetched, stop = [], [], asyncio.Event()

    async def work(master, slave_sae, slave, master_sae):
        while not stop.is_set():
            try:
                key = await master.get_key(slave_sae)
                drawn.append((key.key_id, bytes(key.material)))
                copy = await slave.get_key_with_id(master_sae, key.key_id)
                fetched.append((copy.key_id, bytes(copy.material)))
                assert copy.material == key.material
            except (BadAnswer, Unauthorized) as error:
                raise AssertionError(f"not an outage: {error}") from None
            except KeySourceError:
                await asyncio.sleep(0.02)

    workers = [asyncio.create_task(work(alice, "sae-bob", bob, "sae-alice")) for _ in range(2)]
    workers += [asyncio.create_task(work(bob, "sae-alice", alice, "sae-bob")) for _ in range(2)]
    rng = random.Random(7)
    progress = 0
    for kill in range(kills):
        victim = ("alice", "bob")[kill % 2]
        await lab.until(lambda seen=progress: len(fetched) >= seen + 10, "draws go on")
        await asyncio.sleep(rng.uniform(0, 0.05))
        lab.kill_kme(victim)
        lab.start_kme(victim)
        await lab.ready(victim)
        progress = len(fetched)
    await lab.until(lambda: len(fetched) >= progress + 10, "draws go on")
    stop.set()
    await asyncio.gather(*workers)
    for given in (drawn, fetched):
        assert len({key_id for key_id, _key in given}) == len(given)
        assert len({key for _key_id, key in given}) == len(given)
    # What a crash costs: at most the keys that four workers had under way at each kill.
    lost = sum(lab.link(site)["issued"] for site in ("alice", "bob")) - len(fetched)
    assert lost <= 4 * 2 * (kills + 1)


async def test_a_fault_ordered_at_the_start(make_lab):
    lab = make_lab()
    await lab.start_device("alice")
    lab.start_kme("alice", "--fault", "unauthorised")
    await lab.ready("alice")
    assert lab.status("alice")["fault"] == "unauthorised"
    with pytest.raises(Unauthorized):
        await (await lab.source("alice")).get_key("sae-bob")


async def test_one_process_per_store_and_an_orderly_stop(make_lab):
    lab = make_lab()
    await lab.start(keys=4)
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
