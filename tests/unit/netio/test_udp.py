"""UDP sockets on loopback: families, connected sockets, segmentation and its fall-backs, errors only counted."""

from __future__ import annotations

import errno
import ipaddress
import select
import socket
import time
from collections.abc import Iterator

import pytest

from qvpn.netio import udp, udpsocket
from qvpn.netio.base import Address
from qvpn.netio.errors import BindError
from qvpn.netio.udp import UdpBind


def at(ip: str, port: int = 0) -> Address:
    return Address(ipaddress.ip_address(ip), port)


def to(bind: UdpBind, ip: str = "127.0.0.1") -> Address:
    return at(ip, bind.local.port)


def receive(bind: UdpBind, count: int) -> list[tuple[bytes, Address]]:
    """Wait for so many datagrams; GRO batches are cut into their segments."""
    got: list[tuple[bytes, Address]] = []
    deadline = time.monotonic() + 5
    while len(got) < count and time.monotonic() < deadline:
        select.select(bind.filenos(), [], [], 0.5)
        for each in bind.receive_batch(16):
            data = bytes(each.buffer[: each.length])
            step = max(1, each.segment)
            got += [(data[start : start + step], each.address) for start in range(0, max(1, len(data)), step)]
    return got


@pytest.fixture
def left() -> Iterator[UdpBind]:
    bind = UdpBind(at("::"))
    yield bind
    bind.close()


