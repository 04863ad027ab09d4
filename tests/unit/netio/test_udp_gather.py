"""Datagrams that the kernel did not join are received behind one another, as if it had."""

from __future__ import annotations

import ipaddress
import random
import select
import socket
from collections.abc import Iterator

import pytest

from qvpn.netio.base import Address, Received
from qvpn.netio.udp import UdpBind
from qvpn.netio.udpreceive import GATHERED

LOOPBACK = ipaddress.ip_address("127.0.0.1")


@pytest.fixture
def bind() -> Iterator[UdpBind]:
    made = UdpBind(Address(LOOPBACK, 0))
    yield made
    made.close()


@pytest.fixture
def senders(bind: UdpBind) -> Iterator[list[socket.socket]]:
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for each in made:
        each.connect(("127.0.0.1", bind.local.port))
    yield made
    for each in made:
        each.close()


def receives(bind: UdpBind, limit: int = 1 << 10) -> list[Received]:
    """All that waits on loopback, where a datagram is there as soon as it was sent."""
    select.select(bind.filenos(), [], [], 5)
    return bind.receive_batch(limit)


def datagrams(batch: list[Received]) -> list[tuple[bytes, int]]:
    got = []
    for each in batch:
        data = bytes(each.buffer[: each.length])
        got += [(data[at : at + each.segment], each.address.port) for at in range(0, len(data), each.segment)]
    return got


def test_equal_datagrams_are_one_receive(bind: UdpBind, senders: list[socket.socket]) -> None:
    sent = [bytes([number]) * 1472 for number in range(40)]
    for each in sent:
        senders[0].send(each)
    batch = receives(bind)
    assert [(each.length, each.segment) for each in batch] == [(40 * 1472, 1472)]
    assert [data for data, _ in datagrams(batch)] == sent


def test_a_shorter_one_ends_it_and_a_longer_one_begins_anew(bind: UdpBind, senders: list[socket.socket]) -> None:
    for size in (100, 100, 40, 100, 200, 300, 300):
        senders[0].send(bytes(size))
    batch = receives(bind)
    assert [(each.length, each.segment) for each in batch] == [(240, 100), (100, 100), (200, 200), (600, 300)]


def test_gathering_has_an_end(bind: UdpBind, senders: list[socket.socket]) -> None:
    for _ in range(GATHERED + 5):
        senders[0].send(bytes(50))
    assert [each.length for each in receives(bind)] == [GATHERED * 50, 5 * 50]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_changed_or_charged_to_another(
    bind: UdpBind, senders: list[socket.socket], seed: int
) -> None:
    """Two senders, other ECN bits now and then, sends that the kernel cuts and joins again, a limit on each call."""
    dice = random.Random(seed)
    sent = []
    for _ in range(60):
        sender = dice.choice(senders)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dice.choice((0, 0, 0, 2)))
        size = dice.choice((33, 33, 33, 700, 1472))
        count = dice.choice((1, 1, 1, 5))
        data = dice.randbytes(size * count)
        sender.setsockopt(socket.IPPROTO_UDP, 103, size if count > 1 else 0)
        sender.send(data)
        sent += [(data[at : at + size], sender.getsockname()[1]) for at in range(0, len(data), size)]
    got: list[tuple[bytes, int]] = []
    while len(got) < len(sent):
        limit = dice.choice((1, 2, 4, 16))
        batch = receives(bind, limit)
        assert 0 < len(batch) <= limit
        got += datagrams(batch)
    assert got == sent


def send_at_once(sender: socket.socket, datagram: int, size: int, fill: int) -> bytes:
    """``size`` bytes as datagrams of this length, in one send that loopback does not take apart."""
    sender.setsockopt(socket.IPPROTO_UDP, 103, datagram)
    data = bytes([fill]) * size
    sender.send(data)
    return data


@pytest.mark.parametrize("limit", [1, 2, 16])
def test_the_second_half_of_a_superpacket_is_received_behind_the_first(
    bind: UdpBind, senders: list[socket.socket], limit: int
) -> None:
    whole = send_at_once(senders[0], 1472, 24 * 1472, 1) + send_at_once(senders[0], 1472, 22 * 1472 + 900, 2)
    (got,) = receives(bind, limit)
    assert (got.length, got.segment, got.joined) == (len(whole), 1472, 24)
    assert bytes(got.buffer[: got.length]) == whole


def test_one_datagram_may_be_the_second_half(bind: UdpBind, senders: list[socket.socket]) -> None:
    whole = send_at_once(senders[0], 1472, 24 * 1472, 1) + send_at_once(senders[0], 0, 700, 2)
    (got,) = receives(bind)
    assert (got.length, got.segment, got.joined) == (len(whole), 1472, 24)


def test_behind_what_ends_with_a_short_datagram_nothing_is_received(
    bind: UdpBind, senders: list[socket.socket]
) -> None:
    send_at_once(senders[0], 1472, 24 * 1472 + 1, 1)
    send_at_once(senders[0], 1472, 24 * 1472, 2)
    assert [(each.length, each.joined) for each in receives(bind)] == [(24 * 1472 + 1, 0), (24 * 1472, 0)]


@pytest.mark.parametrize("other", ["sender", "mark", "longer", "shorter"])
def test_what_is_no_other_half_is_a_receive_of_its_own(
    bind: UdpBind, senders: list[socket.socket], other: str
) -> None:
    """It comes on top of the limit, in a buffer of its own."""
    first = send_at_once(senders[0], 1000, 40_000, 1)
    if other == "mark":
        senders[0].setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 2)
    size = {"longer": 1001, "shorter": 999}.get(other, 1000)
    second = send_at_once(senders[other == "sender"], size, 40_000, 2)
    third = send_at_once(senders[1], 500, 1500, 3)
    batch = receives(bind, 1)
    assert len(batch) == 2
    assert [bytes(each.buffer[: each.length]) for each in batch] == [first, second]
    assert [each.joined for each in batch] == [0, 0]
    assert batch[0].buffer is not batch[1].buffer
    (last,) = receives(bind)
    assert bytes(last.buffer[: last.length]) == third
