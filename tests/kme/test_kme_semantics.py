"""What a KME answers, row by row of ETSI GS QKD 014 V1.1.1 clauses 5 and 6: two real processes, raw HTTP."""

from __future__ import annotations

import asyncio
import base64
import random
import uuid

import aiohttp
import pytest

from keysource import tls
from keysource.base import Origin
from keysource.device.messages import BlockFacts

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/api/v1/keys/sae-bob"
UNMET = "not all extension_mandatory request options could be met"
UNSUPPORTED = "not all extension_mandatory parameters are supported"
NOT_FOUND = "one or more keys specified are not found on KME"


async def enc(lab, body=None, **options):
    return await lab.enc(body, **options)


async def dec(lab, key_ids, **options):
    return await lab.dec(key_ids, **options)


def keys_of(answer):
    return answer.keys()


async def http(lab, sae, site, method, path, body=None):
    return await lab.http(sae, site, method, path, body)


def no_body(answer):
    """Tables 4, 6 and 8: a 401 has no body."""
    assert (answer.status, answer.body) == (401, b"")


# 5.2 Get status


async def test_status_has_every_field_with_its_type(shared_lab):
    answer = await http(shared_lab, "sae-alice", "alice", "GET", "/api/v1/keys/sae-bob/status")
    status = answer.json
    extension = status.pop("status_extension")
    stored = status.pop("stored_key_count")
    assert 0 < stored <= 256
    assert status == {
        "source_KME_ID": "kme-alice",
        "target_KME_ID": "kme-bob",
        "master_SAE_ID": "sae-alice",
        "slave_SAE_ID": "sae-bob",
        "key_size": 256,
        "max_key_count": 100_000,
        "max_key_per_request": 128,
        "max_key_size": 4096,
        "min_key_size": 64,
        "max_SAE_ID_count": 8,
    }
    assert extension["qvpn_origin"] == "simulated"
    assert extension["qvpn_hops"] == 0
    assert all(name.startswith("qvpn_") for name in extension)  # clause 6: vendor names carry a prefix


async def test_status_consumes_nothing_and_counts_what_is_taken(shared_lab):
    async def stored() -> int:
        return (await http(shared_lab, "sae-alice", "alice", "GET", "/api/v1/keys/sae-bob/status")).json[
            "stored_key_count"
        ]

    before = await stored()
    assert await stored() == before
    keys_of(await enc(shared_lab, {"number": 3}))
    assert await stored() == before - 3


# 5.3 Get key


@pytest.mark.parametrize(
    ("body", "count"),
    [(None, 1), (b"", 1), ({}, 1), ({"number": 1}, 1), ({"number": 5, "size": 256}, 5), ({"size": 256}, 1)],
)
async def test_post_enc_keys(shared_lab, body, count):
    keys = keys_of(await enc(shared_lab, body))
    assert len(keys) == count
    assert keys_of(await dec(shared_lab, list(keys))) == keys


@pytest.mark.parametrize(("query", "count"), [("", 1), ("?number=3", 3), ("?size=256", 1), ("?number=2&size=256", 2)])
async def test_get_enc_keys(shared_lab, query, count):
    keys = keys_of(await http(shared_lab, "sae-alice", "alice", "GET", f"/api/v1/keys/sae-bob/enc_keys{query}"))
    assert len(keys) == count
    [first, *_] = keys
    one = await http(shared_lab, "sae-bob", "bob", "GET", f"/api/v1/keys/sae-alice/dec_keys?key_ID={first}")
    assert keys_of(one) == {first: keys[first]}


