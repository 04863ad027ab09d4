"""Two real KMEs as a pair: every key once, equal at both ends, on the other end's disk before it is issued."""

from __future__ import annotations

import asyncio
import random

import pytest

from keysource.base import Owner
from keysource.errors import (
    BadAnswer,
    Exhausted,
    KeySourceError,
    NotOwner,
    Unauthorized,
    UnknownKeyID,
)


async def fetch_all(source, peer, keys, at_once=8):
    """What the other end has for each of these key_IDs."""
    gate = asyncio.Semaphore(at_once)

    async def fetch(key):
        async with gate:
            return await source.get_key_with_id(peer, key.key_id)

    return await asyncio.gather(*(fetch(key) for key in keys))


@pytest.mark.timeout(600)  # the full count on a busy machine
async def test_draws_from_both_sides_at_once_share_no_key(make_lab, counts):
    """10,000 draws in all (a tenth in the quick run): no key_ID twice, bytes equal, a second fetch fails."""
    total = counts(10_000)
    lab = make_lab(limits="[limits]\nrequests_per_second = 0.0\n")  # more than 100: a quick machine
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
    async with asyncio.TaskGroup() as group:  # where one fails, the others end too
        tasks = [group.create_task(draw(site, other, share)) for site, other in halves]
    done = [task.result() for task in tasks]
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


@pytest.mark.timeout(600)  # the full count on a busy machine
async def test_killed_at_random_during_draws_no_key_goes_out_twice(make_lab, counts):
    """Both sides draw and fetch without pause while one or the other KME is killed (50 times in the long run)."""
    kills = counts(50)
    lab = make_lab(limits="[limits]\nrequests_per_second = 0.0\n")
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
