"""tinc 1.0 in router mode; AES-256-CBC with SHA-256, since this version has no authenticated cipher."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from qvpn.bench import link, tools
from qvpn.bench.install import find, need, package_version
from qvpn.bench.link import ENDS, OUTER, LinkKind
from qvpn.bench.peers.base import INNER, PORT, Pair, Running, wait_until
from qvpn.demo.lab import Lab
from qvpn.demo.process import Process

_DEVICE = "tinc1"
_BITS = 2048
_PATIENCE = 40.0
_SEGMENT = 1400
"""More than the bytes of TCP that fit one packet through tinc."""
_MOSTLY = 0.97


class Tinc:
    name = "tinc"
    cipher = "AES-256-CBC + SHA-256"

    def version(self) -> str:
        found = find("tincd")
        return "" if found is None else package_version("tinc", found)

    def absent(self) -> str | None:
        return None if find("tincd") else "tincd not installed"

    def start(self, lab: Lab, kind: LinkKind) -> Running:
        keys = {name: rsa.generate_private_key(public_exponent=65537, key_size=_BITS) for name in ENDS}
        processes = []
        for name in ENDS:
            write(lab.site_folder(name), name, keys)
            processes.append(self._start_end(lab, name, kind))
        _settle(lab)
        return Pair(processes)

    def _start_end(self, lab: Lab, name: str, kind: LinkKind) -> Process:
        folder = lab.site_folder(name)
        files = [f"--config={folder}", f"--pidfile={folder / 'tincd.pid'}"]
        process = lab[name].start("tincd", [need("tincd"), "-D", *files])
        wait_until(f"{name} has {_DEVICE}", lambda: link.has_device(lab, name, _DEVICE), process)
        link.configure_device(lab, name, _DEVICE, INNER[name], kind.mtu)
        return process


def _settle(lab: Lab) -> None:
    """Wait until TCP's segments leave as UDP datagrams: before it has probed the path, tinc carries what is longer
    than it knows to fit over a TCP connection of its own, which is not what is compared.
    """
    address = INNER[ENDS[1]]
    wait_until("tinc answers a ping", lambda: tools.answers(lab, address))
    iperf = tools.Iperf(lab, address)
    wait_until("tinc sends over UDP", lambda: _share_over_udp(lab, iperf) > _MOSTLY, within=_PATIENCE)
    iperf.stop()


def _share_over_udp(lab: Lab, iperf: tools.Iperf) -> float:
    before = link.udp_sent(lab, ENDS[0])
    got = iperf.run(seconds=1, streams=1)
    return (link.udp_sent(lab, ENDS[0]) - before) * _SEGMENT / got.bytes


def write(folder: Path, name: str, keys: dict[str, rsa.RSAPrivateKey]) -> None:
    """One end's folder: ``tinc.conf``, its key, and a file per host."""
    other = next(each for each in keys if each != name)
    settings = [
        f"Name = {name}",
        "AddressFamily = ipv4",
        f"ConnectTo = {other}",
        "DeviceType = tun",
        f"Interface = {_DEVICE}",
        "Mode = router",
    ]
    (folder / "tinc.conf").write_text("\n".join(settings) + "\n")
    pem = keys[name].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (folder / "rsa_key.priv").write_bytes(pem)
    (folder / "rsa_key.priv").chmod(0o600)
    (folder / "hosts").mkdir()
    for host, key in keys.items():
        (folder / "hosts" / host).write_text(host_file(host, key.public_key()))


def host_file(name: str, key: rsa.RSAPublicKey) -> str:
    """What both ends know of one host."""
    public = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.PKCS1).decode()
    settings = [
        f"Address = {OUTER[name]}",
        f"Port = {PORT}",
        f"Subnet = {INNER[name]}/32",
        "Cipher = aes-256-cbc",
        "Digest = sha256",
    ]
    return "\n".join(settings) + "\n\n" + public