async def test_extension_optional_may_be_ignored_and_empty_lists_are_legal(shared_lab):
    body = {"extension_optional": [{"abc_x": 1}], "extension_mandatory": [], "additional_slave_SAE_IDs": []}
    assert len(keys_of(await enc(shared_lab, body))) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"size": 257}, "size shall be a multiple of 8"),
        ({"size": 7}, "size shall be a multiple of 8"),
        ({"size": 4104}, "size: keys of 64 to 4096 bits are served"),
        ({"size": 56}, "size: keys of 64 to 4096 bits are served"),
        ({"size": 0}, "size: keys of 64 to 4096 bits are served"),
        ({"size": -8}, "size: keys of 64 to 4096 bits are served"),
        ({"number": 0}, "number: 1 to 128 keys may be asked for"),
        ({"number": -1}, "number: 1 to 128 keys may be asked for"),
        ({"number": 129}, "number: 1 to 128 keys may be asked for"),
        (
            {"extension_mandatory": [{"abc_route_type": "direct"}]},
            "not all extension_mandatory parameters are supported",
        ),
        ({"additional_slave_SAE_IDs": ["sae-c"] * 9}, "additional_slave_SAE_IDs: max_SAE_ID_count of this KME is 8"),
        ({"additional_slave_SAE_IDs": ["sae-bob"]}, "additional_slave_SAE_IDs: an SAE stands twice"),
        ({"additional_slave_SAE_IDs": ["sae-c"]}, "no KME is known that serves the slave SAE 'sae-c'"),
        ({"additional_slave_SAE_IDs": [1]}, "additional_slave_SAE_IDs"),
        (
            {"extension_mandatory": [{"qvpn_origin": "qkd"}]},
            UNMET,
        ),
        (
            {"extension_mandatory": [{"qvpn_max_hops": -1}]},
            UNMET,
        ),
        ({"number": "1"}, "number: "),
        ({"number": None}, "number: "),
        ({"number": 1.5}, "number: "),
        ({"size": True}, "size: "),
        (b"{", "the body is not JSON"),
        (b"[]", "the body is not a JSON object"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"x" * 300_000, "the body is longer"),
    ],
)
async def test_enc_keys_refuses_with_400_and_consumes_nothing(shared_lab, body, message):
    before = shared_lab.link("alice")["issued"]
    answer = await enc(shared_lab, body)
    assert answer.status == 400
    assert answer.message.startswith(message)
    assert shared_lab.link("alice")["issued"] == before


async def test_details_name_the_unsupported_extension(shared_lab):
    answer = await enc(shared_lab, {"extension_mandatory": [{"abc_route_type": "direct"}]})
    assert answer.json["details"] == [{"extension_mandatory_unsupported": "abc_route_type is not supported"}]


@pytest.mark.parametrize(
    "query", ["?number=1&number=2", "?extension_mandatory=x", "?number=x", "?number=-1", "?size=%D9%A3"]
)
async def test_get_enc_keys_refuses_what_needs_a_post(shared_lab, query):
    answer = await http(shared_lab, "sae-alice", "alice", "GET", f"{PATH}/enc_keys{query}")
    assert (answer.status, bool(answer.message)) == (400, True)


# 5.4 Get key with key IDs


async def test_a_key_is_delivered_once(shared_lab):
    keys = keys_of(await enc(shared_lab))
    assert keys_of(await dec(shared_lab, list(keys))) == keys
    again = await dec(shared_lab, list(keys))
    assert (again.status, again.message) == (400, NOT_FOUND)


async def test_a_batch_with_one_bad_id_gives_nothing_and_destroys_nothing(shared_lab):
    keys = keys_of(await enc(shared_lab, {"number": 3}))
    for bad in (str(uuid.uuid4()), "not-a-uuid", ""):
        answer = await dec(shared_lab, [*keys, bad])
        assert (answer.status, answer.message) == (400, NOT_FOUND)
    assert keys_of(await dec(shared_lab, list(keys))) == keys


async def test_key_ids_are_compared_as_uuids(shared_lab):
    keys = keys_of(await enc(shared_lab))
    assert keys_of(await dec(shared_lab, [key_id.upper() for key_id in keys])) == keys


async def test_one_id_twice_is_refused(shared_lab):
    [key_id] = keys_of(await enc(shared_lab))
    assert (await dec(shared_lab, [key_id, key_id])).status == 400
    assert (await dec(shared_lab, [key_id, key_id.upper()])).status == 400
    assert (await dec(shared_lab, [key_id])).status == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"key_IDs": []},
        {"key_IDs": "x"},
        {"key_IDs": [{"key_ID": 1}]},
        {"key_IDs": [{"key_ID": "x"}] * 129},
        b"",
        b"{",
    ],
)
async def test_dec_keys_refuses_wrong_bodies(shared_lab, body):
    answer = await http(shared_lab, "sae-bob", "bob", "POST", "/api/v1/keys/sae-alice/dec_keys", body)
    assert answer.status == 400
    assert answer.message


