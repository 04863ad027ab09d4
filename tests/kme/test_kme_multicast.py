"""One key for several slaves, at one KME and at several: three real KMEs, raw HTTP."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.base import Origin
from tests.kme.network import Network

pytestmark = pytest.mark.asyncio(loop_scope="module")
NOT_FOUND = "one or more keys specified are not found on KME"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def network():
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        network = Network(Path(folder), origins={"alice-carol": Origin.COURIERED})
        try:
            await network.start(keys=200)
            yield network
        finally:
            await network.aclose()


def stocks(network):
    return {other: network.link("alice", other)["own_free"] for other in ("bob", "carol")}


def used(before, after):
    return {other: before[other] - after[other] for other in before}


async def test_slaves_at_one_kme_cost_one_key(network):
    before = stocks(network)  # (a refusal of a slow machine costs nothing here)
    keys = await network.draw_by_all_means(("sae-bob", "sae-bert"), number=3)
    assert len(keys) == 3
    for slave in ("sae-bert", "sae-bob"):
        assert await network.fetch(slave, list(keys)) == (200, keys)
        assert (await network.fetch(slave, list(keys)))[0] == 400
    assert used(before, stocks(network)) == {"bob": 3, "carol": 0}


@pytest.mark.parametrize(("size", "pad"), [(256, 1), (8 * 100, 4)])
async def test_slaves_at_two_kmes_get_the_same_key(network, size, pad):
    status = 503  # of a slow machine: what it burnt is not counted
    while status == 503:
        before = stocks(network)
        status, keys = await network.draw(("sae-carol", "sae-bob", "sae-bert"), number=2, size=size)
    assert (status, {len(key) for key in keys.values()}) == (200, {size // 8})
    for slave in ("sae-bob", "sae-bert", "sae-carol"):
        assert await network.fetch(slave, list(keys)) == (200, keys)
        assert (await network.fetch(slave, list(keys)))[0] == 400
    # the first slave's link makes the key, the other carries it: a pad as long as the key, and a unit for the MAC
    assert used(before, stocks(network)) == {"carol": 2 * pad, "bob": 2 * (pad + 1)}


async def test_everybody_is_told_the_weakest_origin_of_the_links_it_came_over(network):
    for slaves in (("sae-bob", "sae-carol"), ("sae-carol", "sae-bob")):
        body = {"additional_slave_SAE_IDs": [slaves[1]]}
        status, answer = await network.http("sae-alice", "alice", f"{slaves[0]}/enc_keys", body)
        assert status == 200
        [entry] = answer["keys"]
        for slave, site in (("sae-bob", "bob"), ("sae-carol", "carol")):
            path = f"sae-alice/dec_keys?key_ID={entry['key_ID']}"
            _, copy = await network.http(slave, site, path)
            assert copy["keys"] == [entry]
        assert entry["key_extension"] == {"qvpn_origin": "couriered", "qvpn_hops": 0}


@pytest.mark.parametrize(("wanted", "status"), [("qkd", 400), (["qkd", "couriered"], 200)])
async def test_a_mandatory_origin_is_met_on_every_link_or_refused(network, wanted, status):
    extension = [{"qvpn_origin": wanted, "qvpn_max_hops": 0}]
    before = stocks(network)
    got, _keys = await network.draw(("sae-bob", "sae-carol"), extension_mandatory=extension)
    assert got == status
    assert (stocks(network) == before) is (status == 400)
    assert (await network.draw(("sae-bob",), extension_mandatory=extension))[0] == 200


async def test_a_slave_that_was_not_named_gets_401_and_one_that_has_it_400(network):
    keys = await network.draw_by_all_means(("sae-bob", "sae-carol"))
    assert (await network.fetch("sae-bert", list(keys)))[0] == 401
    assert (await network.fetch("sae-bob", list(keys)))[0] == 200
    assert (await network.fetch("sae-bob", list(keys)))[0] == 400
    assert (await network.fetch("sae-carol", list(keys)))[0] == 200


async def test_all_or_nothing_when_one_kme_is_away(network):
    """bob has reserved, carol is not there: the master gets nothing, and bob forgets it."""
    await network.stop("carol")
    reserved = network.link("bob", "alice")["reserved"]
    before = network.link("alice", "bob")["own_free"]
    status, _ = await network.draw(("sae-bob", "sae-carol"))
    assert status == 503
    assert before - network.link("alice", "bob")["own_free"] == 1  # burnt, never offered again
    await network.until(lambda: network.link("bob", "alice")["reserved"] == reserved, "bob forgets")
    assert any(line["event"] == "withdrawn" for line in network.audit("bob"))
    assert await network.draw_by_all_means(("sae-bob",))
    network.serve("carol")
    await network.ready("carol")
    keys = await network.draw_by_all_means(("sae-bob", "sae-carol"))
    assert await network.fetch("sae-carol", list(keys)) == (200, keys)


async def test_units_that_the_other_end_lost_are_left_behind(network):
    """carol's end has lost a few: the draw goes round them, burns what it took, and succeeds."""
    await network.publish(20)
    network.devices["carol", "alice"].void(1)  # the first block is not there any more
    await network.until(lambda: network.link("carol", "alice")["peer_free"] <= 20, "the void")
    keys = await network.draw_by_all_means(("sae-bob", "sae-carol"))
    assert await network.fetch("sae-carol", list(keys)) == (200, keys)


async def test_the_books_of_both_ends_name_the_same_keys(network):
    keys = await network.draw_by_all_means(("sae-bob", "sae-carol"))
    await network.fetch("sae-carol", list(keys))
    [issued] = [line for line in network.audit("alice") if line["event"] == "issued"][-1:]
    reserved = [line for line in network.audit("carol") if line["event"] == "reserved"][-1]
    [fetched] = [line for line in network.audit("carol") if line["event"] == "fetched"][-1:]
    assert issued["keys"] == reserved["keys"] == fetched["keys"]
    assert (issued["master"], issued["slaves"]) == ("sae-alice", ["sae-bob", "sae-carol"])
    assert (fetched["slave"], fetched["origin"]) == ("sae-carol", "couriered")
    first = [line for line in network.audit("bob") if line["event"] == "reserved"][-1]
    for line in (issued, first, reserved, fetched):
        assert (line["origin"], line["hops"]) == ("couriered", 0), line["event"]
    for site in ("alice", "bob", "carol"):
        text = (network.folder / site / "state/audit.jsonl").read_text()
        assert not any(key_id in text for key_id in network.book.keys)
