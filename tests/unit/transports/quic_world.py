"""QUIC binds in virtual time over the hostile in-memory network."""

from __future__ import annotations

import heapq
import ipaddress
import os
from collections.abc import Callable
from typing import Any

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.tls import Epoch

from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments, MemoryNetwork
from qvpn.transports.quic import certificate
from qvpn.transports.quic.bind import QuicBind
from qvpn.transports.quic.link import Link
from qvpn.transports.quic.settings import parse_peer

CERTIFICATE = certificate.self_made("localhost")
LONG = os.environ.get("QVPN_TEST_LONG") == "1"


def place(number: int, port: int = 443) -> Address:
    return Address(ipaddress.ip_address((192 << 24) | number), port)


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class World:
    """Binds in virtual time; each one's datagrams are in ``got``."""

    def __init__(self, seed: int = 3, **impairments: Any) -> None:
        self.network = MemoryNetwork(seed, Impairments(delay=0.005, **impairments))
        self._timers: list[tuple[float, int, Timer]] = []
        self._number = 0
        self.sent: dict[Address, int] = {}
        self.network.tap = self._count

    def _count(self, source: Address, destination: Address, datagram: bytes) -> None:
        self.sent[source] = self.sent.get(source, 0) + len(datagram)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        self._number += 1
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.network.now + seconds, self._number, timer))
        return timer

    def end(self, where: Address, **settings: Any) -> tuple[QuicBind, list[bytes]]:
        clock = lambda: self.network.now  # noqa: E731
        bind = QuicBind(
            self.network.bind(where), settings.pop("certificate", CERTIFICATE), clock, self.later, **settings
        )
        got: list[bytes] = []

        def take() -> None:
            for received in bind.receive_batch(16):
                step = received.segment or 1
                got.extend(
                    bytes(received.buffer[n : min(n + step, received.length)])
                    for n in range(0, received.length, step)
                )

        bind.on_readable(take)
        return bind, got

    def run(self, seconds: float) -> None:
        until = self.network.now + seconds
        while True:
            ahead = [self._timers[0][0]] if self._timers else []
            due = self.network.next_due()
            ahead += [] if due is None else [due]
            if not ahead or min(ahead) > until:
                break
            self.network.advance(min(ahead))
            while self._timers and self._timers[0][0] <= self.network.now:
                timer = heapq.heappop(self._timers)[2]
                if timer.callback is not None:
                    timer.callback()
        self.network.advance(until)


def view(*datagrams: bytes) -> list[memoryview]:
    return [memoryview(datagram) for datagram in datagrams]


SERVER, CLIENT = place(1), place(2)


def pair(world: World, **settings: Any) -> tuple[QuicBind, list[bytes], QuicBind, list[bytes]]:
    server, at_server = world.end(SERVER)
    client, at_client = world.end(CLIENT, **settings)
    assert client.send_batch(view(b"\x10hello"), parse_peer(SERVER, {})) == 1
    world.run(0.5)
    assert at_server == [b"\x10hello"]
    at_server.clear()
    return server, at_server, client, at_client


def still_works(world: World, client: QuicBind, at_server: list[bytes]) -> None:
    at_server.clear()
    for number in range(30):
        client.send_batch(view(b"\x10%d" % number), parse_peer(SERVER, {}))
        world.run(0.05)
    world.run(0.2)
    assert at_server == [b"\x10%d" % number for number in range(30)]


def initial(world: World, source: Address) -> bytes:
    quic = QuicConnection(configuration=QuicConfiguration(alpn_protocols=["h3"], server_name="x"))
    quic.connect(SERVER, world.network.now)
    return bytes(quic.datagrams_to_send(world.network.now)[0][0])


def packet_of(link: Link, payload: bytes) -> bytes:
    """A packet with these frames, whatever they are, as the other end of a connection might make it."""
    quic: Any = link.quic
    pair, number = quic._cryptos[Epoch.ONE_RTT], quic._packet_number
    quic._packet_number += 1
    head = bytes([0x41 | pair.key_phase << 2]) + quic._peer_cid.cid + (number & 0xFFFF).to_bytes(2)
    return bytes(pair.send.encrypt_packet(head, payload, number))
