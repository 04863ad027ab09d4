"""What a stranger may cost, counted: frames of a packet, datagrams of a connection, connections of a source.

And that he takes nothing from a peer: neither the way in nor a connection, whatever goes wrong in his own.
"""

from __future__ import annotations

import ipaddress
import os
import random
from collections import Counter
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from qvpn.netio.base import Address
from qvpn.transports.quic import links, shares
from qvpn.transports.quic.acceptor import OPENINGS, Acceptor, Open
from qvpn.transports.quic.connection import CRYPTO_BYTES, FRAMES, LEAST_FRAME, RANGES, Connection
from qvpn.transports.quic.links import HALF_OPEN_DATAGRAMS, STRANGERS, WORK
from qvpn.transports.quic.settings import parse_peer
from qvpn.transports.quic.shares import Shares, Sources
from tests.unit.transports.quic_world import (
    CLIENT,
    SERVER,
    World,
    initial,
    packet_of,
    pair,
    place,
    still_works,
    view,
)

LONG = os.environ.get("QVPN_TEST_LONG") == "1"


def varint(value: int) -> bytes:
    return (value | 0x8000_0000).to_bytes(4)


ACK_OF_MANY = b"\x02" + varint(9000) + b"\0" + varint(RANGES + 1) + b"\0" + b"\0\0" * (RANGES + 1)
TOO_MUCH = {
    "pings": b"\x01" * 922,
    "empty datagrams": b"\x31\0" * 461,
    "datagrams of one byte": b"\x31\x01x" * 307,
    "limits raised": b"\x10\x05" * 461,
    "connection IDs retired": b"\x19\x01" * 461,
    "ranges": ACK_OF_MANY,
    "a long handshake": b"\x06" + varint(CRYPTO_BYTES) + b"\x01x",
    "a stream": b"\x08\x00",
    "128 streams at once": b"\x0a" + varint(127 * 4) + b"\x01x",
}


