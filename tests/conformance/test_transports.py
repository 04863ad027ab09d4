"""The conformance suite of transports over memory, UDP and QUIC, and over a third party's; and that it can fail."""

from __future__ import annotations

import contextlib
import heapq
import ipaddress
import select
import time
from collections.abc import Callable, Iterator

import pytest

from qvpn.netio.base import Address, Bind
from qvpn.netio.memory import Impairments, MemoryNetwork
from qvpn.netio.udp import UdpBind
from qvpn.transports.base import Layer
from qvpn.transports.conformance import CHECKS, Arena, Check, End, NotConforming, run_all
from qvpn.transports.quic.bind import QuicBind
from qvpn.transports.quic.certificate import self_made
from qvpn.transports.quic.settings import parse_peer

LEFT, RIGHT, ELSEWHERE = (Address(ipaddress.ip_address(f"192.0.2.{n}"), 443) for n in (1, 2, 3))
CERTIFICATE = self_made("localhost")


class Alarm:
    """What ``call_later`` gives back."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Alarms:
    """Timers on a clock that the arena moves."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._waiting: list[tuple[float, int, Alarm]] = []
        self._number = 0

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        self._number += 1
        alarm = Alarm(callback)
        heapq.heappush(self._waiting, (self.clock() + seconds, self._number, alarm))
        return alarm

    def due(self) -> float | None:
        return self._waiting[0][0] if self._waiting else None

    def ring(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.clock():
            alarm = heapq.heappop(self._waiting)[2]
            if alarm.callback is not None:
                alarm.callback()


class VirtualArena:
    """Two ends of the memory network, in virtual time."""

    def __init__(self, over: Callable[[Bind, Alarms], Bind], reach: Callable[[Address], Address]) -> None:
        self.network = MemoryNetwork(7, Impairments(delay=0.002))
        self.alarms = Alarms(lambda: self.network.now)
        self._lower = self.network.bind(LEFT)
        self.left = End(over(self._lower, self.alarms), reach(RIGHT))
        self.right = End(over(self.network.bind(RIGHT), self.alarms), LEFT)
        for end in (self.left, self.right):
            end.bind.on_readable(end.take)

    def run(self, seconds: float) -> None:
        until = self.network.now + seconds
        while True:
            next_times = [when for when in (self.alarms.due(), self.network.next_due()) if when is not None]
            if not next_times or min(next_times) > until:
                break
            self.network.advance(min(next_times))
            self.alarms.ring()
        self.network.advance(until)

    def lose(self, share: float) -> bool:
        self.network.impair_all(Impairments(delay=0.002, loss=share))
        return True

    def move_left(self) -> bool:
        self._lower.rebind(ELSEWHERE)
        return True


class RealArena:
    """Two ends on loopback sockets, in real time."""

    def __init__(self, over: Callable[[Bind, Alarms], Bind], reach: Callable[[Address], Address]) -> None:
        here = Address(ipaddress.ip_address("127.0.0.1"), 0)
        self.alarms = Alarms(time.monotonic)
        lowers = [UdpBind(here), UdpBind(here)]
        places = [lower.local for lower in lowers]
        self.left = End(over(lowers[0], self.alarms), reach(places[1]))
        self.right = End(over(lowers[1], self.alarms), places[0])
        for end in (self.left, self.right):
            end.bind.on_readable(end.take)

    def run(self, seconds: float) -> None:
        """Idle time is skipped as soon as nothing more arrives and no timer is near."""
        until = time.monotonic() + min(seconds, 0.3)
        while (now := time.monotonic()) < until:
            due = self.alarms.due()
            wait = min(until, due if due is not None else until) - now
            for end in (self.left, self.right):
                while end.take():
                    pass
            filenos = [*self.left.bind.filenos(), *self.right.bind.filenos()]
            if not select.select(filenos, [], [], min(max(wait, 0), 0.01))[0] and seconds <= 0.02:
                self.alarms.ring()
                return
            self.alarms.ring()

    def lose(self, share: float) -> bool:
        return False

    def move_left(self) -> bool:
        return False


def plain(lower: Bind, alarms: Alarms) -> Bind:
    return lower


def quic(lower: Bind, alarms: Alarms) -> Bind:
    return QuicBind(lower, CERTIFICATE, alarms.clock, alarms.call_later)


def same(place: Address) -> Address:
    return place


def dialled(place: Address) -> Address:
    return parse_peer(place, {})


TRANSPORTS = {"memory": (VirtualArena, plain, same), "quic over memory": (VirtualArena, quic, dialled)} | {
    "udp": (RealArena, plain, same),
    "quic over udp": (RealArena, quic, dialled),
}


@contextlib.contextmanager
def arena(transport: str) -> Iterator[Arena]:
    kind, over, reach = TRANSPORTS[transport]
    made = kind(over, reach)
    try:
        yield made
    finally:
        made.left.bind.close()
        made.right.bind.close()


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda check: check.__name__)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_conforms(transport: str, check: Check) -> None:
    with arena(transport) as made:
        check(made)


class Hoarding(Layer):
    """Wrong in one way: keeps the last datagram of each batch for the next one."""

    kept: bytes = b""

    def send_batch(self, datagrams, address):  # type: ignore[no-untyped-def]
        whole = [memoryview(self.kept), *datagrams] if self.kept else list(datagrams)
        self.kept = bytes(whole.pop())
        self.lower.send_batch(whole, address)
        return len(datagrams)


class Forgetful(Layer):
    """Wrong in another: takes too long datagrams and says nothing."""

    def send_batch(self, datagrams, address):  # type: ignore[no-untyped-def]
        most = self.max_payload(address)
        self.lower.send_batch([datagram for datagram in datagrams if len(datagram) <= most], address)
        return len(datagrams)


@pytest.mark.parametrize(
    ("wrong", "caught"),
    [(Hoarding, {"order_and_content", "sizes", "close"}), (Forgetful, {"oversize_blocks_nothing"})],
)
def test_a_wrong_bind_is_caught(wrong: type[Layer], caught: set[str]) -> None:
    @contextlib.contextmanager
    def make() -> Iterator[Arena]:
        made = VirtualArena(lambda lower, _: wrong(lower), same)
        yield made

    failed = {name for name, problem in run_all(make).items() if problem is not None}
    assert caught <= failed


def test_an_exception_of_the_suite_is_one_sentence() -> None:
    with pytest.raises(NotConforming, match="the first datagram arrives"):
        made = VirtualArena(lambda lower, _: Mute(lower), same)
        CHECKS["both_ways"](made)


class Mute(Layer):
    def send_batch(self, datagrams, address):  # type: ignore[no-untyped-def]
        return len(datagrams)
