"""Each wrong configuration is refused with one exact sentence that names file, table and key."""

from __future__ import annotations

import re
from ipaddress import ip_interface, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.config.errors import ConfigError
from qvpn.config.load import parse_config
from qvpn.config.schema import Initiate, OnAlarm, Policy
from qvpn.config.units import parse_duration, parse_host_port, parse_listen, show_duration

FILE = Path("site/qvpn.toml")

GOOD = """\
version = 1
[site]
name = "alice"
identity = "alice.key"
listen = "[::]:51840"
state = "state"
[tunnel]
interface = "qvpn0"
addresses = ["10.90.0.1/24", "fd90::1/64"]
[key_source.kme]
type = "etsi014"
url = "https://kme-a.example:8443"
sae = "sae-alice"
origin = "qkd"
hop = "zone"
ca = "pki/ca.crt"
certificate = "pki/sae-alice.crt"
private_key = "pki/sae-alice.key"
[[peer]]
name = "bob"
public_key = "bob.pub"
endpoint = "192.0.2.2:51840"
allowed_ips = ["10.90.0.2/32", "fd90::2/128", "10.20.0.0/16"]
policy = "require-qkd"
rekey = "60s"
key_source = "kme"
sae = "sae-bob"
"""

CAROL = """\
[[peer]]
name = "carol"
public_key = "carol.pub"
allowed_ips = ["10.30.0.0/16"]
policy = "pqc-only"
"""


def parse(text: str):
    return parse_config(text.encode(), FILE)


def complaint(text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text if isinstance(text, bytes) else text.encode(), FILE)
    return str(caught.value)


def test_the_example_is_read_with_every_default() -> None:
    config = parse(GOOD)
    peer = config.peer[0]
    assert config.file == FILE
    assert config.path(config.site.identity) == Path("site/alice.key")
    assert config.tunnel.addresses == (ip_interface("10.90.0.1/24"), ip_interface("fd90::1/64"))
    assert config.tunnel.mtu is None
    assert (str(peer.endpoint), peer.policy, peer.rekey, peer.end) == ("192.0.2.2:51840", Policy.REQUIRE_QKD, 60, 180)
    assert peer.allowed_ips == tuple(map(ip_network, ("10.90.0.2/32", "fd90::2/128", "10.20.0.0/16")))
    assert (peer.suites, peer.initiate, peer.on_alarm) == ((1,), Initiate.AUTO, OnAlarm.FINISH_EPOCH)
    assert (peer.psk, peer.max_qkd_age, peer.max_degraded, peer.keepalive, peer.allow_simulated) == (
        None,
        None,
        None,
        None,
        False,
    )
    assert config.key_source["kme"].settings["url"] == "https://kme-a.example:8443"
    assert "type" not in config.key_source["kme"].settings


def test_every_further_name_is_known() -> None:
    config = parse(
        GOOD.replace('policy = "require-qkd"', 'policy = "prefer-qkd"')
        + 'suites = [2, 1]\npsk = "bob.psk"\nhard_end = "5m"\nmax_qkd_age = "1h"\nmax_degraded = "2h"\n'
        'initiate = "never"\nkeepalive = "5s"\ntransport = "udp"\nallow_simulated = true\non_alarm = "block-now"\n'
    )
    peer = config.peer[0]
    assert (peer.suites, peer.psk, peer.end, peer.max_qkd_age, peer.max_degraded) == (
        (2, 1),
        "bob.psk",
        300,
        3600,
        7200,
    )
    assert (peer.initiate, peer.keepalive, peer.on_alarm) == (Initiate.NEVER, 5, OnAlarm.BLOCK_NOW)