@pytest.mark.parametrize("payload", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_packet_that_asks_for_too_much_ends_its_connection_early(
    payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    other, _ = world.end(place(3))
    other.send_batch(view(b"\x10peer"), parse_peer(SERVER, {}))
    world.run(0.5)
    (stranger,) = (each for each in server.links if each.place == CLIENT)
    inside: Any = stranger.quic
    handled: Counter[int] = Counter()
    for kind, (handler, epochs) in list(inside._frames.items()):

        def counted(context: Any, frame: int, buf: Any, handler: Any = handler) -> None:
            handled[frame] += 1
            handler(context, frame, buf)

        inside._frames[kind] = (counted, epochs)
    world.network.inject(CLIENT, SERVER, packet_of(client.links[0], payload))
    world.run(0.001)
    assert sum(handled.values()) <= FRAMES + len(payload) // LEAST_FRAME
    assert inside.closing and sum(server.counts().get(name, 0) for name in ("excess", "protocol_errors")) == 1
    assert not inside._streams and not stranger.inbox
    world.run(2)
    assert stranger not in server.links and server.errors.get("quic_internal", 0) == 0
    still_works(world, other, at_server)


def test_the_handshake_of_a_stranger_keeps_little_memory() -> None:
    """Pieces of TLS far from the start, which aioquic would keep room for, and a message that never ends."""
    world = World()
    server, _, client, _ = pair(world)
    for payload in (b"\x06" + varint(60_000) + b"\x01x", b"\x06\0\x04\x04\xff\xff\xff"):
        world.network.inject(CLIENT, SERVER, packet_of(client.links[0], payload))
    world.run(0.01)
    for number in range(100):
        body = b"\x06" + varint(4 + number * 1100) + b"\x44\x4c" + bytes(1100)
        world.network.inject(CLIENT, SERVER, packet_of(client.links[0], body))
        world.run(0.001)
        for each in server.links:
            inside: Any = each.quic
            kept = sum(len(stream.receiver._buffer) for stream in inside._crypto_streams.values())
            assert kept + len(inside.tls._receive_buffer) <= 2 * CRYPTO_BYTES
    assert server.counts()["excess"] == 1


def test_what_an_unproved_connection_sends_is_opened_up_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    server, _, client, _ = pair(world)
    opened = [0]
    original = Connection.receive_datagram

    def counted(self: Connection, data: bytes, addr: Address, now: float) -> None:
        opened[0] += addr == CLIENT
        original(self, data, addr, now)

    monkeypatch.setattr(Connection, "receive_datagram", counted)
    packets = [packet_of(client.links[0], b"\x31\x05\x10data") for _ in range(int(WORK.burst) + 1000)]
    started = world.network.now
    for packet in packets:
        world.network.inject(CLIENT, SERVER, packet)
        world.run(0.001)
    most = WORK.burst + WORK.each * (world.network.now - started) + 1
    assert most - 50 < opened[0] <= most
    assert server.counts()["unproved_dropped"] >= len(packets) - most
    server.connect(server.links[0].address)  # a record has shown that it is a peer's
    before = opened[0]
    for _ in range(200):
        world.network.inject(CLIENT, SERVER, packet_of(client.links[0], b"\x31\x05\x10data"))
    world.run(0.01)
    assert opened[0] - before >= 200


def test_a_half_open_connection_gets_few_looks() -> None:
    world = World()
    server, _ = world.end(SERVER)
    first = initial(world, CLIENT)
    for _ in range(300):
        world.network.inject(CLIENT, SERVER, first)
        world.run(0.001)
    (link,) = server.links
    assert server.counts()["unproved_dropped"] == 300 - HALF_OPEN_DATAGRAMS and not link.up


# shares


def test_strangers_in_any_number_leave_an_expected_source_and_a_newcomer_their_part() -> None:
    openings, chance, granted = Shares(OPENINGS), random.Random(3), Counter[str]()
    crowd = [f"stranger {number}" for number in range(400)]
    tried = Counter[str]()
    for step in range(6000 if LONG else 1200):
        now = step / 20
        for source in chance.sample(crowd, 40):
            granted["crowd"] += openings.take(source, now)
        if step >= 200 and step % 20 == 0:
            tried["each"] += 1
            granted["expected"] += openings.take("peer", now, expected=True)
            granted["newcomer"] += openings.take(f"newcomer {step}", now)
    assert granted["expected"] == granted["newcomer"] == tried["each"]
    assert granted["crowd"] <= OPENINGS.together_burst + OPENINGS.together * now


def test_one_source_has_its_share_and_no_more() -> None:
    one = Shares(OPENINGS)
    assert sum(one.take("one", step / 100) for step in range(1000)) == OPENINGS.burst + 9 * OPENINGS.each + 1
    assert one.take("another", 10.0)
    for number in range(3 * shares.REMEMBERED):
        one.take(number, 1e6 + number, expected=True)
    assert len(one._sources) <= shares.REMEMBERED


def test_what_is_one_source() -> None:
    sources = Sources()
    six = [Address(ipaddress.ip_address(f"2001:db8:{net}::{host}"), 443) for net, host in ((1, 1), (1, 2), (2, 1))]
    assert sources.of(six[0]) == sources.of(six[1]) != sources.of(six[2])
    assert sources.of(place(1, 1)) == sources.of(place(1, 2)) != sources.of(place(2))
    sources.expect(six[0])
    assert sources.of(six[0]) != sources.of(six[1]) and sources.expects(Address(six[0].ip, 9))
    assert not sources.expects(six[1])
    for number in range(2 * shares.REMEMBERED):
        sources.expect(place(number))
    assert len(sources._expected) <= shares.REMEMBERED


def with_token(judge: Acceptor, source: Address, now: float) -> Any:
    """The verdict over a client that received the Retry."""
    quic = QuicConnection(configuration=QuicConfiguration(alpn_protocols=["h3"], server_name="x"))
    quic.connect(SERVER, now)
    answer = judge.decide(bytes(quic.datagrams_to_send(now)[0][0]), source, now, crowded=True)
    assert isinstance(answer, bytes)
    quic.receive_datagram(answer, SERVER, now)
    return judge.decide(bytes(quic.datagrams_to_send(now)[0][0]), source, now, crowded=True)


def test_a_forged_source_uses_up_nothing_of_whoever_has_it() -> None:
    judge, forged = Acceptor(), initial(World(), CLIENT)
    for number in range(2000):
        data = bytearray(forged)
        data[6:14] = number.to_bytes(8)
        judge.decide(bytes(data), CLIENT, 10.0, crowded=False)
    for _ in range(int(OPENINGS.burst)):
        assert isinstance(with_token(judge, CLIENT, 10.0), Open)
    assert with_token(judge, CLIENT, 10.0) is None
    assert isinstance(with_token(judge, place(8), 10.0), Open)


def test_many_prefixes_do_not_keep_a_configured_peer_out() -> None:
    """Strangers from many places who all do receive there, against one who stands in the configuration."""
    world = World()
    server, at_server = world.end(SERVER)
    server.expect(CLIENT)
    crowd = [world.end(place(5000 + number // 6, 1000 + number))[0] for number in range(150 if LONG else 96)]

    def all_dial() -> None:
        for each in crowd:
            each.send_batch(view(b"\x10stranger"), parse_peer(SERVER, {}))

    for _ in range(3):
        all_dial()
        world.run(0.4)
    client, _ = world.end(CLIENT)
    at_server.clear()
    client.send_batch(view(b"\x10peer"), parse_peer(SERVER, {}))
    world.run(0.3)
    assert b"\x10peer" in at_server
    for _ in range(4):
        all_dial()
        world.run(0.5)
    at_server.clear()
    client.send_batch(view(b"\x10still"), parse_peer(SERVER, {}))
    world.run(0.2)
    assert b"\x10still" in at_server and client.counts()["opened"] == 1
    assert len(server.links) <= STRANGERS and server.counts()["strangers_ended"] > 0


def test_where_both_dial_the_connection_that_a_peer_opened_is_kept_too() -> None:
    """He sends by it, whatever we send by."""
    world = World()
    left, _at_left = world.end(SERVER)
    right, _at_right = world.end(CLIENT)
    for end, to in ((left, CLIENT), (right, SERVER)):
        end.connect(parse_peer(to, {}))
    world.run(0.5)
    for end, to in ((left, CLIENT), (right, SERVER)):
        end.send_batch(view(b"\x10"), parse_peer(to, {}))
    world.run(0.5)
    for end in (left, right):
        (came,) = (each for each in end.links if not each.client)
        end.connect(came.address)  # what the plane does each second with where a verified record came from
        assert came.kept and came.known
    for _ in range(60):
        for end, to in ((left, CLIENT), (right, SERVER)):
            end.send_batch(view(b"\x10"), parse_peer(to, {}))
        world.run(1)
    assert left.counts()["opened"] == right.counts()["opened"] == 1 and len(left.links) == 2
    left.disconnect(parse_peer(CLIENT, {}))
    left.disconnect(next(each.address for each in left.links))
    assert not any(each.kept for each in left.links)


# mistakes


class Mishap(Exception):
    """Not one of aioquic's."""


WHERE = [
    "handle_timer",
    "get_timer",
    "datagrams_to_send",
    "next_event",
    "receive_datagram",
    "get_peer_address",
    "seal",
]


@pytest.mark.parametrize("name", WHERE)
def test_a_mistake_in_one_connection_ends_that_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    log: list[str] = []

    class Log:
        def error(self, event: str, **_: Any) -> None:
            log.append(event)

    server, at_server = world.end(SERVER, log=Log())
    ends = [world.end(place(number))[0] for number in (2, 3)]
    for each in ends:
        each.send_batch(view(b"\x10hello"), parse_peer(SERVER, {}))
    world.run(0.5)
    hit, other = server.links

    def fail(*_: Any, **__: Any) -> Any:
        raise Mishap

    setattr(hit.quic, name, fail)
    for _ in range(50):
        ends[0].send_batch(view(b"\x10more"), parse_peer(SERVER, {}))
        server.send_segments(memoryview(b"\x10answer"), 7, hit.address)
        world.run(0.05)
        if hit not in server.links:
            break
    assert hit not in server.links and server.errors["quic_internal"] >= 1 and len(log) == 1
    assert other in server.links
    still_works(world, ends[1], at_server)
    assert hit.timer is None


@pytest.mark.parametrize("name", ["connect", "__init__"])
def test_a_mistake_in_opening_is_told_and_tried_again_later(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    _server, at_server = world.end(SERVER)
    client, _ = world.end(CLIENT)

    def fail(*_: Any, **__: Any) -> Any:
        raise Mishap

    with monkeypatch.context() as patched:
        patched.setattr(Connection, name, fail)
        assert client.send_batch(view(b"\x10x"), parse_peer(SERVER, {})) == 0
        world.network.inject(place(9), SERVER, initial(world, place(9)))
        world.run(0.1)
    assert client.errors["quic_internal"] == 1 and client.links == []
    world.run(links.REDIAL)
    client.send_batch(view(b"\x10x"), parse_peer(SERVER, {}))
    world.run(0.5)
    assert at_server == [b"\x10x"]


def test_a_connection_that_is_being_closed_is_replaced_at_once() -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    world.run(1)
    (gone,) = client.links
    server._links.end(server.links[0])
    world.run(0.05)
    assert gone.quic.closing
    client.send_batch(view(b"\x10again"), parse_peer(SERVER, {}))
    world.run(0.3)
    assert at_server == [b"\x10again"] and gone not in client.links
