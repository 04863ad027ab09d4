"""The network refuses, the kernel hands over rubbish: counted, and the next packet goes on."""

from __future__ import annotations

import pytest

from qvpn.dataplane.outbound import equal_runs
from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments
from qvpn.tunnel.drops import DropReason
from tests.unit.dataplane.segments import UDP, Big, finish
from tests.unit.dataplane.support import ALICE, BOB, FROM_ALICE, FROM_BOB, PLAIN, Pair, dont_fragment, numbered

BIG = Big(FROM_ALICE[4], FROM_BOB[4], bytes(10_000), 1000)


def taking(pair: Pair, most: int) -> None:
    """Alice's network takes so many datagrams of each send."""
    original = pair.alice.bind.send_segments

    def send(buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        return original(buffer[: most * segment], segment, address, ecn) if most else 0

    pair.alice.bind.send_segments = send  # type: ignore[method-assign]


def test_records_that_the_network_refused_are_counted_in_packets() -> None:
    pair = Pair()
    pair.established()
    taking(pair, 2)
    pair.alice_sends(range(40), size=300)  # 4 packets a record
    pair.run()
    assert pair.bob.taken_numbers() == list(range(8))
    assert pair.alice.plane.stats("bob").drops == {DropReason.SEND_FAILED: 32}
    assert pair.alice.plane.stats("bob").sent_packets == 8


@pytest.mark.parametrize("most", [0, 3])
def test_chunks_that_the_network_refused_are_counted(most: int) -> None:
    pair = Pair()
    pair.established()
    taking(pair, most)
    pair.alice.tun.inject([BIG.virtio()])
    pair.run()
    assert [packet for written in pair.bob.tun.taken for packet in finish(written)] == BIG.segments()[:most]
    assert pair.alice.plane.stats("bob").drops == {DropReason.SEND_FAILED: 10 - most}


def test_control_that_the_network_refused_is_false_and_counted() -> None:
    pair = Pair()
    pair.established()
    assert not pair.alice.plane.send_probe("bob", bytes(1500))  # a probe may be too long: no drop
    assert pair.alice.plane.send_control("bob", bytes(1500))  # cut on the way
    pair.alice.bind.close()
    assert not pair.alice.plane.send_control("bob", b"\x04")
    pair.alice.plane.set_endpoint("bob", None)
    assert not pair.alice.plane.send_control("bob", b"\x04")
    assert pair.alice.plane.stats("bob").drops == {DropReason.SEND_FAILED: 1, DropReason.NO_ENDPOINT: 1}
    assert pair.alice.bind.errors == {"EMSGSIZE": 1, "EBADF": 1}


def test_a_path_that_shrinks_is_noticed_by_the_first_refusal() -> None:
    pair = Pair()
    pair.established()
    pair.network.impair(ALICE, BOB, Impairments(max_payload=1000))
    pair.alice_sends([1], size=1200)
    pair.alice.tun.inject([dont_fragment(numbered(2, FROM_ALICE[4], FROM_BOB[4], 1200))])
    pair.alice_sends([3], size=900)
    pair.alice.tun.inject([BIG.virtio()])
    pair.run()
    assert pair.alice.plane.stats("bob").drops == {DropReason.SEND_FAILED: 1, DropReason.TOO_BIG: 1}
    (told,) = (packet for packet in pair.alice.tun.taken if packet[19] == 1)
    assert told[30:32] == b"\x03\x04" and int.from_bytes(told[36:38], "big") == 1000 - 42
    narrow = Big(**{**BIG.__dict__, "segment": 1000 - 32 - 50})
    assert [written[10:] for written in pair.bob.tun.taken[:1]] == [numbered(3, FROM_ALICE[4], FROM_BOB[4], 900)[10:]]
    assert [packet for written in pair.bob.tun.taken[1:] for packet in finish(written)] == narrow.segments()


def test_a_path_that_grows_is_noticed_by_the_tick() -> None:
    pair = Pair(impairments=Impairments(max_payload=1000))
    pair.established()
    pair.network.impair_all(Impairments(max_payload=1400))
    pair.alice.plane.tick()
    pair.alice_sends([1], size=1200)
    pair.run()
    assert pair.bob.taken_numbers() == [1]


@pytest.mark.parametrize(
    "packet",
    [
        PLAIN + b"\x45" * 10,
        numbered(1, FROM_ALICE[4], FROM_BOB[4])[:-1],
        numbered(1, FROM_ALICE[4], FROM_BOB[4]) + b"\0",
        BIG.virtio()[:-1],
        BIG.virtio() + b"\0",
        BIG.virtio()[:40],
        bytes([1, 2]) + BIG.virtio()[2:],
    ],
)
def test_rubbish_from_the_tun_is_malformed(packet: bytes) -> None:
    pair = Pair()
    pair.established()
    pair.alice.tun.inject([packet, numbered(2, FROM_ALICE[4], FROM_BOB[4])])
    pair.run()
    assert pair.bob.taken_numbers() == [2]
    assert pair.drops() == {DropReason.MALFORMED: 1}


def test_a_superpacket_to_nowhere() -> None:
    pair = Pair()
    pair.established()
    pair.alice.tun.inject([Big(FROM_ALICE[4], "198.51.100.7", bytes(5000), 1000, protocol=UDP).virtio()])
    assert pair.drops() == {DropReason.NO_ROUTE: 5}


@pytest.mark.parametrize("most", [0, 32, 41, 62, 100])
@pytest.mark.parametrize("version", [4, 6])
def test_a_link_that_carries_next_to_nothing_costs_only_the_packets(most: int, version: int) -> None:
    """Not even the records' own bytes may fit; no sender is told less than every link carries."""
    pair = Pair()
    pair.established()
    pair.network.impair_all(Impairments(max_payload=most))
    pair.alice.plane.tick()
    packet = numbered(1, FROM_ALICE[version], FROM_BOB[version], 1300)
    pair.alice.tun.inject([dont_fragment(packet) if version == 4 else packet])
    pair.alice.tun.inject([Big(FROM_ALICE[version], FROM_BOB[version], bytes(3000), 1000).virtio()])
    pair.run()
    assert pair.drops()[DropReason.TOO_BIG] >= 1
    told = [packet[10:] for packet in pair.alice.tun.taken]
    assert all(int.from_bytes(answer[26:28] if version == 4 else answer[44:48], "big") >= 68 for answer in told)
    assert told


def test_plain_packets_beyond_the_limit_are_counted_in_packets() -> None:
    from qvpn.tunnel.records import Limits

    pair = Pair(limits=Limits(rekey=1, stop=2))
    pair.install()
    pair.alice_sends(range(40), size=300)
    assert pair.alice.plane.stats("bob").drops == {DropReason.LIMIT: 40}
    pair.alice_sends(range(8), size=300)
    pair.run()
    assert pair.bob.taken_numbers() == list(range(8))


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([], []),
        ([5], [1]),
        ([5, 5, 5], [3]),
        ([5, 5, 3], [3]),
        ([5, 3, 3], [2, 1]),
        ([3, 5], [1, 1]),
        ([5, 3, 5], [2, 1]),
        ([5, 6, 6, 2, 2, 2, 9], [1, 3, 2, 1]),
    ],
)
def test_equal_runs(lengths: list[int], runs: list[int]) -> None:
    assert equal_runs(lengths, [2] * len(lengths)) == runs


def test_a_run_has_one_set_of_ecn_bits() -> None:
    assert equal_runs([5, 5, 5, 5, 4, 4], [0, 0, 2, 2, 2, 0]) == [2, 3, 1]
    assert equal_runs([5, 5, 4], [0, 0, 2]) == [2, 1]
