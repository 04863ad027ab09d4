"""Arenas for the conformance suite of transports: the hostile in-memory network in virtual time, and real sockets on
loopback with a relay between them that can lose datagrams and change its address, as a NAT does."""

from __future__ import annotations

import contextlib
import heapq
import ipaddress
import random
import select
import socket
import time
from collections.abc import Callable, Iterator

from qvpn.netio.base import Address, Bind
from qvpn.netio.memory import Impairments, MemoryNetwork
from qvpn.netio.udp import UdpBind
from qvpn.transports.conformance import Arena, End
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

    def close(self) -> None:
        """Only the ends are to be closed."""


class Relay:
    """What comes to ``front`` leaves from ``back``, and the answers go the other way."""

    def __init__(self, right: Address) -> None:
        self._chance = random.Random(11)
        self._targets: dict[socket.socket, tuple[str, int]] = {}
        self._right = (str(right.ip), right.port)
        self.share = 0.0
        """Of the datagrams in both directions that vanish here."""
        self.front, self.back = self._socket(), self._socket()
        self._targets[self.back] = self._right

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("127.0.0.1", 0))
        made.setblocking(False)
        return made

    @property
    def place(self) -> Address:
        return Address(ipaddress.ip_address("127.0.0.1"), self.front.getsockname()[1])

    def pump(self) -> None:
        """Carry what waits."""
        for here, there in ((self.front, self.back), (self.back, self.front)):
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, source = here.recvfrom(1 << 16)
                    if here is self.front:
                        self._targets[self.front] = source
                    if there in self._targets and self._chance.random() >= self.share:
                        with contextlib.suppress(OSError):
                            there.sendto(data, self._targets[there])

    def move(self) -> None:
        """From now on the right end sees another address."""
        old, self.back = self.back, self._socket()
        self._targets = {self.front: self._targets[self.front], self.back: self._right}
        old.close()

    def close(self) -> None:
        self.front.close()
        self.back.close()


class RealArena:
    """Two ends on loopback sockets, in real time, and the relay between them."""

    def __init__(self, over: Callable[[Bind, Alarms], Bind], reach: Callable[[Address], Address]) -> None:
        here = Address(ipaddress.ip_address("127.0.0.1"), 0)
        self.alarms = Alarms(time.monotonic)
        lowers = [UdpBind(here), UdpBind(here)]
        self._relay = Relay(lowers[1].local)
        self.left = End(over(lowers[0], self.alarms), reach(self._relay.place))
        self.right = End(over(lowers[1], self.alarms), lowers[0].local)
        for end in (self.left, self.right):
            end.bind.on_readable(end.take)

    def run(self, seconds: float) -> None:
        """Idle time is skipped as soon as nothing more arrives and no timer is near; not while packets are lost, for
        then a sender that gets no rest would lose more than the network does."""
        until = time.monotonic() + min(seconds, 0.3)
        while (now := time.monotonic()) < until:
            due = self.alarms.due()
            wait = min(until, due if due is not None else until) - now
            self._relay.pump()
            for end in (self.left, self.right):
                while end.take():
                    pass
            filenos = [*self.left.bind.filenos(), *self.right.bind.filenos(), self._relay.front, self._relay.back]
            ready = select.select(filenos, [], [], min(max(wait, 0), 0.01))[0]
            self.alarms.ring()
            if not ready and seconds <= 0.02 and not self._relay.share:
                return

    def lose(self, share: float) -> bool:
        self._relay.share = share
        return True

    def move_left(self) -> bool:
        self._relay.move()
        return True

    def close(self) -> None:
        self._relay.close()


def plain(lower: Bind, alarms: Alarms) -> Bind:
    return lower


def quic(lower: Bind, alarms: Alarms) -> Bind:
    return QuicBind(lower, CERTIFICATE, alarms.clock, alarms.call_later)


def same(place: Address) -> Address:
    return place


def dialled(place: Address) -> Address:
    return parse_peer(place, {})


TRANSPORTS = {
    "memory": (VirtualArena, plain, same),
    "udp": (RealArena, plain, same),
    "quic over memory": (VirtualArena, quic, dialled),
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
        made.close()
