"""Whatever an authenticated peer writes: the TUN gets nothing that a kernel should not get.

The oracle is ``virtio_rules``.  A second target gives what passed to a real TUN whose kernel forwards it through a
device without any offload: every frame must be taken, and no warning of the kernel may come of it.
"""

from __future__ import annotations

import itertools
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from qvpn.netio.base import Received
from tests.fuzz.hostile_peer import Delivery, deliveries, sealed
from tests.fuzz.virtio_rules import objection
from tests.unit.dataplane.segments import Big
from tests.unit.dataplane.support import ALICE, FROM_ALICE, FROM_BOB, Pair, ip_packet, two_in_one

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
SOURCES = {bytes([10, 90, 0, 1]), bytes.fromhex("fd900000000000000000000000000001")}
PAIR = Pair()
KEYS, _ = PAIR.install()
BLOCKS = itertools.count()


def received(delivery: Delivery, seed: int, ecn: int = 0) -> list[bytes]:
    """What reaches the TUN when these records arrive, joined as GRO may join them."""
    chance = random.Random(seed)
    inbound = PAIR.bob.plane._inbound
    PAIR.bob.tun.taken.clear()
    batch: list[bytes] = []
    receives: list[Received] = []
    for record in [*sealed(delivery, KEYS, next(BLOCKS)), None]:
        joins = record and batch and len(batch[-1]) == len(batch[0]) >= len(record) and chance.random() < 0.9
        if batch and not joins:
            data = b"".join(batch)
            receives.append(Received(memoryview(bytearray(data)), len(data), len(batch[0]), ALICE, ecn))
            batch = []
        if record:
            batch.append(record)
    for each in two_in_one(receives, chance):
        inbound.process(each, 0.0)
    inbound.flush()
    return list(PAIR.bob.tun.taken)


def drops() -> int:
    return sum(PAIR.bob.plane.stats("alice").drops.values())


BIG = Big(FROM_ALICE[4], FROM_BOB[4], bytes(3000), 1000)
HEAD = BIG.virtio()[:50]


def corpus(at: int, value: bytes, chunks: int = 3) -> Delivery:
    """Each of them a way to hurt some kernel of the past: see the fix of that name in virtio_net.h."""
    lying = HEAD[:at] + value + HEAD[at + len(value) :]
    return Delivery(tuple((place, lying + bytes(1000)) for place in range(chunks)))


def plain(flags: int, kind: int, packet: bytes, start: int = 20, offset: int = 6) -> Delivery:
    return Delivery(((0, struct.pack("<BBHHHH", flags, kind, 0, 0, start, offset) + packet),))


UDP_BIG = Big(FROM_ALICE[6], FROM_BOB[6], bytes(2000), 1000, protocol=17).virtio()
SHORT = Big(FROM_ALICE[4], FROM_BOB[4], bytes(900), 1000).virtio()
FRAGMENT4 = bytearray(ip_packet(FROM_ALICE[4], FROM_BOB[4], bytes(40), 17))
FRAGMENT4[6] = 0x20
FRAGMENT6 = ip_packet(FROM_ALICE[6], FROM_BOB[6], bytes([17]) + bytes(47), 44)
SHORT_TCP = HEAD[:12] + struct.pack(">H", 24 + 2000) + HEAD[14:42] + b"\x10" + HEAD[43:44]


@settings(max_examples=3000 if LONG else 250, deadline=None)
@given(deliveries, st.integers(0, 2**32), st.sampled_from([0, 0, 1, 3]))
@example(corpus(0, b"\0"), 0, 0)  # segmentation whose checksums nobody finishes
@example(corpus(0, b"\2"), 0, 0)
@example(plain(1, 0, bytes(FRAGMENT4)), 0, 0)  # the checksum of a fragment
@example(plain(1, 0, FRAGMENT6, 48), 0, 0)
@example(
    Delivery(tuple((n, UDP_BIG[:54] + b"\0\1" + UDP_BIG[56:58] + bytes(1000)) for n in (0, 1))), 0, 0
)  # its length
@example(Delivery(tuple((n, SHORT_TCP + bytes(990)) for n in (0, 1))), 0, 0)  # data in the TCP header
@example(Delivery(((0, SHORT),)), 0, 0)  # less than one segment
@example(corpus(4, b"\xff\xff"), 0, 0)  # GSO_BY_FRAGS
@example(corpus(6, b"\xff\xff"), 0, 0)  # the checksum begins far outside
@example(corpus(8, b"\xff\xff"), 0, 0)
@example(corpus(6, b"\0\0"), 0, 0)  # it begins in the IP header
@example(corpus(2, b"\xff\xff"), 0, 0)  # linear part longer than the packet
@example(corpus(1, b"\x05"), 0, 0)  # UDP segmentation of TCP
@example(corpus(1, b"\x04"), 0, 0)  # TCP over IPv6, in IPv4
@example(corpus(1, b"\x80"), 0, 0)  # ECN of nothing
@example(corpus(16, b"\x20\0"), 0, 0)  # a fragment
@example(corpus(42, b"\x10"), 0, 0)  # TCP header of 4 bytes
@example(corpus(43, b"\x02"), 0, 0)  # SYN
@example(corpus(12, b"\xff\xff"), 0, 0)  # longer than it is
@example(Delivery(((63, HEAD + bytes(1000)), (64, HEAD + bytes(1000)))), 0, 0)  # a run across two blocks
def test_nothing_unfit_reaches_the_kernel(delivery: Delivery, seed: int, ecn: int) -> None:
    before = drops()
    taken = received(delivery, seed, ecn)
    for frame in taken:
        assert objection(frame, SOURCES) is None
    assert taken or drops() > before
    event("passed" if taken else "all dropped")


