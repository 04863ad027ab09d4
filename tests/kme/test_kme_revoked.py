"""Who may share is asked when a key is handed over, not only when it was reserved; and who is no KME."""

from __future__ import annotations

import pytest
import pytest_asyncio

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.kme.audit import Audit
from keysource.kme.auth import Certificate
from keysource.kme.config import EXAMPLE, load
from keysource.kme.faults import Fault, FaultSwitch
from keysource.kme.ground import NotNow
from keysource.kme.peer_api import PeerApi
from keysource.kme.ratelimit import RateLimits
from keysource.kme.records import (
    Deposit,
    KeysNotFound,
    LinkRow,
    NotTheSlave,
    Offer,
    Reservation,
    StoreError,
    Terms,
    Unit,
    deposit_tag,
    xor,
)
from keysource.kme.sae_api import Refused as Refused401
from keysource.kme.site import Site
from keysource.kme.skip_api import SkipApi
from keysource.kme.store import Store
from keysource.skip.server import Refused

PEER = "kme-bob"
TOKEN = "t" * 20
IN = Terms("sae-bob", ("sae-alice",))


def unit(position, link="link"):
    return Unit(derive_key_id(link, 0, position), 0)


def configured(folder, **changes):
    text = EXAMPLE
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    file = folder / "kme.toml"
    file.write_text(text)
    return load(file)


@pytest_asyncio.fixture
async def site(tmp_path):
    site = Site(configured(tmp_path), {})
    await site.open()
    row = await site.bind(LinkRow(PEER, "link", End.A, Owner.ALTERNATE, Origin.QKD, 0))
    await site.db(lambda store: store.add_block(row, 0, bytearray(range(256))))
    yield site
    await site.aclose()


async def test_a_pair_that_may_share_no_more_gets_nothing_that_waits(site, tmp_path):
    assert not (await site.reserve(PEER, IN, [Offer(*unit(1), TOKEN)])).missing
    before = site.config
    site.config = configured(tmp_path, share=('may_share_with = ["sae-bob"]', "may_share_with = []"))
    with pytest.raises(NotTheSlave):
        await site.fetch("sae-bob", "sae-alice", [unit(1).key_id])
    with pytest.raises(KeysNotFound):  # what nobody waits for says nothing about who may
        await site.fetch("sae-bob", "sae-alice", [unit(3).key_id])
    site.config = configured(tmp_path, sae=('id = "sae-alice"', 'id = "sae-ann"'))
    with pytest.raises(NotTheSlave):
        await site.fetch("sae-bob", "sae-alice", [unit(1).key_id])
    site.config = before
    assert len(await site.fetch("sae-bob", "sae-alice", [unit(1).key_id])) == 1


async def test_a_name_with_a_star_opens_no_other_over_skip(tmp_path):
    config = configured(
        tmp_path, saes=('saes = ["sae-bob"]', 'saes = ["sae-bob", "sae-*"]'), share=('["sae-bob"]', '["sae-*"]')
    )
    site = Site(config, {})
    api = SkipApi(site, FaultSwitch(Fault.NONE), Audit(tmp_path / "audit", "kme-alice"), lambda: RateLimits(config))
    assert api.capabilities("sae-alice").knows("sae-bob")
    with pytest.raises(Refused) as refused:
        await api.new_key("sae-alice", "sae-bob")
    assert refused.value.status == 400


def certificate(name, *uris) -> Certificate:
    return {
        "subject": ((("commonName", name),),),
        "subjectAltName": tuple(("URI", uri) for uri in uris),
    }


@pytest.mark.parametrize(
    ("prefix", "uris", "trusted"),
    [
        ("urn:sae:", (), True),
        ("urn:sae:", ("spiffe://x/kme",), True),
        ("urn:sae:", ("urn:sae:sae-alice",), False),
        ("urn:sae:", ("urn:sae:a", "urn:sae:b"), False),  # two make no SAE, and no KME either
        ("", ("sae-alice",), False),
        ("", ("sae-bob",), False),
        ("", ("spiffe://x/kme",), True),
    ],
)
async def test_an_sae_with_the_common_name_of_a_kme_is_no_kme(tmp_path, monkeypatch, prefix, uris, trusted):
    source = f'[kme]\nsae_id_from = "san-uri"\nsae_id_prefix = "{prefix}"\n'
    site = Site(configured(tmp_path, kme=("[kme]\n", source)), {})
    api = PeerApi(site, Audit(tmp_path / "audit", "kme-alice"))
    monkeypatch.setattr("keysource.kme.peer_api.certificate_of", lambda request: certificate(PEER, *uris))
    if trusted:
        assert api._caller(None) == PEER
    else:
        with pytest.raises(Refused401, match=r"^$") as refused:
            api._caller(None)
        assert refused.value.status == 401


async def test_a_key_is_not_handed_out_when_the_alarm_came_while_it_was_offered(site, tmp_path):
    class Peer:
        async def reserve(self, link, terms, offers):
            await site.set_alarms(PEER, {"qber": "12 %"})
            return Reservation([], 0, 100)

        async def aclose(self): ...

    site.peers = {PEER: Peer()}
    with pytest.raises(NotNow, match="alarm"):
        await site.issue(PEER, Terms("sae-alice", ("sae-bob",)), 1)
    assert (await site.counts(PEER)).issued == 0


def test_two_links_of_one_name_would_give_two_keys_one_id(tmp_path):
    store = Store(tmp_path / "kme.sqlite", "kme", max_keys=100)
    try:
        store.bind_link(LinkRow("kme-b", "link", End.A, Owner.A, Origin.QKD, 0))
        with pytest.raises(StoreError, match="another link is called 'link' too"):
            store.bind_link(LinkRow("kme-c", "link", End.A, Owner.A, Origin.QKD, 0))
    finally:
        store.close()


def test_a_deposit_under_the_name_of_a_key_to_come_makes_no_second_key(tmp_path):
    """What a KME that lies could do: key_IDs can be worked out beforehand."""
    store = Store(tmp_path / "kme.sqlite", "kme", max_keys=100)
    try:
        b = store.bind_link(LinkRow("kme-b", "link-b", End.B, Owner.A, Origin.QKD, 0))
        c = store.bind_link(LinkRow("kme-c", "link-c", End.B, Owner.A, Origin.QKD, 0))
        store.add_block(c, 0, bytearray(range(64)))
        named = unit(0, "link-b").key_id
        terms = Terms("sae-c", ("sae-x",), origin=Origin.QKD)
        masked = bytes(xor(bytes(32), bytes(range(32))))
        lie = Deposit(named, TOKEN, (unit(0, "link-c"),), unit(1, "link-c"), masked, b"")
        tag = deposit_tag(bytes(range(32, 64)), "link-c", terms, lie)
        lie = Deposit(named, TOKEN, lie.pad, lie.mac, masked, tag)
        assert not store.deposit("kme-c", terms, [lie], 0.0).missing
        store.add_block(b, 0, bytearray(range(64)))
        offer = Offer(named, 0, "u" * 20)
        assert store.reserve("kme-b", Terms("sae-b", ("sae-y",)), [offer], 0.0).missing == [named]
    finally:
        store.close()
