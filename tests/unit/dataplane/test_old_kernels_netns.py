"""Sites on kernels of any age: what one lacks it finds out by itself, and both still understand each other.

The kernel here is a new one whose calls refuse what an old one does not know (``netns_site``, KERNEL).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvpn.netio.tun import OFFLOADS
from tests.unit.dataplane.support import FROM_BOB
from tests.unit.dataplane.test_plane_netns import _transfer, tunnel

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="/dev/net/tun is missing"),
]

EVERYTHING = "no-offload,no-gso,no-gro"

UDP_SINK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
    sink.bind((sys.argv[1], 7001))
    sink.settimeout(20)
    print("listening", flush=True)
    seen = [sink.recv(2000) for _ in range(40)]
print(all(data == bytes([n]) * 1000 for n, data in enumerate(seen)))
"""

UDP_SOURCE = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
    source.setsockopt(socket.IPPROTO_UDP, 103, 1000)
    source.sendto(b"".join(bytes([n]) * 1000 for n in range(40)), (sys.argv[1], 7001))
"""


@pytest.mark.parametrize(
    "kernels",
    [(EVERYTHING, ""), ("", EVERYTHING), (EVERYTHING, EVERYTHING), ("no-gso", "no-gro"), ("no-uso", "no-offload")],
    ids=lambda pair: " to ".join(each or "new" for each in pair),
)
def test_a_transfer_between_kernels_of_different_age(kernels: tuple[str, str]) -> None:
    with tunnel(4, kernels) as (namespaces, alice, bob):
        for site, kernel in zip((alice, bob), kernels, strict=True):
            wanted = OFFLOADS[3 if "no-offload" in kernel else 1 if "no-uso" in kernel else 0]
            assert site.stats()["offloads"] == wanted
        for version in (4, 6):
            sent, received = _transfer(namespaces, FROM_BOB[version])
            assert sent == received
        for site in (alice, bob):
            facts = site.stats()
            assert facts["drops"] == facts["tun_errors"] == facts["bind_errors"] == {}, facts


@pytest.mark.parametrize("kernels", [("", "no-uso"), ("", ""), ("no-uso", "")], ids=["to old", "new", "from old"])
def test_a_udp_superpacket_reaches_a_kernel_that_knows_none(kernels: tuple[str, str]) -> None:
    with tunnel(4, kernels) as (namespaces, _alice, bob):
        sink = namespaces.popen(namespaces.right, sys.executable, "-c", UDP_SINK, FROM_BOB[4])
        try:
            assert sink.stdout is not None
            assert sink.stdout.readline() == "listening\n"
            source = ["ip", "netns", "exec", namespaces.left, sys.executable, "-c", UDP_SOURCE, FROM_BOB[4]]
            subprocess.run(source, check=True, capture_output=True, timeout=30)
            assert sink.communicate(timeout=30)[0] == "True\n"
        finally:
            sink.kill()
            sink.communicate(timeout=10)
        assert bob.stats()["tun_errors"] == {}
