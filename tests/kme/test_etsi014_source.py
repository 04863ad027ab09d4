"""The ``etsi014`` key source: its table, who says where a key comes from, what it refuses."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from keysource import tls
from keysource.base import Hop, KeySource, Origin, SaePair, SourceContext
from keysource.errors import BadAnswer, BadSettings, RepeatedKey, Unavailable
from keysource.etsi014.messages import DeliveredKey, StatusAnswer
from keysource.etsi014.source import Etsi014Source
from keysource.kme.pki import Authority
from keysource.registry import factory

TABLE = {
    "url": "https://kme.example:8443",
    "sae": "sae-a",
    "ca": "ca.crt",
    "certificate": "sae.crt",
    "private_key": "sae.key",
}


@pytest.fixture
def site(tmp_path):
    authority = Authority("test CA")
    (tmp_path / "ca.crt").write_bytes(authority.certificate)
    authority.sae("sae-a").write(tmp_path, "sae")
    return SourceContext("kme", tmp_path, tmp_path, "alice")


class FakeClient:
    """Answers what it is told; the wire is tested elsewhere."""

    def __init__(self, *keys, status=None):
        self.keys = list(keys)
        self.answer = status or StatusAnswer(stored_key_count=5)

    async def enc_keys(self, slave_sae):
        return [self.keys.pop(0)]

    async def dec_keys(self, master_sae, key_ids):
        return [self.keys.pop(0)]

    async def status(self, slave_sae):
        return self.answer

    async def aclose(self): ...


def delivered(material=None, key_id=None, **extension):
    return DeliveredKey(key_id or str(uuid.uuid4()), bytearray(material or os.urandom(32)), extension)


def source(*keys, status=None, **settings):
    source = Etsi014Source(TABLE | settings, SourceContext("kme", Path("/nowhere"), Path("/nowhere"), "alice"))
    source._client = FakeClient(*keys, status=status)
    return source


def test_it_is_found_by_its_name_and_is_a_key_source():
    assert factory("etsi014") is Etsi014Source
    assert isinstance(source(), KeySource)
    assert source().sae_pair("sae-b") == SaePair("sae-a", "sae-b")


# Where a key comes from


@pytest.mark.parametrize(
    ("configured", "said", "becomes"),
    [
        (None, None, Origin.EXTERNAL),
        ("qkd", None, Origin.QKD),
        ("couriered", None, Origin.COURIERED),
        (None, "qkd", Origin.QKD),
        (None, "simulated", Origin.SIMULATED),
        ("relayed", "relayed", Origin.RELAYED),
    ],
)
async def test_origin_is_what_operator_and_kme_say_together(configured, said, becomes):
    settings = {} if configured is None else {"origin": configured}
    extension = {} if said is None else {"qvpn_origin": said, "qvpn_hops": 3}
    for method in ("get_key", "get_key_with_id"):
        kme = source(delivered(**extension), **settings)
        arguments = ["sae-b"] if method == "get_key" else ["sae-b", "x"]
        key = await getattr(kme, method)(*arguments)
        assert (key.origin, key.hops) == (becomes, 3 if said else 0)


@pytest.mark.parametrize(("configured", "said"), [("qkd", "simulated"), ("external", "qkd"), ("simulated", "qkd")])
async def test_a_contradiction_is_refused_by_name_and_the_key_wiped(configured, said):
    bad = delivered(qvpn_origin=said)
    kme = source(bad, origin=configured, status=StatusAnswer(extension={"qvpn_origin": said}))
    with pytest.raises(BadAnswer) as caught:
        await kme.get_key("sae-b")
    assert f'that its keys are "{said}", the configuration says "{configured}"' in str(caught.value)
    assert not any(bad.material)
    status = await kme.status("sae-b")
    assert not status.ready  # or the peer would waste keys on it
    assert f'"{said}"' in status.reason


@pytest.mark.parametrize(
    "extension",
    [
        {"qvpn_origin": "magic"},
        {"qvpn_origin": 7},
        {"qvpn_origin": ["qkd"]},
        {"qvpn_origin": "qkd", "qvpn_hops": -1},
        {"qvpn_origin": "qkd", "qvpn_hops": 256},
        {"qvpn_hops": "2"},
        {"qvpn_hops": True},
    ],
)
async def test_nonsense_about_the_origin_is_refused(extension):
    with pytest.raises(BadAnswer):
        await source(delivered(**extension)).get_key("sae-b")


# A key is used once


async def test_the_same_bytes_or_key_id_again_are_refused():
    material, key_id = os.urandom(32), str(uuid.uuid4())
    repeated_bytes, repeated_id = delivered(material), delivered(key_id=key_id)
    kme = source(delivered(material, key_id), repeated_bytes, repeated_id, delivered())
    await kme.get_key("sae-b")
    for again in (repeated_bytes, repeated_id):
        with pytest.raises(RepeatedKey, match="before"):
            await kme.get_key("sae-b")
        assert not any(again.material)
    assert await kme.get_key("sae-b")


async def test_what_is_remembered_is_bounded():
    kme = source(*(delivered() for _ in range(5000)))
    for _ in range(5000):
        await kme.get_key("sae-b")
    assert len(kme._seen._tags) == 2 * 4096


# Status


async def test_status_from_a_foreign_kme():
    status = await source(status=StatusAnswer(stored_key_count=0), origin="qkd", hop="zone").status("sae-b")
    assert status.ready  # as slave one may well have none to draw
    assert (status.origin, status.hop, status.stored_keys, status.survives_harvest) == (Origin.QKD, Hop.ZONE, 0, True)


@pytest.mark.parametrize(
    ("extension", "ready", "reason"),
    [
        ({"qvpn_held_keys": 3}, True, ""),
        ({"qvpn_held_keys": 0}, False, "the KME holds no keys for this pair"),
        ({"qvpn_alarm": "qber: 0.14", "qvpn_held_keys": 3}, False, "the KME reports an alarm: qber: 0.14"),
        ({"qvpn_alarm": 7, "qvpn_qber": "x", "qvpn_key_rate": -1, "qvpn_held_keys": None}, True, ""),
    ],
)
async def test_status_from_our_kme(extension, ready, reason):
    status = await source(status=StatusAnswer(2, extension=extension)).status("sae-b")
    assert (status.ready, status.reason) == (ready, reason)
    assert status.key_rate is None


async def test_a_source_that_is_not_started_is_unavailable():
    kme = Etsi014Source(TABLE, SourceContext("kme", Path("/nowhere"), Path("/nowhere"), "alice"))
    with pytest.raises(Unavailable, match="not started"):
        await kme.get_key("sae-b")
    assert not (await kme.status("sae-b")).ready
    await kme.aclose()


# The table


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"url": "http://kme.example"}, "url"),
        ({"url": "https://"}, "url"),
        ({"url": "https://kme:0"}, "url"),
        ({"url": "https://kme:99999"}, "url"),
        ({"url": "https://user:pw@kme"}, "url"),
        ({"url": "https://kme/?x=1"}, "url"),
        ({"url": 7}, "url"),
        ({"sae": ""}, "sae"),
        ({"sae": ".."}, "sae"),
        ({"sae": "a\nb"}, "sae"),
        ({"origin": "magic"}, "origin"),
        ({"hop": "magic"}, "hop"),
        ({"hop": "local"}, ""),
        ({"method": "PUT"}, "method"),
        ({"accept_harvestable_hop": "perhaps"}, "accept_harvestable_hop"),
        ({"capath": "x"}, "capath"),
    ],
)
def test_a_wrong_table_names_its_key(change, key):
    with pytest.raises(BadSettings) as caught:
        source(**change)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", list(TABLE))
def test_a_missing_key_is_named(missing):
    table = {name: value for name, value in TABLE.items() if name != missing}
    with pytest.raises(BadSettings) as caught:
        Etsi014Source(table, SourceContext("kme", Path("/nowhere"), Path("/nowhere"), "alice"))
    assert caught.value.key == missing


@pytest.mark.parametrize(
    ("url", "hop", "harvestable", "host", "port"),
    [
        ("https://kme.example", "classical-tls", True, "kme.example", 443),
        ("https://[2001:db8::1]:8443", "classical-tls", True, "2001:db8::1", 8443),
        ("https://127.0.0.1:8443", "classical-tls", False, "127.0.0.1", 8443),
        ("https://[::1]:1/prefix", "local", False, "::1", 1),
        ("https://localhost", "local", False, "localhost", 443),
        ("https://kme.example", "zone", False, "kme.example", 443),
        ("https://127.0.0.1.example", "classical-tls", True, "127.0.0.1.example", 443),
    ],
)
def test_what_a_recorder_of_the_hop_gets(url, hop, harvestable, host, port):
    settings = source(url=url, hop=hop).settings
    assert (settings.harvestable, settings.host, settings.port) == (harvestable, host, port)


# Files


async def test_start_loads_the_files_and_needs_no_kme(site):
    kme = Etsi014Source(TABLE | {"url": "https://127.0.0.1:9"}, site)
    await kme.start()
    await kme.start()
    status = await kme.status("sae-b")
    assert not status.ready
    assert "127.0.0.1:9" in status.reason
    await kme.aclose()
    await kme.aclose()


@pytest.mark.parametrize("key", ["ca", "certificate", "private_key"])
@pytest.mark.parametrize("how", ["missing", "no PEM"])
async def test_a_file_that_does_not_do_is_named_at_the_start(site, key, how):
    (site.base / "bad").write_text("not PEM")
    table = TABLE | {key: "bad" if how == "no PEM" else "missing"}
    with pytest.raises(BadSettings) as caught:
        await Etsi014Source(table, site).start()
    assert caught.value.key in (key, "private_key")
    assert "\n" not in str(caught.value)


async def test_files_are_read_through_the_context(site):
    read = []

    def reader(kind):
        def read_it(path):
            read.append((kind, path.name))
            return path.read_bytes()

        return read_it

    context = SourceContext(
        "kme", site.base, site.state, "alice", read_file=reader("public"), read_secret=reader("secret")
    )
    kme = Etsi014Source(TABLE, context)
    assert not read  # nothing is opened before start
    await kme.start()
    await kme.aclose()
    assert read == [("public", "ca.crt"), ("public", "sae.crt"), ("secret", "sae.key")]


async def test_a_secret_file_that_others_may_read_stops_the_start(site):
    def refuse(path):
        raise ValueError(f"{path} can be read by others")

    context = SourceContext("kme", site.base, site.state, "alice", read_secret=refuse)
    with pytest.raises(BadSettings, match=r"private_key: .* can be read by others"):
        await Etsi014Source(TABLE, context).start()


@pytest.mark.skipif(tls.group_is_readable(), reason="here the group of a connection can be read")
async def test_pq_tls_is_not_believed_where_it_cannot_be_read_back(site):
    kme = Etsi014Source(TABLE | {"hop": "pq-tls"}, site)
    with pytest.raises(BadSettings, match="cannot tell which TLS group") as caught:
        await kme.start()
    assert caught.value.key == "hop"