async def test_get_dec_keys_with_two_good_key_ids_gives_none(shared_lab):
    keys = keys_of(await enc(shared_lab, {"number": 2}))
    query = "&".join(f"key_ID={key_id}" for key_id in keys)
    answer = await http(shared_lab, "sae-bob", "bob", "GET", f"/api/v1/keys/sae-alice/dec_keys?{query}")
    assert (answer.status, bool(answer.message)) == (400, True)
    assert keys_of(await dec(shared_lab, list(keys))) == keys


@pytest.mark.parametrize("query", ["", "?key_ID=a&key_ID=b", "?key_ID=a&x=1", "?key_IDs=a"])
async def test_get_dec_keys_carries_exactly_one_key_id(shared_lab, query):
    answer = await http(shared_lab, "sae-bob", "bob", "GET", f"/api/v1/keys/sae-alice/dec_keys{query}")
    assert (answer.status, bool(answer.message)) == (400, True)


async def test_a_key_that_nobody_drew_is_not_found(shared_lab):
    """Also where the KME holds it: bob's KME has all of alice's keys, and gives none that alice did not draw."""
    from keysource.base import derive_key_id

    for position in range(500, 512):
        answer = await dec(shared_lab, [derive_key_id("lab-link", 0, position)])
        assert (answer.status, answer.message) == (400, NOT_FOUND)


async def test_the_master_cannot_fetch_its_own_key(shared_lab):
    keys = keys_of(await enc(shared_lab))
    answer = await dec(shared_lab, list(keys), sae="sae-alice", site="alice", master="sae-bob")
    assert answer.status == 400
    assert keys_of(await dec(shared_lab, list(keys))) == keys


# Who may


@pytest.mark.parametrize("sae", ["sae-eve", "kme-alice", "kme-bob", "sae-bob", "SAE-ALICE", "sae-alice "])
@pytest.mark.parametrize("call", ["status", "enc_keys", "dec_keys"])
async def test_strangers_get_401_without_body(shared_lab, sae, call):
    no_body(await http(shared_lab, sae, "alice", "GET", f"/api/v1/keys/sae-bob/{call}"))


async def test_without_certificate_there_is_no_connection(shared_lab):
    import ssl

    context = ssl.create_default_context(cadata=shared_lab.authority.certificate.decode())
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(connector=connector) as session:
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            await session.get(f"{shared_lab.plans['alice'].url}/api/v1/keys/sae-bob/status")


async def test_a_certificate_of_another_authority_is_no_certificate(shared_lab):
    from keysource.kme.pki import Authority

    credential = Authority("lab CA").sae("sae-alice")  # the same names, another key
    context = tls.client_context(shared_lab.authority.certificate, credential.certificate, credential.private_key)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"{shared_lab.plans['alice'].url}/api/v1/keys/sae-bob/status")


@pytest.mark.parametrize("call", ["status", "enc_keys"])
@pytest.mark.parametrize(("slave", "status"), [("sae-nobody", 400), ("sae-alice", 400), ("..%2F", 400)])
async def test_an_unknown_slave_is_400(shared_lab, call, slave, status):
    answer = await http(shared_lab, "sae-alice", "alice", "GET", f"/api/v1/keys/{slave}/{call}")
    assert answer.status == status
    assert answer.message


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/api/v2/keys/sae-bob/status", 404),
        ("GET", "/kmapi/v2/reserve", 404),
        ("POST", "/kmapi/v2/reserve", 404),
        ("POST", "/api/v1/keys/sae-bob/status", 405),
        ("DELETE", "/api/v1/keys/sae-bob/enc_keys", 405),
        ("HEAD", "/api/v1/keys/sae-bob/enc_keys", 405),
    ],
)
async def test_paths_outside_the_interface(shared_lab, method, path, status):
    answer = await http(shared_lab, "sae-alice", "alice", method, path)
    assert answer.status == status
    assert method == "HEAD" or answer.message


# The listener for KMEs


