"""Transports as plug-ins: what is registered, what the configuration may say, where QUIC's certificate comes from."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qvpn import launch
from qvpn.config.errors import ConfigError
from qvpn.config.load import parse_config
from qvpn.netio.base import Address
from qvpn.netio.memory import MemoryNetwork
from qvpn.sitefiles import SiteFiles
from qvpn.transports import registry
from qvpn.transports.base import BadTransport, TransportContext, Udp
from qvpn.transports.quic import certificate
from qvpn.transports.quic.transport import LOOK, OWN, Quic

TOML = """
version = 1
[site]
name = "alice"
identity = "alice.key"
listen = "[::]:443"
{carrier}
[[peer]]
name = "bob"
public_key = "bob.pub"
endpoint = "192.0.2.2:443"
allowed_ips = ["10.90.0.2/32"]
policy = "pqc-only"
{peer}
"""


def opened(folder: Path, *, carrier: str = "", peer: str = "") -> dict[str, object]:
    config = parse_config(TOML.format(carrier=carrier, peer=peer).encode(), folder / "qvpn.toml")
    return dict(launch.open_transports(SiteFiles(config, None, {})))  # type: ignore[arg-type]


def context(folder: Path) -> TransportContext:
    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data)

    def never(seconds: float, callback: Callable[[], None]) -> object:
        raise AssertionError("no timer is wanted before a datagram is")

    read = Path.read_bytes
    return TransportContext(folder, folder, read, read, write, lambda: 0.0, never, None)  # type: ignore[arg-type]


def test_udp_and_quic_are_installed_and_others_are_named_as_missing() -> None:
    assert {"quic", "udp"} <= set(registry.available())
    assert registry.factory("udp") is Udp and registry.factory("quic") is Quic
    with pytest.raises(BadTransport, match="unknown transport 'pigeon'; installed are: quic, udp"):
        registry.factory("pigeon")


def test_only_what_a_peer_uses_is_opened(tmp_path: Path) -> None:
    assert list(opened(tmp_path)) == ["udp"]
    assert list(opened(tmp_path, peer='transport = ["udp", "quic"]')) == ["udp", "quic"]


@pytest.mark.parametrize(
    ("carrier", "peer", "sentence"),
    [
        ("", 'transport = "pigeon"', '[[peer]] "bob" transport: unknown transport'),
        ("", 'transport = "quic"\ncarriers.quic.pin = "12"', '[[peer]] "bob" pin: write the SHA-256'),
        ("[carrier.quic]\nalpn = []", 'transport = "quic"', "[carrier.quic] alpn: write one or more"),
        ('[carrier.quic]\ncertificate = "c"', 'transport = "quic"', "[carrier.quic] private_key: certificate and"),
        ("[carrier.quic]", "", "[carrier.quic]: no peer uses this transport"),
        ("[carrier.udp]\nmtu = 3", "", "[carrier.udp] mtu: this transport has no settings"),
        (
            '[carrier.quic]\ncertificate = "no.pem"\nprivate_key = "k.pem"',
            'transport = "quic"',
            "no.pem: does not exist",
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_its_table(tmp_path: Path, carrier: str, peer: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as found:
        opened(tmp_path, carrier=carrier, peer=peer)
    assert sentence in str(found.value) and "\n" not in str(found.value)


def test_lanes_and_quic_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='needs transport = "udp"'):
        opened(tmp_path, carrier="[tunnel]\nlanes = 2", peer='transport = ["udp", "quic"]')


def test_an_endpoint_of_a_carrier_must_not_lie_in_the_tunnel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the tunnel would have to carry its own traffic"):
        opened(tmp_path, peer='transport = "quic"\ncarriers.quic.endpoint = "10.90.0.2:443"')


def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    pem = certificate.to_pem(certificate.self_made("gw.example"))
    for name in ("c.pem", "k.pem"):
        (tmp_path / name).write_bytes(pem)
    (tmp_path / "k.pem").chmod(0o644)
    table = '[carrier.quic]\ncertificate = "c.pem"\nprivate_key = "k.pem"'
    with pytest.raises(ConfigError, match=r"private_key: .*chmod 600"):
        opened(tmp_path, carrier=table, peer='transport = "quic"')
    (tmp_path / "k.pem").chmod(0o600)
    quic = opened(tmp_path, carrier=table, peer='transport = "quic"')["quic"]
    assert isinstance(quic, Quic) and len(quic.fingerprint or "") == 64


def test_a_self_made_certificate_stays_the_same_over_restarts(tmp_path: Path) -> None:
    lower = MemoryNetwork().bind(Address(ipaddress.ip_address("192.0.2.1"), 443))
    first, second = Quic({}, context(tmp_path)), Quic({}, context(tmp_path))
    assert first.fingerprint is None
    first.over(lower)
    second.over(lower)
    assert first.fingerprint == second.fingerprint is not None
    (tmp_path / OWN).write_bytes(os.urandom(100))
    with pytest.raises(BadTransport, match=r"quic.pem holds no certificate in PEM; remove it"):
        Quic({}, context(tmp_path)).over(lower)


def test_a_certificate_that_an_acme_client_renews_is_shown_without_a_restart(tmp_path: Path) -> None:
    now, said = [0.0], []

    class Log:
        def info(self, event: str, **more: object) -> None:
            said.append((event, more))

        warning = info

    def put(name: str, pem: bytes) -> None:
        (tmp_path / "new").write_bytes(pem)  # as these clients do: another file takes the name
        (tmp_path / "new").rename(tmp_path / name)

    old, new = (certificate.self_made("gw.example") for _ in range(2))
    for name in ("c.pem", "k.pem"):
        put(name, certificate.to_pem(old))

    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(str(error)) from None

    made = replace(context(tmp_path), read_file=read, clock=lambda: now[0], log=Log())
    quic = Quic({"certificate": "c.pem", "private_key": "k.pem"}, made)
    assert quic._shown().leaf == old.leaf
    put("c.pem", certificate.to_pem(new))
    assert quic._shown().leaf == old.leaf and not said  # looked at once a minute
    now[0] += LOOK
    assert quic._shown().leaf == old.leaf
    assert "cannot be used" in said[-1][0] and "k.pem is not the key" in str(said[-1][1]["reason"])
    put("k.pem", certificate.to_pem(new))
    now[0] += LOOK
    assert quic._shown().leaf == new.leaf and quic.fingerprint == certificate.fingerprint(new.leaf).hex()
    (tmp_path / "c.pem").unlink()
    now[0] += LOOK
    assert quic._shown().leaf == new.leaf and len(said) == 3
