"""What one superpacket and one small packet may cost, as exact numbers of calls: the guard that no clock can upset.

Real ``TunDevice`` and ``UdpBind`` code over counted system calls.  The TUN's descriptor is one half of a pair of
datagram sockets; the UDP sockets are real, on loopback, where UDP_SEGMENT and UDP_GRO work.  Wall-clock figures are
the benchmark's.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qvpn.dataplane import chunks, merge, outbound, views
from qvpn.dataplane.plane import QUIET, Plane
from qvpn.netio import tun as tun_module
from qvpn.netio.base import Address
from qvpn.netio.tun import TunDevice
from qvpn.netio.udp import UdpBind
from qvpn.tunnel.allowedips import AllowedIPs
from tests.unit.dataplane.segments import UDP, Big, finish
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, Recorder, epoch_pair, networks

PAYLOAD = 1378
CHUNKS = 46
LOOPBACK = ipaddress.ip_address("127.0.0.1")


def superpacket(number: int) -> bytes:
    """What a TCP connection with timestamps fills a TUN of MTU 1430 with: 46 chunks, a datagram of 1472 each."""
    payload = bytes([number & 255]) * (PAYLOAD * CHUNKS - 5)
    return Big(FROM_ALICE[4], FROM_BOB[4], payload, PAYLOAD, tcp_options=bytes(12)).virtio()


def small(number: int) -> bytes:
    packet = bytearray(
        Big(FROM_ALICE[4], FROM_BOB[4], bytes([number & 255]) * 64, 64, protocol=UDP, identification=number).virtio()
    )
    packet[1] = 0
    packet[2:6] = bytes(4)
    return bytes(packet)


class PairTun(TunDevice):
    """The real reads and writes on half of a socket pair."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._errors: Counter[str] = Counter()
        self._name = "pair0"
        self.gone = False
        self.offloads = tun_module.OFFLOADS[0]

    @property
    def mtu(self) -> int:
        return 1430


class CountedSocket:
    """A UDP socket whose system calls are counted."""

    def __init__(self, counts: Counter[str], family: int) -> None:
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._counts = counts
        self.on = True

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._socket, name)
        if name not in ("send", "sendto", "setsockopt", "getsockopt", "recvmsg_into"):
            return found

        def counted(*arguments: Any) -> Any:
            self._counts[name] += 1
            return found(*arguments)

        return counted


class Side:
    """One site: its plane, and the kernel's end of its TUN."""

    def __init__(self, peer: str, prefixes: dict[int, str], counts: Counter[str]) -> None:
        self.peer = peer
        self.counts = counts
        self._pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in self._pair:
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.kernel = self._pair[0]
        self.tun = PairTun(self._pair[1].fileno())
        self.bind = UdpBind(Address(LOOPBACK, 0), factory=lambda family: CountedSocket(counts, family))  # type: ignore[arg-type,return-value]
        self.bind.max_payload = lambda address: 1472  # type: ignore[method-assign]
        self.plane = Plane(self.tun, self.bind, lambda: 1.0, Recorder())
        self.plane.add_peer(peer, networks(prefixes), overlap=9.0)

    def taken(self) -> list[bytes]:
        got = []
        while True:
            try:
                got.append(self.kernel.recv(1 << 17))
            except BlockingIOError:
                return got

    def close(self) -> None:
        self.plane.close()
        self.bind.close()
        for end in self._pair:
            end.close()


class Sites:
    """Alice and Bob on loopback; nothing runs by itself."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.alice = Side("bob", FROM_BOB, self.counts)
        self.bob = Side("alice", FROM_ALICE, self.counts)
        self.alice.plane.set_endpoint("bob", self.bob.bind.local)
        self.bob.plane.set_endpoint("alice", self.alice.bind.local)
        initiator, responder = epoch_pair()
        self.bob.plane.install("alice", responder)
        self.alice.plane.install("bob", initiator)

    def carry(self, packets: list[bytes]) -> list[bytes]:
        """From Alice's kernel to Bob's, each step once, as the event loop would."""
        for packet in packets:
            self.alice.kernel.send(packet)
        self.alice.plane._on_tun()
        self.bob.plane._on_network(self.bob.bind.filenos()[-1])
        return self.bob.taken()


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sites]:
    made = Sites()
    counts = made.counts

    def count(module: Any, name: str, label: str) -> None:
        found = getattr(module, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[label] += 1
            return found(*arguments, **named)

        monkeypatch.setattr(module, name, counted)

    count(os, "readv", "read")
    count(os, "write", "write")
    for _, epoch in [
        *made.alice.plane._table.by_index.values(),
        *made.bob.plane._table.by_index.values(),
    ]:
        count(epoch.sealer, "encrypt", "encrypt")
        count(epoch.opener, "decrypt", "decrypt")
    count(AllowedIPs, "lookup", "lookup")
    for module in (chunks, merge, outbound, views):
        monkeypatch.setattr(module, "np", CountedNumpy(counts))
    yield made
    made.alice.close()
    made.bob.close()


class CountedNumpy:
    """The module, with the arrays it makes counted."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        if name == "ndarray":
            self._counts["ndarray"] += 1
        return getattr(np, name)


def test_a_superpacket_costs_two_sends_one_read_one_write_and_one_aead_call_a_chunk(sites: Sites) -> None:
    warm = [superpacket(0), superpacket(1)]
    assert sites.carry(warm) == warm
    sites.counts.clear()
    packets = [superpacket(n) for n in range(2, 6)]
    assert sites.carry(packets) == packets
    count, counts = len(packets), dict(sites.counts)
    assert counts == {
        "read": count + 1,  # the last finds nothing more
        "encrypt": count * CHUNKS,
        "send": count * 2,  # 46 datagrams of 1472 bytes are more than 65,507
        "recvmsg_into": count * 2 + 1,
        "decrypt": count * CHUNKS,
        "write": count,
        "lookup": count * 2,  # where it goes, and whether it may come from there
    }
    traffic = sites.bob.plane.stats("alice")
    assert traffic.opened == traffic.marked == (count + 2) * CHUNKS
    assert traffic.source_checks == traffic.tun_writes == count + 2


