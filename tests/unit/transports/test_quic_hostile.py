"""The QUIC bind against strangers, floods, junk and slow links: it lives, what it keeps is bounded, what it sends to
nobody in particular is small."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from qvpn.netio.base import Address, Received
from qvpn.netio.memory import Impairments, MemoryBind
from qvpn.transports.base import BadTransport
from qvpn.transports.quic import acceptor, certificate, link, pacer, queue
from qvpn.transports.quic.links import HALF_OPEN_LIFE, STRANGERS
from qvpn.transports.quic.parts import WAITING, Joiner, Splitter
from qvpn.transports.quic.settings import parse_peer, parse_settings
from tests.unit.transports.quic_world import (
    CERTIFICATE,
    CLIENT,
    LONG,
    SERVER,
    World,
    initial,
    pair,
    place,
    still_works,
    view,
)

# what of aioquic's insides is relied on


def test_aioquic_takes_our_queue_and_our_pacer_and_says_when_a_packet_verified() -> None:
    world = World()
    _, _, client, _ = pair(world)
    (connection,) = client.links
    inside: Any = connection.quic
    assert inside._datagrams_pending is connection.queue
    assert isinstance(inside._loss._pacer, pacer.BatchPacer) and inside._loss._pacer._rate > 0
    assert connection.last_heard > connection.since


def test_the_longest_datagram_makes_a_packet_of_the_configured_size() -> None:
    world = World()
    _, at_server, client, _ = pair(world)
    seen: list[int] = []
    world.network.tap = lambda source, destination, data: seen.append(len(data))
    most = client.max_payload(parse_peer(SERVER, {}))
    assert most == 1370
    client.send_batch(view(b"\x10" * most), parse_peer(SERVER, {}))
    world.run(0.1)
    assert max(seen) == 1400 and [len(data) for data in at_server] == [1370]


# strangers


def test_a_stranger_gets_nothing_for_what_is_no_first_packet() -> None:
    world = World()
    server, _ = world.end(SERVER)
    chance = random.Random(5)
    for _ in range(3000 if LONG else 500):
        data = bytearray(chance.randbytes(chance.randrange(1, 1400)))
        data[0] |= 0x40
        if chance.random() < 0.5:
            data[0] &= 0x7F  # a short header of no connection
        elif len(data) > 5:
            data[1:5] = chance.choice([b"\0\0\0\0", b"\0\0\0\1", b"\x6b\x33\x43\xcf"])
            data[5] = chance.randrange(21)
        world.network.inject(place(9), SERVER, bytes(data))
        world.run(0.001)
    # An Initial of any content may open a connection, which answers nothing to what does not verify.
    assert world.sent.get(SERVER, 0) == 0 or server.counts().get("answered_without_state", 0) > 0
    world.run(HALF_OPEN_LIFE + 1)
    assert server.links == []


def test_an_unknown_version_gets_the_list_of_ours_and_never_more_than_it_sent() -> None:
    world = World()
    server, _ = world.end(SERVER)
    head = b"\xc0\x1a\x2a\x3a\x4a" + b"\x08" + bytes(8) + b"\x08" + bytes(8)
    world.network.inject(place(9), SERVER, head.ljust(1200, b"\0"))
    world.run(0.1)
    assert 0 < world.sent[SERVER] < 100 and server.links == []
    world.network.inject(place(9), SERVER, head.ljust(1199, b"\0"))
    world.run(0.1)
    assert world.sent[SERVER] < 100


def test_a_flood_of_first_packets_gets_retries_and_known_peers_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    """From forged addresses: what is remembered is bounded, what is sent back is less than what came."""
    world = World()
    server, at_server, client, _ = pair(world)
    server.connect(server.links[0].address)  # a peer proved itself there
    template = bytearray(initial(world, place(100)))
    sent = world.sent[SERVER]
    floods, most = (3000 if LONG else 300), 0
    for number in range(floods):
        if number % 10 == 0:
            template = bytearray(initial(world, place(100)))
        else:  # of another connection, and it does not even verify
            template[6:14] = number.to_bytes(8, "big")
        world.network.inject(place(1000 + number), SERVER, bytes(template))
        world.run(0.01)
        most = max(most, len(server.links))
    assert most <= STRANGERS + 1
    retries = server.counts()["answered_without_state"]
    assert retries > floods / 3
    opened = server.counts()["accepted"]
    assert world.sent[SERVER] - sent < 3 * 1200 * opened + 200 * floods
    still_works(world, client, at_server)
    world.run(HALF_OPEN_LIFE + 2)
    assert len(server.links) == 1
    assert capsys.readouterr() == ("", "")


def test_under_a_flood_a_client_gets_in_by_a_retry() -> None:
    world = World()
    server, at_server = world.end(SERVER)
    for number in range(40):
        world.network.inject(place(1000 + number), SERVER, initial(world, place(9)))
    world.run(0.1)
    client, _ = world.end(CLIENT)
    before = server.counts()["answered_without_state"]
    client.send_batch(view(b"\x10in"), parse_peer(SERVER, {}))
    world.run(1.0)
    assert at_server == [b"\x10in"]
    assert server.counts()["answered_without_state"] > before


def test_a_token_is_worth_nothing_at_another_address() -> None:
    judge, now = acceptor.Acceptor(), 10.0
    world = World()
    first = initial(world, place(5))
    retry = judge.decide(first, place(5), now, crowded=True)
    assert isinstance(retry, bytes) and len(retry) < len(first)
    quic = QuicConnection(configuration=QuicConfiguration(alpn_protocols=["h3"], server_name="x"))
    quic.connect(SERVER, now)
    original = bytes(quic.datagrams_to_send(now)[0][0])
    answer = judge.decide(original, place(5), now, crowded=True)
    assert isinstance(answer, bytes)
    quic.receive_datagram(answer, SERVER, now)
    second = bytes(quic.datagrams_to_send(now)[0][0])
    assert judge.decide(second, place(6), now, crowded=True) is None
    assert judge.decide(second, place(5), now + 31, crowded=True) is None
    assert isinstance(judge.decide(second, place(5), now, crowded=True), acceptor.Open)


def test_strangers_that_open_connections_are_ended_and_do_not_crowd_a_peer_out() -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    server.connect(server.links[0].address)
    others = [world.end(place(3000 + number))[0] for number in range(91 if LONG else 70)]  # sevens: all are through
    for number, other in enumerate(others):
        other.send_batch(view(b"\x10stranger"), parse_peer(SERVER, {}))
        if number % 7 == 6:
            world.run(1.0)
    assert len(server.links) <= STRANGERS + 1
    still_works(world, client, at_server)
    for other in others:
        other.close()
    world.run(60)
    assert len(server.links) <= 1  # the peer said nothing either, and QUIC ends what is idle
    still_works(world, client, at_server)
    assert len(server.links) == 1


def test_one_source_with_many_connections_does_not_end_another_s() -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    (mine,) = server.links
    for number in range(70):
        other, _ = world.end(place(3000, 1000 + number))
        other.send_batch(view(b"\x10stranger"), parse_peer(SERVER, {}))
        if number % 7 == 6:
            world.run(1.0)
    assert len(server.links) <= STRANGERS and server.counts()["strangers_ended"] > 0
    assert mine in server.links
    still_works(world, client, at_server)


def test_several_peers_share_one_listener() -> None:
    world = World()
    server, at_server = world.end(SERVER)
    ends = {number: world.end(place(500 + number)) for number in range(6)}
    for number, (bind, _) in ends.items():
        bind.send_batch(view(b"\x10from %d" % number), parse_peer(SERVER, {}))
    world.run(1)
    assert sorted(at_server) == [b"\x10from %d" % number for number in ends]
    for each in server.links:
        number = next(n for n in ends if place(500 + n) == each.place)
        server.send_batch(view(b"\x10to %d" % number), each.address)
    world.run(0.5)
    assert {number: got for number, (_, got) in ends.items()} == {number: [b"\x10to %d" % number] for number in ends}


# what comes inside a connection


def test_junk_frames_end_up_as_datagrams_or_nothing_and_memory_stays() -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    chance = random.Random(11)
    for _ in range(2000 if LONG else 300):
        data = chance.randbytes(chance.choice([0, 1, 3, 4, 5, 100, 1370]))
        if chance.random() < 0.5:
            data = b"\x20" + data[1:]
        client.send_batch(view(data), parse_peer(SERVER, {}))
        world.run(0.01)
    assert all(data for data in at_server)
    assert all(len(each._joiner._waiting) <= WAITING for each in server.links)
    still_works(world, client, at_server)


def test_streams_carry_nothing_and_keep_nothing() -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    (connection,) = client.links
    quic = connection.quic
    for _ in range(200):
        quic.send_stream_data(quic.get_next_available_stream_id(), b"x" * 5000)
    still_works(world, client, at_server)
    inside: Any = server.links[0].quic
    assert not inside._streams and not inside._streams_queue


def test_altered_packets_are_dropped_and_the_connection_lives() -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    chance, recorded = random.Random(13), []
    world.network.tap = lambda source, destination, data: recorded.append((source, destination, data))
    still_works(world, client, at_server)
    world.network.tap = None
    for source, destination, data in recorded * (10 if LONG else 2):
        changed = bytearray(data)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        world.network.inject(source, destination, bytes(changed))
        world.network.inject(place(77), destination, bytes(changed))
        world.network.inject(place(78), destination, data)  # an old packet from elsewhere moves nothing
        world.run(0.002)
    still_works(world, client, at_server)
    assert [each.address.place for each in server.links if each.up] == [CLIENT]


def test_a_burst_of_long_frames_is_handed_on_in_pieces_that_fit() -> None:
    """On a jumbo path any stranger may send them: 64 of 8 kB are more than one buffer holds."""
    world = World(path_payload=9000)
    server, *_ = pair(world, max_datagram_size=9000)
    connection = server.links[0]
    connection.inbox += [b"\x10%d" % number + bytes(8000) for number in range(60)] + [b"\x10" + bytes(65_000)] * 3
    batch: list[Received] = []
    server._deliver(connection, batch, 0.0)
    assert sum(-(-received.length // received.segment) for received in batch) == 63
    assert not connection.inbox


# queues


def test_a_slow_link_drops_what_is_late_and_says_so() -> None:
    """A link of about 2 Mbit/s, offered 20: what arrives is fresh, the rest is counted."""
    world = World()
    _, at_server, client, _ = pair(world)
    lower = client.lower
    assert isinstance(lower, MemoryBind)
    to, delays, budget = parse_peer(SERVER, {}), [], [0.0, world.network.now]
    original = world.network._carry

    def narrow(source: Address, destination: Address, datagram: bytes, ecn: int) -> None:
        """A token bucket of 8 datagrams; what is more is lost."""
        now = world.network.now
        budget[0] = min(8 * 1400.0, budget[0] + (now - budget[1]) * 250_000)
        budget[1] = now
        if source != CLIENT or budget[0] >= len(datagram):
            budget[0] -= len(datagram) if source == CLIENT else 0
            original(source, destination, datagram, ecn)

    world.network._carry = narrow  # type: ignore[method-assign]
    for step in range(1500):
        stamp = b"\x10" + int(world.network.now * 1e6).to_bytes(8, "big")
        client.send_segments(memoryview(stamp.ljust(1300, b"\0") * 2), 1300, to)
        world.run(0.001)
        if step > 500:
            delays += [world.network.now - int.from_bytes(data[1:9], "big") / 1e6 for data in at_server]
        at_server.clear()
        assert all(len(each.queue) <= queue.BULK + queue.URGENT for each in client.links)
    assert len(delays) > 50
    assert sorted(delays)[len(delays) * 95 // 100] < 0.1
    assert client.errors.get("quic_stale", 0) + client.errors.get("quic_queue_full", 0) > 100


def test_control_goes_before_packets() -> None:
    waiting = queue.DatagramQueue()
    assert all(waiting.put(b"bulk", 0.0) for _ in range(queue.BULK))
    assert not waiting.put(b"bulk", 0.0)
    assert waiting.put(b"control", 0.0, urgent=True)
    assert waiting[0] == waiting.popleft() == b"control"
    assert waiting.drop_stale(queue.AGE + 0.01, round_trip=0.2) == (0, 0)
    assert waiting.drop_stale(queue.AGE + 0.01) == (queue.BULK, 4 * queue.BULK) and not waiting


def test_before_a_connection_is_open_little_is_kept() -> None:
    world = World()
    client, _ = world.end(CLIENT)
    to = parse_peer(SERVER, {})  # nobody is there
    for _ in range(400):
        client.send_segments(memoryview(b"\x10" * 1300 * 10), 1300, to)
        world.run(0.05)
        assert all(len(each.queue) <= queue.BULK for each in client.links) and len(client.links) <= 1
    assert sum(client.errors.values()) > 100


def test_an_address_that_nobody_configured_is_never_dialled() -> None:
    from qvpn.transports.quic.address import over_quic

    world = World()
    client, _ = world.end(CLIENT)
    client.connect(over_quic(SERVER))
    assert client.send_batch(view(b"\x10x"), over_quic(SERVER)) == 0
    assert client.links == [] and client.errors["quic_not_connected"] == 1


# parts


def test_two_parts_are_one_datagram_in_any_order_and_half_is_none() -> None:
    splitter, joiner = Splitter(), Joiner()
    one, other = os.urandom(1321), os.urandom(1400)
    (a, b), (c, d) = splitter.split(one), splitter.split(other)
    assert joiner.join(b) is None and joiner.join(c) is None
    assert joiner.join(a) == one and joiner.join(d) == other
    assert joiner.join(a) is None and joiner.join(a) is None
    for _ in range(1000):
        joiner.join(splitter.split(one)[0])
    assert len(joiner._waiting) <= WAITING
    for junk in (b"", b"\x20", b"\x20\x00\x00\x01", b"\x20\x02\x00\x01x", b"\x20\x00\x00\x01" + bytes(5000)):
        assert joiner.join(junk) is None


def test_a_narrow_path_carries_whole_records_in_two_frames() -> None:
    world = World(path_payload=1260)
    server, at_server, client, _ = pair(world)
    to = parse_peer(SERVER, {})
    record = b"\x10" + os.urandom(1321)
    assert client.send_batch(view(record), to) == 1
    world.run(0.3)
    assert at_server == []  # a frame of that length is lost on the way
    assert client.send_fragmentable(view(record), to) == 1
    world.run(0.3)
    assert at_server == [record]
    assert server.links[0].up


def test_lost_probes_of_the_path_do_not_slow_the_connection_down() -> None:
    world = World(path_payload=1260)
    _, at_server, client, _ = pair(world)
    to, inside = parse_peer(SERVER, {}), client.links[0].quic
    window: Any = inside
    for _ in range(20):
        client.send_batch(view(*(b"\x10" * size for size in range(1240, 1370, 13))), to)
        world.run(0.2)
    assert window._loss.congestion_window >= 10_000 and window._loss._pto_count == 0
    assert window._loss.bytes_in_flight == 0
    assert not at_server
    still_works(world, client, at_server)
    at_server.clear()
    world.network.impair_all(Impairments(delay=0.005))
    client.send_batch(view(b"\x10" * 1369, b"\x10" * 1370), to)
    world.run(0.1)
    assert [len(data) for data in at_server] == [1369, 1370]


# certificates


def test_a_pin_lets_its_certificate_in_and_no_other() -> None:
    right = certificate.fingerprint(CERTIFICATE.leaf).hex()
    for pin, arrives in ((right, True), ("00" * 32, False)):
        world = World()
        _, at_server = world.end(SERVER)
        client, _ = world.end(CLIENT)
        client.send_batch(view(b"\x10pinned"), parse_peer(SERVER, {"pin": pin}))
        world.run(1)
        assert (at_server == [b"\x10pinned"]) is arrives
        assert bool(client.errors.get("quic_pin")) is not arrives


def test_alpn_must_agree() -> None:
    world = World()
    _, at_server = world.end(SERVER, alpn=["other"])
    client, _ = world.end(CLIENT)
    client.send_batch(view(b"\x10x"), parse_peer(SERVER, {}))
    world.run(2)
    assert at_server == []


def test_a_certificate_with_its_chain_is_read_as_acme_clients_write_it() -> None:
    made, other = certificate.self_made("gw.example"), certificate.self_made("x")
    pem = certificate.to_pem(made)
    read = certificate.load(pem + certificate.to_pem(other), pem)
    assert read.leaf == made.leaf and read.chain == (other.leaf,)
    for leaf, key, problem in (
        (b"", pem, "holds no certificate"),
        (pem, b"junk", "holds no private key"),
        (certificate.to_pem(other), pem, "is not the key of the certificate"),
    ):
        with pytest.raises(BadTransport, match=problem):
            certificate.load(leaf, key)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"nosuch": 1}, "nosuch"),
        ({"certificate": "c.pem"}, "private_key"),
        ({"private_key": "k.pem"}, "certificate"),
        ({"certificate": 1}, "certificate"),
        ({"max_datagram_size": 1199}, "max_datagram_size"),
        ({"max_datagram_size": True}, "max_datagram_size"),
        ({"alpn": []}, "alpn"),
        ({"alpn": [3]}, "alpn"),
        ({"server_name": "a b"}, "server_name"),
    ],
)
def test_wrong_settings_name_their_key(table: dict[str, Any], key: str) -> None:
    with pytest.raises(BadTransport) as found:
        parse_settings(table)
    assert found.value.key == key


@pytest.mark.parametrize("table", [{"pin": "xyz"}, {"pin": 3}, {"server_name": "-"}, {"nosuch": 1}])
def test_wrong_settings_of_a_peer_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(BadTransport):
        parse_peer(SERVER, table)


def test_where_both_ends_dial_each_keeps_to_one_connection_and_order_holds() -> None:
    world = World()
    left, at_left = world.end(SERVER)
    right, at_right = world.end(CLIENT)
    for number in range(120):
        left.send_batch(view(b"\x10%d" % number), parse_peer(CLIENT, {}))
        right.send_batch(view(b"\x10%d" % number), parse_peer(SERVER, {}))
        world.run(0.003)
    world.run(0.1)
    expected = [b"\x10%d" % number for number in range(120)]
    assert sorted(at_left) == sorted(at_right) == sorted(expected)
    assert at_left[20:] == at_right[20:] == expected[20:]  # the first may go by the connection that opens later
    assert len(left.links) <= 2 and all(each.up for each in left.links)
    left.links[0].quic.close()  # either may go, and the other one carries on
    left.send_batch(view(b"\x10lost"), parse_peer(CLIENT, {}))
    world.run(0.5)
    at_right.clear()
    left.send_batch(view(b"\x10on"), parse_peer(CLIENT, {}))
    world.run(2)
    assert at_right == [b"\x10on"]


def test_a_client_that_starts_again_takes_its_address_over() -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    back = server.links[0].address
    server.connect(back)
    lower = client.lower
    assert isinstance(lower, MemoryBind)
    lower.close()  # as kill -9: QUIC says nothing
    again, at_client = world.end(CLIENT)
    again.send_batch(view(b"\x10again"), parse_peer(SERVER, {}))
    world.run(0.5)
    assert at_server == [b"\x10again"]
    newer = server.links[1].address
    assert newer == back and server.send_batch(view(b"\x10answer"), newer) == 1
    world.run(0.5)
    assert at_client == [b"\x10answer"]  # to whoever asked
    server.connect(newer)  # a record verified that came by it
    assert server.send_batch(view(b"\x10all"), back) == 1
    world.run(0.5)
    assert at_client == [b"\x10answer", b"\x10all"]


def test_a_stranger_that_forges_one_source_address_gets_nothing_of_a_peer() -> None:
    world = World()
    server, _, _, at_client = pair(world)
    back = server.links[0].address
    server.connect(back)
    eve, at_eve = world.end(place(66))
    eve.send_batch(view(b"\x10stranger"), parse_peer(SERVER, {}))
    world.run(0.5)
    taken: list[bytes] = []
    lower = eve.lower
    assert isinstance(lower, MemoryBind)
    send = lower.send_segments
    lower.send_segments = lambda buffer, *_: taken.append(bytes(buffer)) or 1  # type: ignore[method-assign,func-returns-value]
    eve.send_batch(view(b"\x10forged"), parse_peer(SERVER, {}))
    lower.send_segments = send  # type: ignore[method-assign]
    world.network.inject(CLIENT, SERVER, taken[0])
    for number in range(10):
        world.run(1)
        server.connect(back)
        server.send_batch(view(b"\x10%d" % number), back)
    world.run(1)
    assert at_client == [b"\x10%d" % number for number in range(10)] and at_eve == []
    assert [each.kept for each in server.links] == [True, False]


def test_a_connection_that_moves_on_and_on_leaves_few_addresses() -> None:
    world = World()
    server, _, client, _ = pair(world)
    for number in range(30):
        taken: list[bytes] = []
        lower = client.lower
        assert isinstance(lower, MemoryBind)
        send = lower.send_segments
        lower.send_segments = lambda buffer, *_: taken.append(bytes(buffer)) or 1  # type: ignore[method-assign,func-returns-value]  # noqa: B023
        client.send_batch(view(b"\x10"), parse_peer(SERVER, {}))
        lower.send_segments = send  # type: ignore[method-assign]
        for packet in taken:
            world.network.inject(place(7000 + number), SERVER, packet)
        world.run(0.02)
    assert server.links[0].place == place(7029)
    assert len(server._links.index.at) <= 6


def test_a_connection_is_found_by_every_name_that_it_told_the_other_end() -> None:
    world = World()
    server, at_server, client, _ = pair(world)
    inside: Any = server.links[0].quic
    assert len(inside._host_cids) > 2 and {each.cid for each in inside._host_cids} <= set(server._links.index.by_cid)
    for _ in range(5):
        client.links[0].quic.change_connection_id()
        still_works(world, client, at_server)
    assert len(server.links) == 1 and len(server._links.index.by_cid) <= 9


def test_what_waits_for_the_next_call_has_memory_of_its_own() -> None:
    world = World()
    server, _, _, _ = pair(world)
    port, (connection,) = bytearray(100), server.links
    full = Received(memoryview(port), 100, 50, CLIENT)

    def receive(limit: int, descriptor: int = -1) -> list[Received]:
        port[:50], port[50:] = b"\x10" * 50, b"\x40" * 50  # a datagram of ours and a QUIC packet
        return [full] * limit

    def packet(data: bytes, where: Address, now: float) -> link.Link:
        connection.inbox += [b"\x10" * 40, b"\x10" * 50]  # two lengths: two receives
        return connection

    server.lower.receive_batch = receive  # type: ignore[method-assign]
    server._links.receive = packet  # type: ignore[method-assign,assignment]
    for _ in range(500):
        for received in server.receive_batch(4 if len(server._arrived) != 4 else 3):
            assert set(bytes(received.buffer[: received.length])) == {0x10}
        port[:] = b"\xff" * 100
    assert len(server._buffers) <= 8
