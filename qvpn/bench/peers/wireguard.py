"""wireguard-go: WireGuard in userspace, with segmentation offload on TUN and UDP where its version has it."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from qvpn.bench import link
from qvpn.bench.install import find, need, package_version
from qvpn.bench.link import ENDS, OUTER, LinkKind
from qvpn.bench.peers.base import INNER, PORT, Pair, Running, wait_until
from qvpn.demo.lab import Lab
from qvpn.demo.process import Process

OVERHEAD = 80
"""Outer IPv6 header, UDP and WireGuard's own: what wg-quick takes off the path's MTU."""
_SOCKETS = Path("/var/run/wireguard")


class WireGuardGo:
    name = "wireguard-go"
    cipher = "ChaCha20-Poly1305"

    def version(self) -> str:
        found = find("wireguard-go")
        return "" if found is None else package_version("wireguard-go", found)

    def absent(self) -> str | None:
        missing = [program for program in ("wireguard-go", "wg") if find(program) is None]
        return f"{' and '.join(missing)} not installed" if missing else None

    def start(self, lab: Lab, kind: LinkKind) -> Running:
        keys = {name: X25519PrivateKey.generate() for name in ENDS}
        processes = [self._start_end(lab, name, keys, kind) for name in ENDS]
        return Pair(processes)

    def _start_end(self, lab: Lab, name: str, keys: dict[str, X25519PrivateKey], kind: LinkKind) -> Process:
        """The device's name differs at both ends, for the control sockets lie in one folder."""
        device = f"wg-{name}"
        control = _SOCKETS / f"{device}.sock"
        control.unlink(missing_ok=True)  # of an earlier round, which was killed
        process = lab[name].start("wireguard-go", [need("wireguard-go"), "-f", device])
        wait_until(f"{control} exists", control.exists, process)
        file = lab.site_folder(name) / "wg.conf"
        file.write_text(config(name, keys))
        lab[name].run([need("wg"), "setconf", device, str(file)])
        link.configure_device(lab, name, device, INNER[name], kind.mtu - OVERHEAD)
        return process


def config(name: str, keys: dict[str, X25519PrivateKey]) -> str:
    """One end's configuration in the format of ``wg setconf``."""
    other = next(each for each in keys if each != name)
    secret = b64encode(keys[name].private_bytes_raw()).decode()
    public = b64encode(keys[other].public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
    return (
        f"[Interface]\nPrivateKey = {secret}\nListenPort = {PORT}\n\n"
        f"[Peer]\nPublicKey = {public}\nAllowedIPs = {INNER[other]}/32\nEndpoint = {OUTER[other]}:{PORT}\n"
    )
