"""OpenVPN 2.6 between two points: TLS for its keys, AES-256-GCM for its packets, UDP, no kernel module.

Both ends have a self-signed certificate and know the other's fingerprint, so no authority is needed.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from qvpn.bench.errors import BenchError
from qvpn.bench.install import find, need, package_version
from qvpn.bench.link import ENDS, OUTER, LinkKind
from qvpn.bench.peers.base import INNER, PORT, Pair, Running, wait_until
from qvpn.demo.lab import Lab
from qvpn.demo.process import Process

_DONE = "Initialization Sequence Completed"


class OpenVpn:
    """Over UDP, or over TCP as it is used where nothing else passes."""

    cipher = "AES-256-GCM"

    def __init__(self, name: str = "openvpn", *, tcp: bool = False) -> None:
        self.name = name
        self._tcp = tcp

    def version(self) -> str:
        found = find("openvpn")
        return "" if found is None else package_version("openvpn", found)

    def absent(self) -> str | None:
        return None if find("openvpn") else "openvpn not installed"

    def start(self, lab: Lab, kind: LinkKind) -> Running:
        prints = {name: _identity(lab.site_folder(name), name) for name in ENDS}
        processes = [self._start_end(lab, name, prints) for name in ENDS]
        for process in processes:
            _wait_done(process)
        return Pair(processes)

    def _start_end(self, lab: Lab, name: str, prints: dict[str, str]) -> Process:
        folder = lab.site_folder(name)
        (folder / "openvpn.conf").write_text(config(name, prints, tcp=self._tcp))
        command = [need("openvpn"), "--cd", str(folder), "--config", "openvpn.conf"]
        return lab[name].start("openvpn", command)


def _wait_done(process: Process) -> None:
    """Until it runs; a negotiated cipher other than the table's would be no result."""
    wait_until(f"{process.name} says {_DONE!r}", lambda: _DONE in process.out.read_text(), process)
    if "cipher 'AES-256-GCM'" not in process.out.read_text():
        raise BenchError(f"{process.name} did not choose AES-256-GCM{process.last_words()}")


def config(name: str, prints: dict[str, str], *, tcp: bool = False) -> str:
    """One end's configuration; ``prints`` are the certificates' SHA-256 fingerprints."""
    other = next(each for each in prints if each != name)
    lines = [
        "dev tun-ovpn",
        "dev-type tun",
        f"proto {_protocol(name, tcp)}",
        f"local {OUTER[name]}",
        f"remote {OUTER[other]}",
        f"port {PORT}",
        f"ifconfig {INNER[name]} {INNER[other]}",
        "tls-server" if name == ENDS[0] else "tls-client",
        "dh none",
        "cert end.crt",
        "key end.key",
        f"peer-fingerprint {prints[other]}",
        "data-ciphers AES-256-GCM",
        "cipher AES-256-GCM",
        "disable-dco",
        "verb 4",
    ]
    return "\n".join(lines) + "\n"


def _protocol(name: str, tcp: bool) -> str:
    if not tcp:
        return "udp4"
    return "tcp4-server" if name == ENDS[0] else "tcp4-client"


def _identity(folder: Path, name: str) -> str:
    """A key and its certificate for one run; returns the certificate's fingerprint."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "end.key").write_bytes(pem)
    (folder / "end.key").chmod(0o600)
    (folder / "end.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()