def test_the_oracle_objects_to_what_it_should() -> None:
    """A rule that never speaks would prove nothing."""
    good = BIG.virtio()
    assert objection(good, SOURCES) is None
    spoilt = {
        "unknown flags": (0, b"\3"),
        "segmentation without a checksum": (0, b"\0"),
        "unknown segmentation": (1, b"\3"),
        "segmentation of the other IP version": (1, b"\4"),
        "hdr_len beyond the packet": (2, b"\xff\xff"),
        "segments of no bytes": (4, b"\0\0"),
        "one segment": (4, b"\xff\xff"),
        "checksum does not begin at the transport header": (6, b"\x18\0"),
        "checksum not within the packet behind the IP header": (6, b"\0\0"),
        "checksum field of another protocol": (8, b"\6\0"),
        "IPv4 header length": (10, b"\x44"),
        "IPv4 total length": (12, b"\0\x30"),
        "checksum of a fragment": (16, b"\x20\0"),
        "source is not the peer's": (22, b"\1\2\3\4"),
        "TCP header length": (42, b"\x10"),
        "SYN or RST would be repeated": (43, b"\2"),
        "no IP packet": (10, b"\x55"),
    }
    for reason, (at, value) in spoilt.items():
        assert objection(good[:at] + value + good[at + len(value) :], SOURCES) == reason
    udp = Big(FROM_ALICE[6], FROM_BOB[6], bytes(3000), 40, protocol=17).virtio()
    assert objection(udp, SOURCES) == "too many datagrams"
    assert objection(udp[:54] + b"\0\1" + udp[56:], SOURCES) == "UDP length"


WARNED = 1 << 9
"""Bit of /proc/sys/kernel/tainted: the kernel has warned."""


def tainted() -> int:
    return int(Path("/proc/sys/kernel/tainted").read_text())


class KernelSink:
    """A TUN in a namespace of its own; see ``tun_sink``."""

    def __init__(self) -> None:
        command = ["unshare", "--net", sys.executable, "-m", "tests.fuzz.tun_sink"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.read() == b"ready\n"

    def read(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def give(self, frame: bytes) -> bytes:
        assert self.process.stdin is not None
        self.process.stdin.write(struct.pack(">I", len(frame)) + frame)
        self.process.stdin.flush()
        return self.read()

    def end(self) -> bytes:
        out, _ = self.process.communicate(timeout=20)
        return out


@pytest.fixture(scope="module")
def sink() -> Iterator[KernelSink]:
    made = KernelSink()
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.communicate(timeout=20)


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="a TUN needs root")
@settings(
    max_examples=2000 if LONG else 150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(delivery=deliveries, seed=st.integers(0, 2**32))
def test_the_real_kernel_takes_what_passed_and_comes_to_no_harm(
    sink: KernelSink, delivery: Delivery, seed: int
) -> None:
    before = tainted() & WARNED
    for frame in received(delivery, seed):
        assert sink.give(frame) == b"taken\n", frame[:120].hex()
    assert tainted() & WARNED == before


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="a TUN needs root")
def test_honest_packets_were_forwarded_behind_all_that(sink: KernelSink) -> None:
    """The namespace still works: a last superpacket leaves its far port as segments with right checksums."""
    assert sink.give(BIG.virtio()) == b"taken\n"
    forwarded = sink.end()
    assert forwarded.endswith(b"".join(packet.hex().encode() + b"\n" for packet in aged(BIG)))


def aged(big: Big) -> list[bytes]:
    """Its segments after one router: TTL one less."""
    made = []
    for packet in big.segments():
        data = bytearray(packet)
        data[8] -= 1
        check = int.from_bytes(data[10:12], "big") + 0x100
        data[10:12] = ((check & 0xFFFF) + (check >> 16)).to_bytes(2, "big")
        made.append(bytes(data))
    return made
