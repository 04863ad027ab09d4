"""What carries the sites' datagrams in the simulated network: UDP as it is, or QUIC over it in the world's time.

Inside QUIC the network cannot tell our datagrams from each other.  Where a test wants to lose a certain one, or to
look at all of them, it does so at the edge of the carrier (:class:`Edge`): what vanishes there is what a network
would have lost that could see inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import pytest

from qvpn.netio.base import Address, Bind, Received
from qvpn.transports.base import Layer
from qvpn.transports.quic.bind import QuicBind
from qvpn.transports.quic.certificate import Certificate, self_made
from qvpn.transports.quic.settings import parse_peer

CARRIERS = ("udp", "quic")

over_each = pytest.mark.parametrize("carrier", CARRIERS)
"""The scenario is played over every carrier (see ``conftest.py`` for how much of it in a usual run)."""


def is_data(datagram: bytes | memoryview) -> bool:
    """Whether it is a record with a packet in it, and neither control nor handshake."""
    return len(datagram) > 15 and datagram[0] == 0x10 and not datagram[15] & 0x80


def place(address: Address) -> Address:
    """The UDP address below a carrier's own."""
    return Address(address.ip, address.port, address.scope)


class Alarm:
    """A call that waits for its time."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


LATE = 1e-6
"""Seconds after its time at which an alarm rings: a real clock moves on, too, between the two, and aioquic asks for a
timer at t + d and then whether t <= now - d, which rounding makes false where now is t + d exactly."""


class Alarms:
    """``call_later`` in the world's time, for as long as the process lives that asked for it."""

    def __init__(self, later: Callable[..., None]) -> None:
        self._later = later
        self.dead = False

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        alarm = Alarm(callback)
        self._later(max(0.0, seconds) + LATE, self._ring, alarm)
        return alarm

    def _ring(self, alarm: Alarm) -> None:
        if alarm.callback is not None and not self.dead:
            alarm.callback()


class Watcher(Protocol):
    """Who sees every datagram of ours at a carrier's edges (:class:`~tests.simnet.world.SimNetwork`)."""

    def swallows(self, source: Address, destination: Address, datagram: bytes) -> bool:
        """Looks at a datagram before it is sent; True: it vanishes here."""

    taken: set[bytes]
    """Receive index and counter of each data record that a carrier took,"""
    brought: set[bytes]
    """and of each that one brought."""


class Edge(Layer):
    """Between a site and its carrier."""

    def __init__(self, lower: Bind, watcher: Watcher) -> None:
        super().__init__(lower)
        self._watcher = watcher

    def send_batch(self, datagrams: Sequence[memoryview], address: Address) -> int:
        return self._each(datagrams, address, lambda one: self.lower.send_batch([one], address))

    def send_fragmentable(self, datagrams: Sequence[memoryview], address: Address) -> int:
        return self._each(datagrams, address, lambda one: self.lower.send_fragmentable([one], address))

    def send_segments(self, buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        cuts = [buffer[start : start + segment] for start in range(0, len(buffer), segment)]
        return self._each(cuts, address, lambda one: self.lower.send_segments(one, len(one), address, ecn))

    def _each(self, datagrams: Sequence[memoryview], address: Address, send: Callable[[memoryview], int]) -> int:
        for number, datagram in enumerate(datagrams):
            if self._watcher.swallows(self.local, place(address), bytes(datagram)):
                continue
            if not send(datagram):
                return number
            if is_data(datagram):
                self._watcher.taken.add(bytes(datagram[4:16]))
        return len(datagrams)

    def receive_batch(self, limit: int, descriptor: int = -1) -> list[Received]:
        batch = self.lower.receive_batch(limit, descriptor)
        for received in batch:
            for start in range(0, received.length, received.segment or 1):
                datagram = received.buffer[start : min(start + received.segment, received.length)]
                if is_data(datagram):
                    self._watcher.brought.add(bytes(datagram[4:16]))
        return batch


@cache
def certificate() -> Certificate:
    return self_made("localhost")


def over(carrier: str, lower: Bind, watcher: Watcher, clock: Callable[[], float], alarms: Alarms) -> Bind:
    """A site's bind."""
    if carrier == "udp":
        return lower
    return Edge(QuicBind(lower, certificate(), clock, alarms.call_later), watcher)


def reach(carrier: str, where: Address) -> Address:
    """The address under which a site's configuration has the other one."""
    return where if carrier == "udp" else parse_peer(where, {})