PEER = 'site/qvpn.toml: [[peer]] "bob" '
TRANSPORTS = 'transport: name transports, each once, the preferred one first: ["udp", "quic"]'
WORDS = [
    # (old text, new text, the whole complaint)
    ("version = 1", "version = 2", "site/qvpn.toml: version: this program reads version 1, not 2"),
    ("version = 1\n", "", "site/qvpn.toml: version: is missing; this program reads version = 1"),
    ("version = 1", "version = true", "site/qvpn.toml: version: this program reads version 1, not True"),
    ("[tunnel]", "[tunel]", 'site/qvpn.toml: tunel: unknown table or key; did you mean "tunnel"?'),
    ("version = 1", "version = 1\nzzz = 3", "site/qvpn.toml: zzz: unknown table or key"),
    ('state = "state"', 'sate = "x"', 'site/qvpn.toml: [site] sate: unknown key; did you mean "state"?'),
    ('rekey = "60s"', 'reky = "60s"', PEER + 'reky: unknown key; did you mean "rekey"?'),
    ('listen = "[::]:51840"\n', "", "site/qvpn.toml: [site] listen: is missing"),
    (
        '"[::]:51840"',
        '"localhost:1"',
        "site/qvpn.toml: [site] listen: 'localhost' is a name: listen needs an address, such as \"[::]:51840\"",
    ),
    (
        '"[::]:51840"',
        '"::1:51840"',
        "site/qvpn.toml: [site] listen: an IPv6 address stands in brackets: [ADDRESS]:PORT",
    ),
    ('"[::]:51840"', '"[::]:70000"', "site/qvpn.toml: [site] listen: a port is a number from 1 to 65535"),
    (
        'name = "alice"',
        'name = "../alice"',
        "site/qvpn.toml: [site] name: a name has 1 to 32 letters, digits, '-', '_' or '.', "
        "and starts with a letter or digit",
    ),
    (
        '"qvpn0"',
        '"a-name-beyond-15"',
        "site/qvpn.toml: [tunnel] interface: a device name has 1 to 15 letters, digits, '-', '_' or '.'",
    ),
    (
        '"10.90.0.1/24"',
        '"10.90.0.1"',
        'site/qvpn.toml: [tunnel] addresses (entry 1): write an address with its prefix, such as "10.90.0.1/24"',
    ),
    ('"qvpn0"', '"qvpn0"\nmtu = 500', "site/qvpn.toml: [tunnel] mtu: 500 is outside 576 to 65465"),
    ('"qvpn0"', '"qvpn0"\nmtu = 1279', "site/qvpn.toml: [tunnel] mtu: IPv6 needs at least 1280"),
    ('"qvpn0"', '"qvpn0"\nmtu = "1400"', "site/qvpn.toml: [tunnel] mtu: write a whole number"),
    ('"qvpn0"', '"qvpn0"\nlanes = 0', "site/qvpn.toml: [tunnel] lanes: 0 is outside 1 to 16"),
    (
        '51840"\nstate = "state"\n[tunnel]\n',
        '65530"\nstate = "state"\n[tunnel]\nlanes = 8\n',
        "site/qvpn.toml: [tunnel] lanes: 8 lanes from port 65530 on need more ports than there are",
    ),
    ('"qvpn0"', '"qvpn0"\nlanes = 17', "site/qvpn.toml: [tunnel] lanes: 17 is outside 1 to 16"),
    ('type = "etsi014"\n', "", "site/qvpn.toml: [key_source.kme] type: is missing"),
    ("[[peer]]", "[peer]", "site/qvpn.toml: [[peer]]: each peer is a table of its own: write [[peer]]"),
    (
        'name = "bob"\n',
        "",
        "site/qvpn.toml: [[peer]] number 1 name: is missing",
    ),
    ('name = "bob"', 'name = "alice"', 'site/qvpn.toml: [[peer]] "alice" name: the site itself has this name'),
    ('"bob.pub"', "3", PEER + "public_key: write a list in brackets"),
    ('"bob.pub"', "[]", PEER + "public_key: name the file with the peer's public key"),
    ('"192.0.2.2:51840"', '"192.0.2.2"', PEER + 'endpoint: write "HOST:PORT", with an IPv6 address in brackets'),
    ('"192.0.2.2:51840"', '"192.0.2:1"', PEER + "endpoint: '192.0.2' is not an IPv4 address"),
    (
        '"192.0.2.2:51840"',
        '"10.20.7.7:51840"',
        PEER + 'endpoint: 10.20.7.7 lies in 10.20.0.0/16, the allowed_ips of peer "bob": '
        "the tunnel would have to carry its own traffic",
    ),
    (
        "kme-a.example",
        "10.20.1.1",
        'site/qvpn.toml: [key_source.kme] url: 10.20.1.1 lies in 10.20.0.0/16, the allowed_ips of peer "bob": '
        "the tunnel would have to carry its own traffic",
    ),
    (
        "kme-a.example",
        "[fd90::2]",
        'site/qvpn.toml: [key_source.kme] url: fd90::2 lies in fd90::2/128, the allowed_ips of peer "bob": '
        "the tunnel would have to carry its own traffic",
    ),
    ('["10.90.0.2/32", ', '["10.90.0.2/33", ', PEER + "allowed_ips (entry 1): '10.90.0.2/33' is not an IP network"),
    (
        "10.20.0.0/16",
        "10.20.0.1/16",
        PEER + "allowed_ips (entry 3): '10.20.0.1/16' has bits behind its prefix; did you mean \"10.20.0.0/16\"?",
    ),
    (
        "10.20.0.0/16",
        "0.0.0.0/0",
        PEER + "allowed_ips (entry 3): '0.0.0.0/0' is a default route, and qvpn joins sites: "
        "it would carry the tunnel's own datagrams; name the peer's networks instead",
    ),
    ("10.20.0.0/16", "10.90.0.0/30", PEER + "allowed_ips: 10.90.0.2/32 and 10.90.0.0/30 overlap"),
    (
        '"require-qkd"',
        '"require-pqc"',
        PEER + 'policy: write one of "require-qkd", "prefer-qkd", "pqc-only"',
    ),
    ('"60s"', '"500ms"', PEER + 'rekey: 0.5s is outside "1s" to "1h"'),
    ('"60s"', '"61m"', PEER + 'rekey: 61m is outside "1s" to "1h"'),
    ('"60s"', "60", PEER + 'rekey: write a duration such as "60s", "5m" or "1h"'),
    (
        '"60s"',
        '"60s"\nhard_end = "122s"',
        PEER
        + "hard_end: 122s is too early for rekey = 1m: a failed rekey needs a second try, so write at least 123s",
    ),
    (
        'key_source = "kme"\n',
        "",
        PEER + 'key_source: policy "require-qkd" needs the name of a [key_source.NAME] table',
    ),
    (
        'key_source = "kme"',
        'key_source = "kma"',
        PEER + "key_source: there is no table [key_source.kma]; there are: kme",
    ),
    ('sae = "sae-bob"\n', "", PEER + "sae: is missing: [key_source.kme] must know what the peer is called there"),
    ('"60s"', '"60s"\nsuites = [1, 1]', PEER + "suites: list suites 1, 2 or 3, each once, the one to offer first"),
    (
        '"60s"',
        '"60s"\nsuites = [1, 3]',
        PEER + "suites: suite 3 needs ML-DSA-87 keys, suites 1 and 2 ML-DSA-65 keys: they do not go together",
    ),
    (
        '"60s"',
        '"60s"\nmax_degraded = "1h"',
        PEER + 'max_degraded: it limits policy "prefer-qkd", and the policy here is "require-qkd"',
    ),
    (
        'endpoint = "192.0.2.2:51840"',
        'initiate = "always"',
        PEER + 'endpoint: initiate = "always" needs an address to start to',
    ),
    ('"60s"', '"60s"\ntransport = []', PEER + TRANSPORTS),
    ('"60s"', '"60s"\ntransport = ["udp", "udp"]', PEER + TRANSPORTS),
    ('"60s"', '"60s"\ncarriers.quic.pin = ""', PEER + "carriers: quic is not among the peer's transports"),
    ('"60s"', '"60s"\nallow_simulated = "yes"', PEER + "allow_simulated: write true or false"),
    ('"60s"', '"60s"\nkeepalive = "0s"', PEER + 'keepalive: 0s is outside "1s" to "1h"'),
    (
        '"60s"',
        '"60s"\nkeepalive = "30s"',
        PEER + "keepalive: 30s is too long for rekey = 1m: the peer takes us for dead after 30s, so write less",
    ),
    (
        '"60s"',
        '"2s"\nkeepalive = "4s"',
        PEER + "keepalive: 4s is too long for rekey = 2s: the peer takes us for dead after 4s, so write less",
    ),
    (
        '"60s"',
        '"60s"\non_alarm = "panic"',
        PEER + 'on_alarm: write one of "finish-epoch", "rekey-now", "block-now"',
    ),
    (
        'origin = "qkd"',
        'origin = "simulated"',
        PEER + "allow_simulated: [key_source.kme] is simulated and gives no quantum security: "
        'policy "require-qkd" takes its keys only with allow_simulated = true',
    ),
    (
        'hop = "zone"\n',
        "",
        "site/qvpn.toml: [key_source.kme] hop: keys come from kme-a.example over classical TLS: whoever records that "
        'today can read them with a quantum computer, so policy "require-qkd" of peer "bob" takes them only with '
        'accept_harvestable_hop = true (or hop = "zone" inside one trusted perimeter)',
    ),
]