async def reserve(lab, caller, body, site="bob"):
    return await lab.http(caller, site, "POST", "/kmapi/v2/reserve", body, port=lab.plans[site].peer_port)


RESERVE = {
    "link": "lab-link",
    "master_SAE_ID": "sae-alice",
    "slave_SAE_IDs": ["sae-bob"],
    "keys": [{"key_ID": "nothing", "block": 0, "token": "0123456789abcdef"}],
}


@pytest.mark.parametrize("caller", ["sae-alice", "sae-bob", "kme-bob", "kme-eve"])
async def test_only_the_other_kme_may_reserve(shared_lab, caller):
    no_body(await reserve(shared_lab, caller, RESERVE))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 200),
        ({"master_SAE_ID": "sae-bob"}, 403),
        ({"slave_SAE_IDs": ["sae-alice"]}, 403),
        ({"slave_SAE_IDs": []}, 400),
        ({"slave_SAE_IDs": ["sae-bob", "sae-c"]}, 403),
        ({"slave_SAE_IDs": ["sae-bob", "sae-bob"]}, 400),
        ({"size": 512}, 400),
        ({"link": "another"}, 409),
        ({"keys": []}, 400),
        ({"keys": [{"key_ID": "x", "block": -1, "token": "0123456789abcdef"}]}, 400),
        ({"keys": [{"key_ID": "x", "block": 1, "token": "short"}]}, 400),
    ],
)
async def test_reserve_is_checked(shared_lab, change, status):
    answer = await reserve(shared_lab, "kme-alice", RESERVE | change)
    assert answer.status == status
    if status == 200:
        assert answer.json["missing"] == ["nothing"]


async def test_a_key_belongs_to_one_end_only(shared_lab):
    """kme-alice cannot reserve a key at bob's that bob's end issues: both could give it out."""
    from keysource.base import derive_key_id

    for position, missing in ((401, True), (400, False)):  # odd: end b owns it
        key = {"key_ID": derive_key_id("lab-link", 0, position), "block": 0, "token": "0123456789abcdef"}
        answer = await reserve(shared_lab, "kme-alice", RESERVE | {"keys": [key]})
        assert bool(answer.json["missing"]) is missing


async def test_the_log_has_no_key_and_no_key_id(shared_lab):
    keys = keys_of(await enc(shared_lab, {"number": 4}))
    keys_of(await dec(shared_lab, list(keys)))
    await asyncio.sleep(0)
    text = "".join((shared_lab.folder / f"{site}.log").read_text() for site in ("alice", "bob"))
    assert '"event": "issued"' in text
    assert '"event": "fetched"' in text
    for key_id, key in keys.items():
        assert key_id not in text
        for spelling in (key.hex(), base64.b64encode(key).decode()):
            assert spelling not in text


# Relayed keys: what a device says of one block


async def test_a_relayed_block_says_what_it_is_in_every_key(shared_lab):
    facts = BlockFacts(Origin.RELAYED, 2, (("west", "north", "middle", "east"),))
    block, keys = shared_lab.next_block, random.Random(1).randbytes(4 * 32)
    shared_lab.next_block += 1
    for device in shared_lab.devices.values():
        device.publish(block, bytearray(keys), facts)
    for site in ("alice", "bob"):
        await shared_lab.until(lambda site=site: shared_lab.status(site)["links"][0]["next_block"] > block, site)
    wanted = {"number": 2, "extension_mandatory": [{"qvpn_origin": "relayed"}, {"qvpn_max_hops": 1}]}
    refused = await enc(shared_lab, wanted)
    assert refused.status == 400 and refused.json["message"] == UNMET
    wanted["extension_mandatory"][1]["qvpn_max_hops"] = 2
    drawn = await enc(shared_lab, wanted)
    fetched = await dec(shared_lab, list(keys_of(drawn)))
    for answer in (drawn, fetched):
        assert [key["key_extension"] for key in answer.json["keys"]] == [
            {"qvpn_origin": "relayed", "qvpn_hops": 2}
        ] * 2
        assert sorted(keys_of(answer).values()) == sorted([keys[:32], keys[64:96]])
    link = shared_lab.status("bob")["links"][0]
    assert (link["hops"], link["paths"], link["origin"]) == (2, [list(facts.paths[0])], "simulated")
