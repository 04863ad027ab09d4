"""The packet path over a real TUN and real UDP sockets, in two network namespaces joined by a veth pair."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvpn.tunnel.drops import DropReason
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB

ROOT = Path(__file__).parents[3]
LONG = os.environ.get("QVPN_TEST_LONG") == "1"
TRANSFER = (64 if LONG else 12) << 20

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="/dev/net/tun is missing"),
]

OUTER = {
    4: ("192.0.2.1", "192.0.2.2", "0.0.0.0:51840"),
    6: ("fd00:2::1", "fd00:2::2", "[::]:51840"),
}

SENDER = """
import hashlib, os, socket, sys
host, size = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
digest = hashlib.sha256()
with socket.create_connection((host, 7000), timeout=10) as stream:
    stream.settimeout(60)
    while size > 0:
        data = os.urandom(min(size, 1 << 18))
        digest.update(data)
        stream.sendall(data)
        size -= len(data)
    stream.shutdown(socket.SHUT_WR)
    stream.recv(1)
print(digest.hexdigest())
"""

RECEIVER = """
import hashlib, socket, sys
host = sys.argv[1]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
digest = hashlib.sha256()
with socket.create_server((host, 7000), family=family) as listener:
    listener.settimeout(60)
    print("listening", flush=True)
    stream, _ = listener.accept()
    stream.settimeout(60)
    while data := stream.recv(1 << 18):
        digest.update(data)
    stream.close()