@pytest.mark.parametrize(("old", "new", "sentence"), WORDS, ids=lambda v: str(v)[-30:])
def test_a_mistake_has_its_sentence(old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    assert complaint(GOOD.replace(old, new, 1)) == sentence


def test_not_toml_and_not_text() -> None:
    assert complaint("[site").startswith("site/qvpn.toml: is not TOML: Expected ']'")
    assert complaint(b"\xff\xfe") == "site/qvpn.toml: is not UTF-8 text"


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (CAROL.replace("carol", "bob"), 'site/qvpn.toml: [[peer]] "bob" name: two peers have this name'),
        (
            CAROL.replace("10.30.0.0/16", "10.20.4.0/24"),
            'site/qvpn.toml: [[peer]] "carol" allowed_ips: 10.20.4.0/24 overlaps 10.20.0.0/16 of peer "bob"',
        ),
        (
            CAROL.replace("10.30.0.0/16", "192.0.2.0/24"),
            'site/qvpn.toml: [[peer]] "bob" endpoint: 192.0.2.2 lies in 192.0.2.0/24, the allowed_ips of peer '
            '"carol": the tunnel would have to carry its own traffic',
        ),
    ],
)
def test_two_peers_do_not_share_what_names_one(extra: str, sentence: str) -> None:
    parse(GOOD + CAROL)
    assert complaint(GOOD + extra) == sentence


