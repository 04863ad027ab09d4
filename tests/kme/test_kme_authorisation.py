"""Which SAE gets which key: several SAEs at two real KMEs, some of whom are strangers to each other."""

from __future__ import annotations

import uuid

import pytest_asyncio

NOT_FOUND = "one or more keys specified are not found on KME"


def no_body(answer):
    """Tables 4, 6 and 8 of ETSI GS QKD 014: a 401 has no body."""
    assert (answer.status, answer.body) == (401, b"")


async def test_more_keys_than_there_are_is_503_and_takes_none(make_lab):
    lab = make_lab()
    await lab.start(keys=10)
    answer = await lab.enc({"number": 6})
    assert answer.status == 503
    assert answer.json["details"] == [{"qvpn_reason": "exhausted"}]
    assert int(answer.headers["Retry-After"]) >= 1
    assert len((await lab.enc({"number": 5})).keys()) == 5
    assert (await lab.enc()).status == 503


@pytest_asyncio.fixture
async def crowded(make_lab):
    """Two masters at alice, two slaves at bob; one of alice's may not share with the second."""
    lab = make_lab()
    alice, bob = lab.files["alice"], lab.files["bob"]
    odd = "sae 2/ü%?"
    alice.write_text(
        alice.read_text().replace('saes = ["sae-bob"]', f'saes = ["sae-bob", "{odd}"]')
        + f'[[sae]]\nid = "sae-master2"\nmay_share_with = ["{odd}"]\n'
    )
    bob.write_text(
        bob.read_text().replace('saes = ["sae-alice"]', 'saes = ["sae-alice", "sae-master2"]')
        + f'[[sae]]\nid = "{odd}"\nmay_share_with = ["sae-master2"]\n'
    )
    await lab.start(keys=20)
    return lab, odd, "sae%202%2F%C3%BC%25%3F"


async def test_sae_ids_are_url_decoded(crowded):
    lab, odd, encoded = crowded
    keys = (await lab.enc(sae="sae-master2", slave=encoded)).keys()
    assert (await lab.dec(list(keys), sae=odd, master="sae-master2")).keys() == keys
    status = await lab.http("sae-master2", "alice", "GET", f"/api/v1/keys/{encoded}/status")
    assert status.json["slave_SAE_ID"] == odd


async def test_a_bystander_gets_401_and_the_key_stays_for_its_slave(crowded):
    lab, odd, _encoded = crowded
    keys = (await lab.enc()).keys()
    no_body(await lab.dec(list(keys), sae=odd))
    no_body(await lab.dec([*keys, str(uuid.uuid4())], sae=odd))
    wrong_master = await lab.dec(list(keys), master="sae-master2")
    assert (wrong_master.status, wrong_master.message) == (400, NOT_FOUND)
    assert (await lab.dec(list(keys))).keys() == keys


async def test_who_may_share_with_whom_is_asked_at_both_ends(crowded):
    lab, odd, encoded = crowded
    no_body(await lab.enc(slave=encoded))  # alice's KME knows that sae-alice may not
    no_body(await lab.enc(sae="sae-master2"))
    alice = lab.files["alice"]  # now alice's KME believes that it may; bob's does not
    alice.write_text(alice.read_text().replace('with = ["sae-bob"]', f'with = ["sae-bob", "{odd}"]'))
    lab.stop_kme("alice")
    lab.start_kme("alice")
    await lab.ready("alice")
    answer = await lab.enc(slave=encoded)
    assert answer.status == 503
    assert "403" in answer.message
    assert lab.link("alice")["issued"] == 0