print(digest.hexdigest())
"""


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


class Namespaces:
    """Two namespaces and the veth pair between them."""

    def __init__(self) -> None:
        self.left, self.right = f"qvpnt{os.getpid()}l", f"qvpnt{os.getpid()}r"

    def __enter__(self) -> Namespaces:
        for name in (self.left, self.right):
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", "out", "netns", self.left, "type", "veth", "peer", "out", "netns", self.right)
        for side, name in enumerate((self.left, self.right)):
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "addr", "add", f"{OUTER[4][side]}/24", "dev", "out")
            _run("ip", "-n", name, "addr", "add", f"{OUTER[6][side]}/64", "dev", "out", "nodad")
            _run("ip", "-n", name, "link", "set", "out", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in (self.left, self.right):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)

    def popen(self, name: str, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )


class Process:
    """One site as a child."""

    def __init__(self, namespaces: Namespaces, name: str, *arguments: str) -> None:
        self.process = namespaces.popen(
            name, sys.executable, "-W", "error", "-m", "tests.unit.dataplane.netns_site", *arguments
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def command(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def stats(self) -> dict[str, Any]:
        """Without what queues dropped because this machine was busy with other things: TCP sends that again."""
        self.command("stats")
        answer: dict[str, Any] = json.loads(self.read())
        for reason in (DropReason.RECEIVE_QUEUE, DropReason.SEND_QUEUE):
            answer["drops"].pop(reason, None)
        return answer

    def stop(self) -> None:
        self.process.communicate(timeout=20)
        assert self.process.returncode == 0


@contextlib.contextmanager
def tunnel(version: int, kernels: tuple[str, str] = ("", "")) -> Iterator[tuple[Namespaces, Process, Process]]:
    left, right, listen = OUTER[version]
    ends = [f"[{ip}]:51840" if version == 6 else f"{ip}:51840" for ip in (left, right)]
    with Namespaces() as namespaces:
        alice = Process(namespaces, namespaces.left, "alice", listen, ends[1], kernels[0])
        bob = Process(namespaces, namespaces.right, "bob", listen, ends[0], kernels[1])
        try:
            assert alice.read() == bob.read() == f"ready {1500 - (28 if version == 4 else 48) - 42}\n"
            _epoch(alice, bob, 1)
            yield namespaces, alice, bob
            alice.stop()
            bob.stop()
        finally:
            for site in (alice, bob):
                site.process.kill()
                site.process.wait(10)
                for stream in (site.process.stdin, site.process.stdout):
                    assert stream is not None
                    stream.close()


def _epoch(alice: Process, bob: Process, number: int) -> None:
    """Install at the responder first, as the handshake does, and confirm in both directions."""
    bob.command(f"epoch {number}")
    bob.stats()
    alice.command(f"epoch {number}")
    alice.command("control")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if any(epoch[0] == number and epoch[1] == "current" for epoch in bob.stats()["epochs"]):  # type: ignore[attr-defined]
            return
        time.sleep(0.01)
    pytest.fail(f"epoch {number} was never confirmed")


def _transfer(namespaces: Namespaces, host: str) -> tuple[str, str]:
    """TCP from left to right through the tunnel; the hashes at both ends."""
    receiver = namespaces.popen(namespaces.right, sys.executable, "-c", RECEIVER, host)
    try:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "listening\n"
        sender = ["ip", "netns", "exec", namespaces.left, sys.executable, "-c", SENDER, host, str(TRANSFER)]
        sent = subprocess.run(sender, check=True, capture_output=True, text=True, timeout=100).stdout
        received, _ = receiver.communicate(timeout=60)
    finally:
        receiver.kill()
        receiver.wait(10)
    return sent, received


@pytest.mark.parametrize("outer", [4, 6])
def test_ping_and_tcp_inside_both_families(outer: int) -> None:
    with tunnel(outer) as (namespaces, alice, bob):
        for inner in (4, 6):
            target = FROM_BOB[inner]
            _run("ip", "netns", "exec", namespaces.left, "ping", "-c", "3", "-i", "0.05", "-W", "5", target)
            full = str(int(alice.stats()["mtu"]) - (28 if inner == 4 else 48))  # type: ignore[call-overload]
            ping = ("ping", "-c", "2", "-i", "0.05", "-W", "5", "-M", "do", "-s", full, target)
            _run("ip", "netns", "exec", namespaces.left, *ping)
            sent, received = _transfer(namespaces, target)
            assert sent == received
            assert len(sent) == 2 * hashlib.sha256().digest_size + 1
        for site in (alice, bob):
            facts = site.stats()
            assert facts["drops"] == {}, facts
            assert facts["tun_errors"] == {}
            assert facts["descriptors"] == 2


LINKS = {
    "no checksum and segmentation offload, GRO on": ("tx", "off", "gro", "on"),
    "no UDP segmentation in the device": ("tx-udp-segmentation", "off"),
    "no offload at all": ("tx", "off", "sg", "off", "tso", "off", "gso", "off", "gro", "off"),
}


@pytest.mark.skipif(shutil.which("ethtool") is None, reason="ethtool is missing")
@pytest.mark.parametrize("link", LINKS)
def test_a_transfer_over_links_with_fewer_offloads(link: str) -> None:
    with tunnel(4) as (namespaces, alice, bob):
        for name in (namespaces.left, namespaces.right):
            _run("ip", "netns", "exec", name, "ethtool", "-K", "out", *LINKS[link])
        sent, received = _transfer(namespaces, FROM_BOB[4])
        assert sent == received
        for site in (alice, bob):
            facts = site.stats()
            assert facts["drops"] == facts["tun_errors"] == facts["bind_errors"] == {}, facts


@pytest.mark.skipif(
    shutil.which("nft") is None or shutil.which("ethtool") is None, reason="nft or ethtool is missing"
)
@pytest.mark.parametrize("single", [False, True], ids=["whole batches lost", "single datagrams lost"])
def test_a_transfer_over_a_lossy_link(single: bool) -> None:
    """0.5 % of what arrives is dropped before the socket: TCP repairs it, and nothing wrong comes through."""
    rules = (
        "table inet lossy { chain in { type filter hook input priority 0; "
        'iifname "out" udp dport 51840 numgen random mod 1000 < 5 counter drop; }; }'
    )
    with tunnel(4) as (namespaces, alice, bob):
        if single:
            _run("ip", "netns", "exec", namespaces.left, "ethtool", "-K", "out", "tx-udp-segmentation", "off")
        _run("ip", "netns", "exec", namespaces.right, "nft", rules)
        sent, received = _transfer(namespaces, FROM_BOB[4])
        assert sent == received
        dropped = _run("ip", "netns", "exec", namespaces.right, "nft", "list", "table", "inet", "lossy")
        if single:
            assert "packets 0" not in dropped
        assert alice.stats()["drops"] == bob.stats()["drops"] == {}


def test_epochs_change_under_load_without_a_lost_packet() -> None:
    """Ten changes of epoch while UDP packets are counted at both ends."""
    with tunnel(4) as (namespaces, alice, bob):
        ping = namespaces.popen(namespaces.left, "ping", "-q", "-c", "2000", "-i", "0.002", "-W", "5", FROM_BOB[4])
        waiter = threading.Thread(target=ping.wait)
        waiter.start()
        number = 1
        while waiter.is_alive() and number < 11:
            number += 1
            _epoch(alice, bob, number)
            time.sleep(0.2)
        output, _ = ping.communicate(timeout=60)
        waiter.join()
        assert number == 11
        assert "2000 packets transmitted, 2000 received" in output
        assert alice.stats()["drops"] == bob.stats()["drops"] == {}


def test_a_wrong_source_inside_is_dropped_at_the_receiver() -> None:
    with tunnel(4) as (namespaces, _alice, bob):
        _run("ip", "-n", namespaces.left, "addr", "add", "10.90.0.99/32", "dev", "qvpntest0")
        ping = ["ip", "netns", "exec", namespaces.left, "ping", "-c", "2", "-i", "0.1", "-W", "1"]
        result = subprocess.run([*ping, "-I", "10.90.0.99", FROM_BOB[4]], capture_output=True, timeout=30)
        assert result.returncode == 1
        assert bob.stats()["drops"] == {"wrong_source": 2}
        _run("ip", "netns", "exec", namespaces.left, "ping", "-c", "1", "-I", FROM_ALICE[4], FROM_BOB[4])