@pytest.fixture
def right() -> Iterator[UdpBind]:
    bind = UdpBind(at("::"))
    yield bind
    bind.close()


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_dual_stack_both_ways_with_plain_addresses(left: UdpBind, right: UdpBind, ip: str, connected: bool) -> None:
    if connected:
        left.connect(to(right, ip))
        assert len(left.filenos()) == 2
    assert left.send_batch([memoryview(b"one"), memoryview(b""), memoryview(b"two")], to(right, ip)) == 3
    got = receive(right, 3)
    assert [data for data, _ in got] == [b"one", b"", b"two"]
    assert {address for _, address in got} == {to(left, ip)}
    assert right.send_batch([memoryview(b"back")], got[0][1]) == 1
    assert receive(left, 1) == [(b"back", to(right, ip))]
    assert left.errors == right.errors == {}


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(
    ("segment", "size"), [(1000, 10_000), (1000, 9_500), (100, 20_000), (1400, 200_000), (9000, 5000)]
)
def test_segments_arrive_in_order_and_whole(
    left: UdpBind, right: UdpBind, segment: int, size: int, connected: bool
) -> None:
    if connected:
        left.connect(to(right))
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    count = -(-size // segment)
    assert left.send_segments(memoryview(data), segment, to(right)) == count
    got = receive(right, count)
    assert [datagram for datagram, _ in got] == [data[start : start + segment] for start in range(0, size, segment)]


def test_a_batch_is_one_system_call_where_the_kernel_can(left: UdpBind, right: UdpBind) -> None:
    left.connect(to(right))
    sock = left._connected[to(right)]
    left.send_segments(memoryview(bytes(30_000)), 1000, to(right))
    assert sock.segment == 1000
    assert sock.segments
    left.send_batch([memoryview(b"single")], to(right))
    assert sock.segment == 0
    assert len(receive(right, 31)) == 31


class Refusing(socket.socket):
    """A socket whose segmented sends fail as on a device without checksum offload."""

    code = errno.EIO
    failures = 0

    def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
        if len(data) > 1000:
            Refusing.failures += 1
            raise OSError(self.code, "refused")
        return super().send(data, flags)


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_socket_without_segmentation_sends_one_by_one(right: UdpBind, code: int) -> None:
    Refusing.code, Refusing.failures = code, 0
    bind = UdpBind(at("0.0.0.0"), factory=lambda family: Refusing(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
    bind.connect(to(right))
    for _ in range(2):
        assert bind.send_segments(memoryview(bytes(5000)), 1000, to(right)) == 5
    assert len(receive(right, 10)) == 10
    assert Refusing.failures == (1 if code == errno.EIO else 2)
    assert bind.errors == {}
    bind.close()


def test_connection_refused_is_counted_and_the_next_datagram_still_goes(left: UdpBind) -> None:
    closed = UdpBind(at("127.0.0.1"))
    target = closed.local
    closed.close()
    left.connect(target)
    for _ in range(3):
        assert left.send_batch([memoryview(b"x")], target) == 1
    assert left.receive_batch(4) == []
    assert left.errors["ECONNREFUSED"] >= 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as returned:
        returned.bind(("127.0.0.1", target.port))
        assert left.send_batch([memoryview(b"healed")], target) == 1
        returned.settimeout(5)
        assert returned.recv(100) == b"healed"


def test_too_big_is_counted(left: UdpBind, right: UdpBind) -> None:
    assert left.send_batch([memoryview(bytes(65_508))], to(right)) == 0
    assert left.errors == {"EMSGSIZE": 1}


def test_an_address_of_the_wrong_family_is_counted(right: UdpBind) -> None:
    bind = UdpBind(at("127.0.0.1"))
    bind.connect(to(right, "::1"))
    assert bind.send_batch([memoryview(b"x")], to(right, "::1")) == 0
    assert bind.errors == {"EAFNOSUPPORT": 2}
    bind.close()


def test_datagrams_waiting_in_a_socket_that_is_closed_are_kept(left: UdpBind, right: UdpBind) -> None:
    left.connect(to(right))
    connected = left._connected[to(right)]
    right.send_batch([memoryview(b"in time")], to(left))
    select.select([connected.socket], [], [], 5)
    changed: list[list[int]] = []
    left.on_filenos(lambda: changed.append(left.filenos()))
    left.disconnect(to(right))
    assert changed == [[left._listener.socket.fileno()]]
    assert receive(left, 1) == [(b"in time", to(right))]


def test_descriptors_follow_connect_and_disconnect(left: UdpBind, right: UdpBind) -> None:
    changes = []
    left.on_filenos(lambda: changes.append(len(left.filenos())))
    left.connect(to(right))
    left.connect(to(right))
    left.disconnect(to(right))
    left.disconnect(to(right))
    assert changes == [2, 1]


def test_a_stranger_reaches_the_listener_beside_a_connected_socket(left: UdpBind, right: UdpBind) -> None:
    left.connect(to(right))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.sendto(b"hello", ("127.0.0.1", left.local.port))
        got = receive(left, 1)
        assert got == [(b"hello", at("127.0.0.1", stranger.getsockname()[1]))]


def test_the_port_of_another_daemon_is_refused(left: UdpBind) -> None:
    left.connect(at("127.0.0.1", 9))
    with pytest.raises(
        BindError, match=rf"cannot listen on \[::\]:{left.local.port} \(UDP\): address already in use"
    ):
        UdpBind(at("::", left.local.port))


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(BindError, match=r"cannot listen on 192\.0\.2\.77:51840"):
        UdpBind(at("192.0.2.77", 51840))


def test_without_ipv6_the_wildcard_falls_back_to_ipv4(right: UdpBind) -> None:
    def only_ipv4(family: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        return udp.open_socket(family)

    bind = UdpBind(at("::"), factory=only_ipv4)
    assert bind.local.ip == ipaddress.ip_address("0.0.0.0")
    assert bind.send_batch([memoryview(b"x")], to(right)) == 1
    assert len(receive(right, 1)) == 1
    bind.close()


def test_payload_comes_from_the_route(left: UdpBind, right: UdpBind) -> None:
    expected = min(65_536 - 28, udpsocket.MAX_SEND)
    assert left.max_payload(to(right)) == expected
    left.connect(to(right))
    assert left.max_payload(to(right)) == expected
    assert left.max_payload(to(right, "::1")) == 65_536 - 48
    assert left.send_batch([memoryview(bytes(expected))], to(right)) == 1
    unreachable = UdpBind(at("127.0.0.1"))
    assert unreachable.max_payload(at("240.0.0.1", 1)) > 0
    unreachable.close()


def test_close_twice_and_send_after_close(left: UdpBind, right: UdpBind) -> None:
    target = to(right)
    left.close()
    left.close()
    assert left.filenos() == []
    assert left.send_batch([memoryview(b"x")], target) == 0


def test_a_listener_given_away_is_used_by_another_without_connecting(right: UdpBind) -> None:
    opened = UdpBind(at("127.0.0.1"))
    listener = opened.release()
    taken = UdpBind(opened.local, listener=listener)
    try:
        assert opened.filenos() == []
        opened.close()  # what was given away stays open
        taken.connect(to(right))
        assert taken.filenos() == [listener.fileno()]
        assert taken.send_segments(memoryview(b"abcdef"), 2, to(right)) == 3
        assert receive(right, 3) == [(text, taken.local) for text in (b"ab", b"cd", b"ef")]
        right.send_batch([memoryview(b"back")], taken.local)
        assert receive(taken, 1) == [(b"back", to(right))]
        assert taken.max_payload(to(right)) > 1400
    finally:
        taken.close()
