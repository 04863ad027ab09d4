"""The network in memory does what its impairments say, counts it, and is the same for the same seed."""

from __future__ import annotations

import ipaddress

import pytest

from qvpn.netio.base import Address
from qvpn.netio.memory import QUEUE_PACKETS, Impairments, MemoryBind, MemoryNetwork, MemoryTun

A = Address(ipaddress.ip_address("192.0.2.1"), 1)
B = Address(ipaddress.ip_address("192.0.2.2"), 2)
C = Address(ipaddress.ip_address("192.0.2.3"), 3)


def joined(seed: int = 1, impairments: Impairments | None = None) -> tuple[MemoryNetwork, MemoryBind, MemoryBind]:
    network = MemoryNetwork(seed, impairments)
    return network, network.bind(A), network.bind(B)


def numbers(bind: MemoryBind) -> list[int]:
    return [int.from_bytes(each.buffer[:4], "big") for each in bind.receive_batch(1 << 20)]


def send(bind: MemoryBind, count: int, address: Address = B) -> None:
    bind.send_batch([memoryview(number.to_bytes(4, "big")) for number in range(count)], address)


def test_nothing_arrives_before_its_time() -> None:
    network, a, b = joined(impairments=Impairments(delay=0.5))
    send(a, 3)
    network.advance(0.49)
    assert numbers(b) == []
    assert network.next_due() == 0.5
    network.advance(0.5)
    assert numbers(b) == [0, 1, 2]
    assert network.next_due() is None


def test_every_loss_and_duplicate_is_counted() -> None:
    network, a, b = joined(impairments=Impairments(loss=0.2, duplicate=0.3))
    send(a, 2000)
    network.advance(1.0)
    got = numbers(b)
    counts = network.counts
    assert counts["sent"] == 2000
    assert 300 < counts["lost"] < 500
    assert 400 < counts["duplicated"] < 560
    assert len(set(got)) == 2000 - counts["lost"]
    assert len(got) == counts["delivered"] == 2000 - counts["lost"] + counts["duplicated"]


@pytest.mark.parametrize("impairments", [Impairments(jitter=0.1), Impairments(reorder=0.1)])
def test_reordering_loses_nothing(impairments: Impairments) -> None:
    network, a, b = joined(impairments=impairments)
    send(a, 500)
    network.advance(10.0)
    got = numbers(b)
    assert got != sorted(got)
    assert sorted(got) == list(range(500))


def test_the_same_seed_is_the_same_network() -> None:
    def run(seed: int) -> list[int]:
        network, a, b = joined(seed, Impairments(loss=0.3, duplicate=0.2, jitter=0.05, reorder=0.1))
        send(a, 300)
        network.advance(10.0)
        return numbers(b)

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_links_have_impairments_of_their_own_and_can_be_cut() -> None:
    network, a, b = joined()
    network.impair(A, B, Impairments(loss=1.0))
    send(a, 5)
    send(b, 5, A)
    network.block(B, A)
    send(b, 7, A)
    network.block(B, A, False)
    send(b, 1, C)
    network.advance(1.0)
    assert numbers(b) == []
    assert numbers(a) == [0, 1, 2, 3, 4]
    assert (network.counts["lost"], network.counts["blocked"], network.counts["no_listener"]) == (5, 7, 1)


def test_what_an_end_sends_when_called_back_is_part_of_the_advance() -> None:
    network, a, b = joined(impairments=Impairments(delay=0.1))

    def answer() -> None:
        for each in b.receive_batch(1):
            b.send_batch([each.buffer], each.address)

    b.on_readable(answer)
    send(a, 2)
    network.advance(0.25)
    assert numbers(a) == [0, 1]
    assert network.now == 0.25


def test_too_big_and_closed_are_counted_as_a_socket_counts_them() -> None:
    network, a, b = joined(impairments=Impairments(max_payload=100))
    assert a.max_payload(B) == 100
    assert a.send_segments(memoryview(bytes(450)), 100, B) == 5
    assert a.send_batch([memoryview(bytes(101))], B) == 0
    b.close()
    b.close()
    assert b.send_batch([memoryview(b"x")], A) == 0
    assert (a.errors, b.errors) == ({"EMSGSIZE": 1}, {"EBADF": 1})
    network.advance(1.0)
    assert network.counts["no_listener"] == 5


def test_a_queue_is_bounded() -> None:
    network, a, b = joined()
    send(a, QUEUE_PACKETS + 10)
    network.advance(1.0)
    assert network.counts["overflow"] == 10
    assert numbers(b) == list(range(QUEUE_PACKETS))


def test_moving_to_another_address() -> None:
    network, a, b = joined()
    a.rebind(C)
    send(a, 1)
    send(b, 1, A)
    network.advance(1.0)
    assert [each.address for each in b.receive_batch(9)] == [C]
    assert network.counts["no_listener"] == 1
    with pytest.raises(OSError, match="in use"):
        network.bind(C)


def test_tun_stops_at_a_superpacket_and_at_the_limit() -> None:
    tun = MemoryTun()
    arena = memoryview(bytearray(400_000))
    plain, big = bytes(30), bytes([1, 1]) + bytes(2000)
    tun.inject([plain, plain, big, plain])
    assert tun.read_batch(arena, 9) == [(0, 30), (30, 30), (60, 2002)]
    assert tun.read_batch(arena, 9) == [(0, 30)]
    assert tun.read_batch(arena, 9) == []
    tun.inject([plain] * 5)
    assert len(tun.read_batch(arena, 3)) == 3
    assert len(tun.read_batch(arena[:65_599], 3)) == 0