def test_a_harvestable_hop_is_taken_when_local_or_accepted() -> None:
    text = GOOD.replace('hop = "zone"\n', "")
    parse(text.replace("kme-a.example", "127.0.0.1"))
    parse(text.replace("kme-a.example", "[::1]"))
    parse(text.replace('ca = "pki/ca.crt"', 'ca = "pki/ca.crt"\naccept_harvestable_hop = true'))
    parse(text.replace("require-qkd", "prefer-qkd"))


@pytest.mark.parametrize(
    ("initiate", "owner", "fine"),
    [("always", "b", False), ("always", "a", True), ("never", "a", False), ("never", "b", True), ("auto", "b", True)],
)
def test_the_side_that_starts_owns_the_keys(initiate: str, owner: str, fine: bool) -> None:
    source = f'[key_source.kme]\ntype = "file"\npath = "k"\nend = "a"\nowner = "{owner}"\n'
    text = re.sub(r"\[key_source\.kme\].*?(?=\[\[peer\]\])", source, GOOD, flags=re.DOTALL)
    text += f'initiate = "{initiate}"\n'
    if fine:
        parse(text)
    else:
        other = {"always": "the other end", "never": "this end"}[initiate]
        assert complaint(text) == PEER + (
            f'initiate: "{initiate}" cannot work: the keys of [key_source.kme] belong to {other}'
        )