def test_the_segment_size_is_set_when_it_changes_and_not_again(sites: Sites) -> None:
    sites.carry([superpacket(0)])
    sites.counts.clear()
    sites.carry([superpacket(n) for n in range(3)])
    assert sites.counts["setsockopt"] == 0
    other = Big(FROM_ALICE[4], FROM_BOB[4], bytes(10_000), 1000).virtio()
    sites.carry([other, other])
    assert sites.counts["setsockopt"] == 1


def test_small_packets_are_packed_and_written_together(sites: Sites) -> None:
    """60 packets of 102 bytes with virtio header are 14 to a record: 5 records, 2 sends, 1 write."""
    warm = [small(n) for n in range(60)]
    assert [packet for each in sites.carry(warm) for packet in finish(each)] == [finish(each)[0] for each in warm]
    sites.counts.clear()
    packets = [small(n) for n in range(60, 120)]
    written = sites.carry(packets)
    assert [packet for each in written for packet in finish(each)] == [finish(each)[0] for each in packets]
    assert sites.counts["read"] == 60 + 1
    assert sites.counts["encrypt"] == sites.counts["decrypt"] == 5
    assert sites.counts["send"] == 1
    assert sites.counts["setsockopt"] <= 1
    assert sites.counts["recvmsg_into"] <= 2 + 1
    assert sites.counts["write"] == len(written) == 1
    assert sites.counts["lookup"] <= 1 + 5
    assert sites.counts["ndarray"] <= 2 + 5 * 7


def test_a_lone_packet_after_a_pause_is_not_looked_behind(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven system calls and look-ups for one packet through both sites; what comes with it is not left behind."""
    sites.carry([small(0)])
    now = 1.0
    for plane in (sites.alice.plane, sites.bob.plane):
        monkeypatch.setattr(plane, "_pause", QUIET)
        monkeypatch.setattr(plane, "_clock", lambda: now)
    now += 1.0
    sites.counts.clear()
    assert sites.carry([small(1)]) == [small(1)]
    once = ("read", "encrypt", "send", "recvmsg_into", "decrypt", "write")
    assert dict(sites.counts) == dict.fromkeys(once, 1) | {"lookup": 2}
    now += 1.0
    written = sites.carry([small(number) for number in range(2, 30)])
    while more := sites.carry([]):
        written += more
    assert [packet for each in written for packet in finish(each)] == [finish(small(n))[0] for n in range(2, 30)]
    now += 1.0
    sites.counts.clear()
    big = superpacket(1)
    assert sites.carry([big]) == [big]
    assert (sites.counts["read"], sites.counts["recvmsg_into"]) == (1, 2)  # two receives are one superpacket


@pytest.mark.parametrize("peers", [1, 10, 100])
def test_calls_do_not_grow_with_the_number_of_peers(sites: Sites, peers: int) -> None:
    """Other peers with endpoints have sockets of their own, which nobody asks while they are not readable."""
    for number in range(peers - 1):
        for side in (sites.alice, sites.bob):
            name = f"other{number}"
            side.plane.add_peer(name, [ipaddress.ip_network(f"10.91.{number}.0/24")], overlap=9.0)
            side.plane.set_endpoint(name, Address(LOOPBACK, 20_000 + number))
    own = sites.bob.bind._connected[sites.alice.bind.local].socket.fileno()
    sites.carry([superpacket(0)])
    sites.bob.plane._on_network(own)
    sites.bob.taken()
    sites.counts.clear()
    for packet in (superpacket(1), superpacket(2)):
        sites.alice.kernel.send(packet)
    sites.alice.plane._on_tun()
    sites.bob.plane._on_network(own)
    assert len(sites.bob.taken()) == 2
    assert sites.counts["recvmsg_into"] == 2 * 2 + 1
    assert sites.counts["send"] == 2 * 2
    assert sites.counts["lookup"] == 2 * 2


class CountingDict(dict[int, Any]):
    """Counts how often it is asked."""

    asked = 0

    def get(self, key: int, default: Any = None) -> Any:
        CountingDict.asked += 1
        return super().get(key, default)


@pytest.mark.parametrize("prefixes", [1, 1_000, 10_000])
def test_a_look_up_does_not_grow_with_the_number_of_prefixes(prefixes: int) -> None:
    """At most one question a distinct prefix length for a new address, none for one seen lately."""
    table: AllowedIPs[str] = AllowedIPs()
    nets = [ipaddress.ip_network((0x0B00_0000 + (number << 8), 24)) for number in range(prefixes)]
    table.add("many", nets)
    table.add("wide", [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("10.0.0.0/8")])
    inner = table._tables[4]
    inner._by_length = {length: CountingDict(owners) for length, owners in inner._by_length.items()}
    CountingDict.asked = 0
    for number in range(100):
        address = (0x0B00_0000 + ((number * 97 % prefixes) << 8) + number).to_bytes(4, "big")
        assert table.lookup(address) == "many"
        assert table.lookup((0x0C80_0000 + number).to_bytes(4, "big")) == "wide"
    assert CountingDict.asked <= 100 * 1 + 100 * 3
    before = CountingDict.asked
    for number in range(100):
        assert table.lookup((0x0C80_0000 + number).to_bytes(4, "big")) == "wide"
    assert CountingDict.asked == before
