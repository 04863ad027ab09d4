"""ECN bits of outer headers on real sockets: set once per change, read on every receive, no harm where refused."""

from __future__ import annotations

import errno
import ipaddress
import select
import socket
import time
from collections.abc import Iterator

import pytest

from qvpn.netio.base import Address, Received
from qvpn.netio.udp import UdpBind

NOT_ECT, ECT_1, ECT_0, CE = range(4)
TOS = {(socket.IPPROTO_IP, socket.IP_TOS), (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)}


class Watched(socket.socket):
    """A socket that remembers the ECN settings and how often it was called at all."""

    settings: list[tuple[int, int]]
    refuses = False

    def setsockopt(self, level: int, option: int, *value: object) -> None:  # type: ignore[override]
        if (level, option) in TOS:
            self.settings = [*getattr(self, "settings", []), (level, int(str(value[0])))]
            if Watched.refuses:
                raise OSError(errno.EPERM, "refused")
        if Watched.refuses and (level, option) in {(socket.IPPROTO_IP, 13), (socket.IPPROTO_IPV6, 66)}:
            raise OSError(errno.ENOPROTOOPT, "refused")
        super().setsockopt(level, option, *value)  # type: ignore[arg-type]


def at(ip: str, port: int = 0) -> Address:
    return Address(ipaddress.ip_address(ip), port)


def open_bind() -> UdpBind:
    return UdpBind(at("::"), factory=lambda family: Watched(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))


@pytest.fixture
def binds() -> Iterator[tuple[UdpBind, UdpBind]]:
    Watched.refuses = False
    left, right = open_bind(), open_bind()
    yield left, right
    left.close()
    right.close()


def receive(bind: UdpBind, datagrams: int) -> list[tuple[int, int]]:
    """(ECN bits, datagrams) of each receive, neighbours with equal bits added up."""
    got: list[tuple[int, int]] = []
    deadline = time.monotonic() + 5
    while sum(count for _, count in got) < datagrams and time.monotonic() < deadline:
        select.select(bind.filenos(), [], [], 0.5)
        for each in bind.receive_batch(16):
            got = _add(got, each)
    return got


def _add(got: list[tuple[int, int]], received: Received) -> list[tuple[int, int]]:
    count = -(-received.length // received.segment)
    if got and got[-1][0] == received.ecn:
        return [*got[:-1], (received.ecn, got[-1][1] + count)]
    return [*got, (received.ecn, count)]


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_bits_arrive_as_sent_and_control_has_none(binds: tuple[UdpBind, UdpBind], ip: str, connected: bool) -> None:
    left, right = binds
    target = at(ip, right.local.port)
    if connected:
        left.connect(target)
    for bits in (NOT_ECT, ECT_0, CE, ECT_1):
        assert left.send_segments(memoryview(bytes(10_000)), 1000, target, bits) == 10
        assert left.send_batch([memoryview(b"control")], target) == 1
    expected = [(NOT_ECT, 11), (ECT_0, 10), (NOT_ECT, 1), (CE, 10), (NOT_ECT, 1), (ECT_1, 10), (NOT_ECT, 1)]
    assert receive(right, 44) == expected
    assert left.errors == right.errors == {}


@pytest.mark.parametrize(("ip", "level"), [("127.0.0.1", socket.IPPROTO_IP), ("::1", socket.IPPROTO_IPV6)])
def test_bits_that_stay_cost_no_call(binds: tuple[UdpBind, UdpBind], ip: str, level: int) -> None:
    left, right = binds
    target = at(ip, right.local.port)
    left.connect(target)
    sock = left._connected[target].socket
    assert isinstance(sock, Watched)
    sock.settings = []
    for _ in range(20):
        left.send_segments(memoryview(bytes(3000)), 1000, target)
    assert sock.settings == []
    for _ in range(20):
        left.send_segments(memoryview(bytes(3000)), 1000, target, ECT_0)
    assert sock.settings == [(level, ECT_0)]


def test_a_kernel_that_refuses_the_bits_still_carries_datagrams() -> None:
    Watched.refuses = True
    left, right = open_bind(), open_bind()
    try:
        target = at("127.0.0.1", right.local.port)
        left.connect(target)
        for _ in range(3):
            assert left.send_segments(memoryview(bytes(3000)), 1000, target, ECT_0) == 3
        assert receive(right, 9) == [(NOT_ECT, 9)]
        sock = left._connected[target].socket
        assert isinstance(sock, Watched)
        assert len(sock.settings) == 1
    finally:
        left.close()
        right.close()
        Watched.refuses = False