@given(st.binary(max_size=200))
def test_any_bytes_give_one_line(data: bytes) -> None:
    assert "\n" not in complaint(data)


@given(st.integers(0, 3600_000))
def test_a_duration_is_read_back(milliseconds: int) -> None:
    assert parse_duration(f"{milliseconds}ms") == pytest.approx(milliseconds / 1000)
    assert parse_duration(show_duration(float(milliseconds))) == milliseconds


@pytest.mark.parametrize("text", ["", "60", "s", "1 s", "-1s", "1e3s", "١s", "1.2345s", None, 60, ["1s"]])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="write a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["192.0.2.2:1", "[2001:db8::2]:51840", "gw.example:65535", "a_b-c:22"])
def test_host_and_port_are_read_back(text: str) -> None:
    assert str(parse_host_port(text)) == text


@pytest.mark.parametrize(
    "text", ["", ":1", "host", "host:", "host:0", "host:65536", "[::1]", "[x]:1", "a b:1", "-a:1"]
)
def test_what_is_no_host_and_port(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_host_port(text)


def test_listen_needs_an_address() -> None:
    assert str(parse_listen("0.0.0.0:5")) == "0.0.0.0:5"
    with pytest.raises(ValueError, match="is a name"):
        parse_listen("gw:5")


@pytest.mark.parametrize("rekey", [1.0, 14.9, 15.0, 60.0, 3600.0])
def test_check_and_protocol_mean_the_same_dead_peer(rekey: float) -> None:
    from qvpn.config.schema import dead_peer
    from qvpn.handshake import timers

    assert dead_peer(rekey) == timers.dead_peer(rekey)


PARTS = """\
[key_source.both]
type = "{kind}"
sources = ["kme", "second"]
sae = "alice"
[key_source.second]
type = "etsi014"
url = "https://second.example"
{hop}
origin = "{origin}"
"""


@pytest.mark.parametrize(
    ("kind", "hop", "origin", "said"),
    [
        ("failover", 'hop = "zone"', "qkd", ""),
        ("failover", "", "qkd", "[key_source.second] hop: keys come from second.example"),
        ("failover", 'hop = "zone"', "simulated", "[key_source.second] is simulated"),
        ("combine", 'hop = "zone"', "qkd", ""),
        ("combine", "", "qkd", "[key_source.second] hop: keys come from second.example"),
        ("combine", 'hop = "zone"', "simulated", "[key_source.second] is simulated"),
    ],
)
def test_require_qkd_looks_at_the_parts_of_a_source(kind: str, hop: str, origin: str, said: str) -> None:
    text = GOOD.replace('key_source = "kme"', 'key_source = "both"')
    text = text.replace("[[peer]]", PARTS.format(kind=kind, hop=hop, origin=origin) + "[[peer]]", 1)
    if said:
        assert said in complaint(text)
    else:
        parse(text)
    assert "is missing: [key_source.both]" in complaint(text.replace('sae = "sae-bob"\n', ""))


@pytest.mark.parametrize("inner", ["failover", "combine"])
@pytest.mark.parametrize("outer", ["failover", "combine"])
def test_require_qkd_looks_at_the_parts_of_the_parts(outer: str, inner: str) -> None:
    nested = f'[key_source.top]\ntype = "{outer}"\nsources = ["both", "kme"]\nsae = "alice"\n'
    text = GOOD.replace('key_source = "kme"', 'key_source = "top"')
    text = text.replace("[[peer]]", nested + PARTS.format(kind=inner, hop="", origin="qkd") + "[[peer]]", 1)
    assert "[key_source.second] hop: keys come from second.example" in complaint(text)
    in_itself = text.replace('sources = ["kme", "second"]', 'sources = ["top", "second"]')
    assert "[key_source.second] hop" in complaint(in_itself)
