"""What is written for the other programs, and which cases are run."""

import json
from base64 import b64decode
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate

from qvpn.bench import cases
from qvpn.bench.link import ENDS, LINKS
from qvpn.bench.peers import nebula, openvpn, own, tinc, wireguard


def test_wireguard_ends_know_each_other() -> None:
    keys = {name: X25519PrivateKey.generate() for name in ENDS}
    text = wireguard.config("alice", keys)
    values = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
    assert b64decode(values["PrivateKey"]) == keys["alice"].private_bytes_raw()
    assert b64decode(values["PublicKey"]) == keys["bob"].public_key().public_bytes_raw()
    assert values["AllowedIPs"] == "10.90.0.2/32"
    assert values["Endpoint"].startswith("192.0.2.2:")


def test_openvpn_trusts_exactly_the_others_certificate(tmp_path: Path) -> None:
    for name in ENDS:
        (tmp_path / name).mkdir()
    prints = {name: openvpn._identity(tmp_path / name, name) for name in ENDS}
    text = openvpn.config("bob", prints)
    assert f"peer-fingerprint {prints['alice']}" in text
    assert prints["bob"] not in text
    assert "tls-client" in text
    assert "tls-server" in openvpn.config("alice", prints)
    assert "data-ciphers AES-256-GCM\n" in text
    certificate = load_pem_x509_certificate((tmp_path / "bob/end.crt").read_bytes())
    assert (
        load_pem_private_key((tmp_path / "bob/end.key").read_bytes(), None).public_key() == certificate.public_key()
    )
    assert (tmp_path / "bob/end.key").stat().st_mode & 0o077 == 0


def test_nebula_config(tmp_path: Path) -> None:
    found = json.loads(nebula.config("alice", tmp_path, tmp_path / "ca", 1440))
    assert found["static_host_map"] == {"10.90.0.2": ["192.0.2.2:51840"]}
    assert found["cipher"] == "aes"
    assert found["tun"]["mtu"] == 1440


def test_tinc_folder(tmp_path: Path) -> None:
    keys = {name: rsa.generate_private_key(public_exponent=65537, key_size=1024) for name in ENDS}
    tinc.write(tmp_path, "alice", keys)
    assert "ConnectTo = bob" in (tmp_path / "tinc.conf").read_text()
    assert (tmp_path / "rsa_key.priv").read_bytes().startswith(b"-----BEGIN RSA PRIVATE KEY")
    host = (tmp_path / "hosts/bob").read_text()
    assert "Cipher = aes-256-cbc\nDigest = sha256\n" in host
    assert load_pem_public_key(host[host.index("-----") :].encode()) == keys["bob"].public_key()


def test_every_peer_says_its_cipher_and_whether_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QVPN_BENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda program, path=None: None)
    for make in cases.PEERS.values():
        peer = make()
        assert peer.cipher
        assert "not installed" in (peer.absent() or "")


def test_the_plan_has_ours_the_bare_link_and_each_peer_once() -> None:
    found = [case.key for case in cases.plan(tuple(cases.PEERS), ("default", "no-uso"), extras=False)]
    assert found[:2] == ["no tunnel@default", "qvpn@default"]
    assert len(found) == len(set(found))
    assert {f"{name}@default" for name in cases.PEERS} <= set(found)
    assert {"qvpn@no-uso", "wireguard-go@no-uso"} <= set(found)
    assert "openvpn@no-uso" not in found


def test_variants_say_their_cipher() -> None:
    found = {case.tunnel.name: case.tunnel for case in cases.plan((), ("default",), extras=True)}
    assert found["qvpn suite 02"].cipher == "ChaCha20-Poly1305"
    assert "rekey 1 s" in found["qvpn rekey 1s"].version()


def test_carriers_can_be_had_without_the_other_extras_and_are_named_where_they_are_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QVPN_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda program, path=None: None)
    found = cases.plan((), ("default", "jumbo"), ("tcp1", "udp", "load"), extras=False, carriers=True)
    assert [case.key for case in found] == [
        "no tunnel@default",
        "qvpn@default",
        "qvpn@jumbo",
        "qvpn over quic@default",
        "openvpn over tcp@default",
    ]
    quic, tcp = found[-2:]
    assert quic.measures == tcp.measures == ["tcp1", "load"]
    assert quic.tunnel.absent() is None and tcp.tunnel.absent() == "openvpn not installed"
    assert "over quic" in quic.tunnel.version()
    table = {"peer": [{}], "tunnel": {}}
    own.Qvpn(transport="quic")._adapt(table)
    assert table == {"peer": [{"transport": "quic"}], "tunnel": {}}
    assert [openvpn._protocol(name, True) for name in ENDS] == ["tcp4-server", "tcp4-client"]


def test_only_what_differs_from_the_file_of_init_is_changed() -> None:
    table = {"peer": [{"rekey": "5s"}], "tunnel": {}}
    own.Qvpn()._adapt(table)
    assert table == {"peer": [{"rekey": "5s"}], "tunnel": {}}
    own.Qvpn(suite=2, lanes=2)._adapt(table)
    assert table == {"peer": [{"rekey": "5s", "suites": [2]}], "tunnel": {"lanes": 2}}


def test_links_are_the_four() -> None:
    assert {name: (link.mtu, link.features) for name, link in LINKS.items()} == {
        "default": (1500, ()),
        "tx-off": (1500, (("tx", "off"), ("gro", "on"))),
        "no-uso": (1500, (("tx-udp-segmentation", "off"),)),
        "jumbo": (9000, ()),
    }
