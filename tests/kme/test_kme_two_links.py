"""Two fibres between two KMEs: two ``[[link]]``s to one peer, each with a stock of its own.

Two sites whole but for HTTP: each answers the other's offers with its own store.  They call their links differently.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.kme import links, multicast
from keysource.kme.config import EXAMPLE, ConfigError, load
from keysource.kme.ground import EXHAUSTED, NotNow
from keysource.kme.peering import PeerUnavailable
from keysource.kme.records import LinkRow, Offer, Reservation, StoreError, Terms, Wanted
from keysource.kme.site import Site

SECOND = """
[[link]]
device = "link/second.sock"
peer_kme = "kme-bob"
name = "second"
"""
TERMS = Terms("sae-alice", ("sae-bob",))
ONE, TWO = "kme-bob", "kme-bob second"


def written(folder: Path, text: str) -> Path:
    folder.mkdir()
    file = folder / "kme.toml"
    file.write_text(text)
    return file


def swapped(text: str) -> str:
    return text.replace("alice", "\0").replace("bob", "alice").replace("\0", "bob")


class Wire:
    """Alice's client of bob's KME."""

    def __init__(self) -> None:
        self.bob: Site | None = None
        self.calls: list[tuple[str, int]] = []

    async def reserve(self, link, terms, offers) -> Reservation:
        assert self.bob is not None
        self.calls.append((link, len(offers)))
        meant = self.bob.link_meant("kme-alice", link)
        if meant is None:
            raise PeerUnavailable("answered 409")
        try:
            return await self.bob.reserve(meant.stock, terms, offers)
        except NotNow as error:
            raise PeerUnavailable(f"answered 503: {error}") from None

    async def aclose(self) -> None: ...


@pytest_asyncio.fixture
async def sites(tmp_path):
    """Alice's and bob's site; the links are "left" (alice: unnamed, bob: "second") and "right", 12 units each."""
    wire = Wire()
    alice = Site(load(written(tmp_path / "alice", EXAMPLE + SECOND)), {"kme-bob": wire})
    bob = Site(load(written(tmp_path / "bob", swapped(EXAMPLE + SECOND))), {"kme-alice": wire})
    wire.bob = bob
    source = random.Random(4)
    for site, end, stocks in ((alice, End.A, (ONE, TWO)), (bob, End.B, ("kme-alice second", "kme-alice"))):
        await site.open()
        for name, stock in zip(("left", "right"), stocks, strict=True):
            await site.bind(LinkRow(stock, name, end, Owner.ALTERNATE, Origin.QKD, 0))
    for _name, here, there in (("left", ONE, "kme-alice second"), ("right", TWO, "kme-alice")):
        keys = source.randbytes(32 * 12)
        await alice.db(lambda store, here=here, keys=keys: store.add_block(alice.links[here].row, 0, bytearray(keys)))
        await bob.db(lambda store, there=there, keys=keys: store.add_block(bob.links[there].row, 0, bytearray(keys)))
    yield alice, bob, wire
    await alice.aclose()
    await bob.aclose()


async def free(site: Site, stock: str) -> int:
    return (await site.counts(stock)).own_free


async def fetched(bob: Site, keys) -> list[bytes]:
    found = await bob.fetch("sae-alice", "sae-bob", [key.key_id for key in keys])
    return [bytes(key.material) for key in found]


async def test_keys_come_of_both_links_and_are_the_same_at_the_other_site(sites):
    alice, bob, wire = sites
    assert (await free(alice, ONE), await free(alice, TWO)) == (6, 6)
    first = await alice.issue("kme-bob", TERMS, 4)
    second = await alice.issue("kme-bob", TERMS, 4)
    assert [link for link, _count in wire.calls] == ["left", "right"], "the fuller one goes first"
    assert await fetched(bob, [*first, *second]) == [bytes(key.material) for key in (*first, *second)]
    assert {key.key_id for key in first} == {derive_key_id("left", 0, i) for i in (0, 2, 4, 6)}


async def test_more_than_one_link_has_is_taken_of_both(sites):
    alice, bob, wire = sites
    _link, counts = await alice.summary("kme-bob")
    assert counts.own_free == 12
    keys = await alice.issue("kme-bob", TERMS, 9)
    assert wire.calls == [("left", 6), ("right", 3)]
    assert await fetched(bob, keys) == [bytes(key.material) for key in keys]
    with pytest.raises(NotNow) as caught:
        await alice.issue("kme-bob", TERMS, 4)
    assert caught.value.reason == EXHAUSTED
    assert (await free(alice, ONE), await free(alice, TWO)) == (0, 3), "all or nothing"


async def test_an_alarm_on_one_stops_its_keys_only(sites):
    alice, _bob, wire = sites
    await alice.set_alarms(ONE, {"qber": "25 %"})
    keys = await alice.issue("kme-bob", TERMS, 6)
    assert wire.calls == [("right", 6)] and len(keys) == 6 and await free(alice, ONE) == 6
    link, counts = await alice.summary("kme-bob")
    assert (link.alarm, counts.own_free) == ("", 0), "an SAE that hears of an alarm stops its tunnel"
    with pytest.raises(NotNow) as caught:
        await alice.issue("kme-bob", TERMS, 1)
    assert caught.value.reason == EXHAUSTED
    await alice.set_alarms(TWO, {"qber": "25 %"})
    assert (await alice.summary("kme-bob"))[0].alarm
    with pytest.raises(NotNow, match="alarm"):
        await alice.issue("kme-bob", TERMS, 1)
    await alice.set_alarms(ONE, {})
    assert len(await alice.issue("kme-bob", TERMS, 1)) == 1


async def test_an_alarm_that_only_the_other_site_knows_of_stops_that_link_only(sites):
    alice, bob, wire = sites
    await bob.set_alarms("kme-alice second", {"qber": "25 %"})
    keys = await alice.issue("kme-bob", TERMS, 4)
    assert wire.calls == [("left", 4), ("right", 4)]
    assert await fetched(bob, keys) == [bytes(key.material) for key in keys]
    assert await free(alice, ONE) == 6, "what was offered in vain is not lost"
    await bob.set_alarms("kme-alice second", {})
    assert len(await alice.issue("kme-bob", TERMS, 8)) == 8


async def test_one_link_of_which_the_other_site_has_nothing_yet(sites):
    """A new fibre: the device at this end was quicker."""
    alice, bob, wire = sites
    await bob.db(lambda store: store.void("kme-alice second", 5))
    bob.links["kme-alice second"].row = None
    keys = await alice.issue("kme-bob", TERMS, 5)
    assert [link for link, _count in wire.calls] == ["left", "right"] and len(keys) == 5


async def test_a_multicast_takes_the_link_that_has_enough(sites):
    alice, _bob, wire = sites
    await alice.issue("kme-bob", TERMS, 5)  # of the left one
    keys = await multicast.issue(alice, {"kme-bob": TERMS}, 3, Wanted())
    assert len(keys) == 3 and wire.calls[-1] == ("right", 3)
    assert (await alice.counts(TWO)).issued == 3


async def test_what_was_offered_is_withdrawn_of_whichever_link(sites):
    _alice, bob, _wire = sites
    for stock, name in (("kme-alice", "right"), ("kme-alice second", "left")):
        offers = [links_offer(name)]
        answer = await bob.reserve(stock, TERMS, offers)
        assert answer.missing == []
        assert await bob.withdrawn("kme-alice", [offers[0].token]) == 1
        assert await bob.withdrawn("kme-alice", [offers[0].token]) == 0


def links_offer(name: str) -> Offer:
    return Offer(derive_key_id(name, 0, 0), 0, f"a token for a unit of {name}")


async def test_two_devices_of_one_link_are_refused(sites):
    """Each end would store, and give out, the same keys twice."""
    alice, _bob, _wire = sites
    row = alice.links[TWO].row
    with pytest.raises(StoreError, match="both of link 'left'"):
        await alice.bind(LinkRow(TWO, "left", End.A, Owner.ALTERNATE, Origin.QKD, 0))
    assert alice.links[TWO].row == row


def test_the_configuration(tmp_path):
    config = load(written(tmp_path / "good", EXAMPLE + SECOND))
    assert [link.stock for link in config.link] == [ONE, TWO]
    for number, (text, said) in enumerate(
        (
            (EXAMPLE + SECOND.replace('name = "second"\n', ""), "needs its own name"),
            (EXAMPLE + SECOND + SECOND, "needs its own name"),
            (EXAMPLE + SECOND.replace("kme-bob", "kme-carol"), "must be one"),
        )
    ):
        with pytest.raises(ConfigError, match=said):
            load(written(tmp_path / str(number), text))


def test_keys_are_shared_out():
    assert links.shared_out({"a": 3, "b": 5}, 4) == {"b": 4}
    assert links.shared_out({"a": 3, "b": 5}, 8) == {"b": 5, "a": 3}
    assert links.shared_out({"a": 3, "b": 5}, 9) == {}
    assert links.shared_out({"a": 0, "b": 2, "c": 0}, 2) == {"b": 2}
    assert links.shared_out({"b": 2, "a": 2}, 1) == {"a": 1}
