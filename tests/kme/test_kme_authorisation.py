"""Which SAE gets which key: several SAEs at two real KMEs, some of whom are strangers to each other."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import pytest
import pytest_asyncio

pytestmark = pytest.mark.asyncio(loop_scope="module")
NOT_FOUND = "one or more keys specified are not found on KME"


def no_body(answer):
    """Tables 4, 6 and 8 of ETSI GS QKD 014: a 401 has no body."""
    assert (answer.status, answer.body) == (401, b"")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def crowded(lab_class):
    """Two masters at alice, two slaves at bob; one of alice's may not share with the second."""
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        lab = lab_class(Path(folder))
        odd = "sae 2/ü%?"
        _let_them_in(lab, odd)
        try:
            await lab.start(keys=0)
            yield lab, odd, "sae%202%2F%C3%BC%25%3F"
        finally:
            await lab.aclose()


def _let_them_in(lab, odd):
    alice, bob = lab.files["alice"], lab.files["bob"]
    alice.write_text(
        alice.read_text().replace('saes = ["sae-bob"]', f'saes = ["sae-bob", "{odd}"]')
        + f'[[sae]]\nid = "sae-master2"\nmay_share_with = ["{odd}"]\n'
    )
    bob.write_text(
        bob.read_text().replace('saes = ["sae-alice"]', 'saes = ["sae-alice", "sae-master2"]')
        + f'[[sae]]\nid = "{odd}"\nmay_share_with = ["sae-master2"]\n'
    )


async def test_more_keys_than_there_are_is_503_and_takes_none(crowded):
    lab, _odd, _encoded = crowded
    await lab.settle(keys=10)
    answer = await lab.enc({"number": 6})
    assert answer.status == 503
    assert answer.json["details"] == [{"qvpn_reason": "exhausted"}]
    assert int(answer.headers["Retry-After"]) >= 1
    assert len((await lab.enc({"number": 5})).keys()) == 5
    assert (await lab.enc()).status == 503


async def test_sae_ids_are_url_decoded(crowded):
    lab, odd, encoded = crowded
    await lab.settle(keys=20)
    keys = (await lab.enc(sae="sae-master2", slave=encoded)).keys()
    assert (await lab.dec(list(keys), sae=odd, master="sae-master2")).keys() == keys
    status = await lab.http("sae-master2", "alice", "GET", f"/api/v1/keys/{encoded}/status")
    assert status.json["slave_SAE_ID"] == odd


async def test_a_bystander_gets_401_and_the_key_stays_for_its_slave(crowded):
    lab, odd, _encoded = crowded
    await lab.settle(keys=20)
    keys = (await lab.enc()).keys()
    no_body(await lab.dec(list(keys), sae=odd))
    no_body(await lab.dec([*keys, str(uuid.uuid4())], sae=odd))
    wrong_master = await lab.dec(list(keys), master="sae-master2")
    assert (wrong_master.status, wrong_master.message) == (400, NOT_FOUND)
    assert (await lab.dec(list(keys))).keys() == keys


async def test_who_may_share_with_whom_is_asked_at_both_ends(crowded):
    lab, odd, encoded = crowded
    await lab.settle(keys=20)
    no_body(await lab.enc(slave=encoded))  # alice's KME knows that sae-alice may not
    no_body(await lab.enc(sae="sae-master2"))
    alice = lab.files["alice"]  # from here to the end alice's KME believes that it may; bob's does not
    alice.write_text(alice.read_text().replace('with = ["sae-bob"]', f'with = ["sae-bob", "{odd}"]'))
    lab.stop_kme("alice")
    lab.start_kme("alice")
    await lab.ready("alice")
    answer = await lab.enc(slave=encoded)
    assert answer.status == 503
    assert "403" in answer.message
    assert lab.link("alice")["issued"] == 0
