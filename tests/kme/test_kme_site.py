"""Issuing by itself: a real store, and another KME that answers what the test wants."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.kme import issuing
from keysource.kme import site as site_module
from keysource.kme.config import EXAMPLE, load
from keysource.kme.ground import NotNow
from keysource.kme.peering import PeerUnavailable
from keysource.kme.records import LinkRow, Reservation, Terms
from keysource.kme.site import Site

PEER = "kme-bob"


class FakePeer:
    """Reserves everything, unless told otherwise."""

    def __init__(self):
        self.offers = []
        self.answer = lambda offers: Reservation([], 0, 100)
        self.gate = None

    async def reserve(self, link, terms, offers):
        [slave] = terms.slaves
        self.offers.append((terms.master, slave, list(offers)))
        if self.gate:
            await self.gate.wait()
        answer = self.answer(offers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def aclose(self): ...


@pytest_asyncio.fixture
async def ground(tmp_path):
    file = tmp_path / "kme.toml"
    file.write_text(EXAMPLE)
    peer = FakePeer()
    site = Site(load(file), {PEER: peer})
    await site.open()
    row = await site.bind(LinkRow(PEER, "link", End.A, Owner.A, Origin.QKD, 0))
    await site.db(lambda store: store.add_block(row, 0, bytearray(range(256))))
    yield site, peer
    await site.aclose()


def issue(site, number=1, master="sae-alice", slave="sae-bob"):
    return site.issue(PEER, Terms(master, (slave,)), number)


async def test_what_is_issued_was_reserved_before(ground):
    site, peer = ground
    keys = await issue(site, 3)
    [(master, slave, offers)] = peer.offers
    assert (master, slave) == ("sae-alice", "sae-bob")
    assert [key.key_id for key in keys] == [offer.key_id for offer in offers]
    assert [bytes(key.material) for key in keys] == [bytes(range(32 * i, 32 * i + 32)) for i in range(3)]


async def test_without_an_answer_nothing_is_issued_and_the_same_offer_is_made_again(ground):
    site, peer = ground
    peer.answer = lambda offers: PeerUnavailable("no")
    for _ in range(3):
        with pytest.raises(NotNow):
            await issue(site, 2)
    peer.answer = lambda offers: Reservation([], 0, 1)
    keys = await issue(site, 2)
    first = peer.offers[0][2]
    assert all(offers == first for _, _, offers in peer.offers)  # key_IDs and tokens
    assert [key.key_id for key in keys] == [offer.key_id for offer in first]
    assert (await site.counts(PEER)).own_free == 6


async def test_an_offer_without_answer_is_not_made_to_another_pair(ground):
    site, peer = ground
    peer.answer = lambda offers: PeerUnavailable("no")
    with pytest.raises(NotNow):
        await issue(site, 2)
    peer.answer = lambda offers: Reservation([], 0, 1)
    keys = await issue(site, 6, slave="sae-other")
    offered = {offer.key_id for offer in peer.offers[0][2]}
    assert not offered & {key.key_id for key in keys}
    with pytest.raises(NotNow) as caught:
        await issue(site, 1, slave="sae-other")
    assert caught.value.reason == "exhausted"
    assert {key.key_id for key in await issue(site, 2)} == offered


async def test_two_at_once_never_offer_the_same_key(ground):
    site, peer = ground
    peer.gate = asyncio.Event()
    tasks = [asyncio.create_task(issue(site, 2)) for _ in range(4)]
    while len(peer.offers) < 4:
        await asyncio.sleep(0)
    peer.gate.set()
    keys = [key for some in await asyncio.gather(*tasks) for key in some]
    assert len({key.key_id for key in keys}) == 8
    offered = [offer.key_id for _, _, offers in peer.offers for offer in offers]
    assert len(offered) == len(set(offered)) == 8


async def test_missing_keys_are_dropped_and_the_next_tried(ground):
    site, peer = ground
    gone = {derive_key_id("link", 0, i) for i in (0, 2)}
    peer.answer = lambda offers: Reservation([o.key_id for o in offers if o.key_id in gone], 0, 1)
    keys = await issue(site, 3)
    assert [key.key_id for key in keys] == [derive_key_id("link", 0, i) for i in (1, 3, 4)]
    assert (await site.counts(PEER)).own_free == 3
    assert [len(offers) for _, _, offers in peer.offers] == [3, 2]


async def test_whole_blocks_that_the_other_end_lacks_go_at_once(ground):
    site, peer = ground
    row = site.links[PEER].row
    await site.db(lambda store: store.add_block(row, 5, bytearray(64)))
    peer.answer = lambda offers: Reservation([o.key_id for o in offers if o.block < 5], 5, 6)
    await issue(site, 1)
    assert (await site.counts(PEER)).own_free == 1
    assert len(peer.offers) == 2


async def test_keys_that_may_still_come_are_kept(ground):
    site, peer = ground
    peer.answer = lambda offers: Reservation([o.key_id for o in offers], 0, 0)
    for _ in range(3):
        with pytest.raises(NotNow, match="not received") as caught:
            await issue(site, 2)
        assert caught.value.reason == "exhausted"
    assert (await site.counts(PEER)).own_free == 8


async def test_a_key_voided_between_offer_and_answer_is_not_issued(ground):
    site, peer = ground
    peer.gate = asyncio.Event()
    task = asyncio.create_task(issue(site, 2))
    while not peer.offers:
        await asyncio.sleep(0)
    await site.db(lambda store: store.void(PEER, 1))
    peer.gate.set()
    with pytest.raises(NotNow, match="voided"):
        await task
    assert (await site.counts(PEER)).issued == 0


async def test_too_few_keys_offer_nothing(ground):
    site, peer = ground
    with pytest.raises(NotNow) as caught:
        await issue(site, 9)
    assert caught.value.reason == "exhausted"
    assert not peer.offers
    assert len(await issue(site, 8)) == 8


async def test_an_alarm_stops_issuing_and_reserving(ground):
    site, peer = ground
    await site.set_alarms(PEER, {"qber": "0.14"})
    with pytest.raises(NotNow, match=r"0\.14"):
        await issue(site)
    with pytest.raises(NotNow, match=r"0\.14"):
        await site.reserve(PEER, Terms("sae-bob", ("sae-alice",)), [])
    assert not peer.offers
    assert (await site.db(lambda store: store.link(PEER))).alarm == "qber: 0.14"
    await site.set_alarms(PEER, {})
    assert await issue(site)


async def test_cancelled_while_offered_the_key_is_offered_again(ground):
    site, peer = ground
    peer.gate = asyncio.Event()
    task = asyncio.create_task(issue(site, 8))
    while not peer.offers:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    peer.gate = None
    assert len(await issue(site, 8)) == 8
    assert peer.offers[0] == peer.offers[1]


async def test_a_deadline_never_falls_between_deleting_and_handing_out(ground, monkeypatch):
    """The store goes on when its caller gives up: a key deleted for nobody would be lost, under a 503."""
    site, _peer = ground
    monkeypatch.setattr(issuing, "ISSUE_TIMEOUT", 0.1)
    real = site._store.issue
    monkeypatch.setattr(site._store, "issue", lambda *args: (time.sleep(0.3), real(*args))[1])
    assert len(await issue(site, 2)) == 2


async def test_only_so_many_exchanges_are_under_way_and_no_more_is_touched(ground, monkeypatch):
    """A crowd waits outside, for a while; what is turned away has offered nothing."""
    site, peer = ground
    site._turns = asyncio.Semaphore(2)
    peer.gate = asyncio.Event()
    tasks = [asyncio.create_task(issue(site)) for _ in range(4)]
    while len(peer.offers) < 2:
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(peer.offers) == 2
    monkeypatch.setattr(issuing, "QUEUE_TIMEOUT", 0.01)
    with pytest.raises(NotNow, match="too many ask for keys at once") as refused:
        await issue(site)
    assert refused.value.reason == ""  # not for lack of keys
    assert len(peer.offers) == 2
    peer.gate.set()
    keys = [key.key_id for some in await asyncio.gather(*tasks) for key in some]
    assert len(set(keys)) == 4
    assert len(await issue(site, 4)) == 4  # every turn was given back


async def test_a_caller_that_goes_away_gives_its_turn_back(ground):
    site, peer = ground
    site._turns = asyncio.Semaphore(1)
    peer.gate = asyncio.Event()
    tasks = [asyncio.create_task(issue(site)) for _ in range(3)]
    while not peer.offers:
        await asyncio.sleep(0)
    for task in (tasks[1], tasks[0]):  # one that waits, and the one inside
        task.cancel()
    peer.gate.set()
    left = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in left] == [True, True, False]
    assert len(await issue(site, 2)) == 2


async def test_a_large_stock_is_not_counted_anew_for_every_status(ground, monkeypatch):
    site, _peer = ground
    counted = []
    whole = site.counts

    async def count(peer):
        counted.append(peer)
        return await whole(peer)

    monkeypatch.setattr(site, "counts", count)
    for left in (7, 6, 5):  # a small one is
        await issue(site)
        assert (await site.counts_for_saes(PEER)).own_free == left
    assert len(counted) == 3
    monkeypatch.setattr(site_module, "MANY", 2)
    before = (await site.counts_for_saes(PEER)).own_free
    assert (await site.counts_for_saes(PEER)).own_free == before
    await issue(site)
    assert (await site.counts_for_saes(PEER)).own_free == before
    assert len(counted) == 3
    monkeypatch.setattr(site_module, "COUNT_AGAIN", 0.0)
    assert (await site.counts_for_saes(PEER)).own_free == before - 1
