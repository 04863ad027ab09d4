"""Sent means sent: what the queue of a connection drops is told, once, and is in no count of what was sent."""

from __future__ import annotations

from typing import Any

import pytest

from qvpn.dataplane.plane import Plane
from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments, MemoryTun
from qvpn.transports.quic import queue
from qvpn.transports.quic.bind import QuicBind
from qvpn.transports.quic.links import WORK
from qvpn.transports.quic.settings import parse_peer
from qvpn.tunnel.drops import DropReason
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, Recorder, epoch_pair, networks, numbered
from tests.unit.transports.quic_world import CLIENT, SERVER, World, pair, place

TO = parse_peer(SERVER, {})


def told(bind: QuicBind) -> tuple[int, int]:
    """(datagrams, bytes) over all addresses."""
    found = bind.unsent()
    assert {address for address, _, _ in found} <= {TO}
    return sum(each[1] for each in found), sum(each[2] for each in found)


def test_packets_wait_no_longer_than_a_second_whatever_the_round_trip() -> None:
    assert queue.patience(0.0) == queue.AGE and queue.patience(0.2) == pytest.approx(0.3)
    assert queue.patience(0.7) == queue.patience(60.0) == queue.MOST_AGE == 1.0


def test_the_queue_knows_how_much_of_its_bulk_waits() -> None:
    waiting = queue.DatagramQueue()
    for size in (5, 6, 7):
        waiting.put(bytes(size), float(size))
    waiting.put(b"urgent", 0.0, urgent=True)
    assert waiting.bulk == (3, 18)
    waiting.popleft()
    assert waiting.bulk == (3, 18)
    waiting.popleft()
    assert waiting.bulk == (2, 13)
    assert waiting.drop_stale(6.5) == (1, 6)
    waiting.put(b"urgent", 0.0, urgent=True)
    assert waiting.clear() == ((1, 7), 1) and waiting.bulk == (0, 0) and not waiting


@pytest.mark.parametrize("delay", [0.005, 0.1])
def test_what_was_taken_arrives_or_is_told(delay: float) -> None:
    """Nothing is lost on the way here; the window is small at first and packets wait too long."""
    world = World()
    world.network.impair_all(Impairments(delay=delay))
    server, _ = world.end(SERVER)
    client, _ = world.end(CLIENT)
    arrived: list[int] = []

    def take() -> None:
        arrived.extend(-(-received.length // received.segment) for received in server.receive_batch(16))

    server.on_readable(take)
    client.send_batch([memoryview(b"\x10hello")], TO)
    world.run(2)
    arrived.clear()
    taken = 0
    for _ in range(12):
        taken += client.send_segments(memoryview(b"\x10" * 1300 * 40), 1300, TO)
        waiting, size = client.waiting(TO)
        assert size == 1300 * waiting
        world.run(0.01)
    world.run(3)
    assert client.waiting(TO) == (0, 0)
    datagrams, size = told(client)
    assert sum(arrived) + datagrams == taken > 100 and size == 1300 * datagrams
    assert client.errors.get("quic_stale", 0) == datagrams and (datagrams > 50 or delay < 0.1)
    assert told(client) == (0, 0)


def test_what_waits_when_a_connection_ends_is_told() -> None:
    world = World()
    _, _, client, _ = pair(world)
    (link,) = client.links
    inside: Any = link.quic
    inside._loss._cc.congestion_window = 0
    assert client.send_segments(memoryview(b"\x10" * 1000), 100, TO) == 10
    assert client.send_batch([memoryview(b"\x10urgent")], TO) == 1
    assert client.waiting(TO) == (10, 1000)
    client._links.end(link)
    assert told(client) == (10, 1000) and client.errors["quic_closed"] == 11 and client.waiting(TO) == (0, 0)


def test_what_waits_when_the_other_end_vanishes_is_told() -> None:
    world = World()
    server, _, client, _ = pair(world)
    lower: Any = server.lower
    lower.close()
    taken = 0
    for _ in range(100):
        taken += client.send_segments(memoryview(b"\x10" * 1300 * 10), 1300, TO)
        world.run(0.1)
    world.run(10)
    datagrams, _ = told(client)
    went = world.network.counts["no_listener"]
    assert datagrams > 100 and taken - datagrams <= went and client.waiting(TO) == (0, 0)


def test_what_the_first_link_refuses_is_told() -> None:
    world = World()
    _, at_server, client, _ = pair(world)
    lower: Any = client.lower
    original = lower.send_segments
    lower.send_segments = lambda buffer, segment, address, ecn=0: original(
        buffer[: 2 * segment], segment, address, ecn
    )
    assert client.send_segments(memoryview(b"\x10" * 1300 * 7), 1300, TO) == 7
    del lower.send_segments
    world.run(0.01)
    assert len(at_server) == 2 and told(client) == (5, 5 * 1300)


def test_the_plane_counts_as_sent_what_was_sent() -> None:
    """Offered more than the connection takes: every packet is in exactly one count, at any time."""
    world = World()
    world.network.impair_all(Impairments(delay=0.1))
    ends = {}
    for name, where, source in (("alice", CLIENT, FROM_ALICE), ("bob", SERVER, FROM_BOB)):
        bind, _ = world.end(where)
        tun, hooks = MemoryTun(), Recorder()
        plane = Plane(tun, bind, lambda: world.network.now, hooks)
        ends[name] = (plane, tun, hooks, source)
    (alice, tun, _, _), (bob, out, _, _) = ends["alice"], ends["bob"]
    alice.add_peer("bob", networks(FROM_BOB), overlap=10.0)
    bob.add_peer("alice", networks(FROM_ALICE), overlap=10.0)
    initiator, responder = epoch_pair()
    bob.install("alice", responder)
    alice.install("bob", initiator)
    alice.set_endpoint("bob", TO)
    for plane in (alice, bob):
        plane.start()
    world.run(2)
    injected, before = 0, 0
    for step in range(60):
        tun.inject([numbered(step * 40 + n, FROM_ALICE[4], FROM_BOB[4], 1200) for n in range(40)])
        injected += 40
        world.run(0.01)
        stats, waiting = alice.stats("bob"), alice._bind.waiting(TO)
        assert stats.sent_records == stats.sent_packets >= before
        before = stats.sent_records
        assert stats.sent_records + waiting[0] + sum(stats.drops.values()) == injected
    world.run(3)
    alice.tick()
    stats = alice.stats("bob")
    assert set(stats.drops) <= {DropReason.SEND_FAILED, DropReason.CARRIER_QUEUE}
    assert stats.drops[DropReason.CARRIER_QUEUE] > 50
    assert stats.sent_packets + sum(stats.drops.values()) == injected
    assert len(out.taken) == stats.sent_packets
    assert stats.sent_bytes == 1220 * stats.sent_packets


def test_what_is_dropped_for_an_address_left_behind_is_its_peer_s() -> None:
    world = World()
    bind, _ = world.end(CLIENT)
    plane = Plane(MemoryTun(), bind, lambda: world.network.now, Recorder())
    plane.add_peer("bob", networks(FROM_BOB), overlap=10.0)
    plane.set_endpoint("bob", TO)
    world.run(0.1)
    assert bind.send_segments(memoryview(b"\x10" * 1000), 100, TO) == 10  # nobody is there, so they wait
    plane.set_endpoint("bob", parse_peer(place(77), {}))
    assert plane.stats("bob").drops == {DropReason.CARRIER_QUEUE: 10} and not plane.drops.nonzero()
    gone: Address = place(78)
    bind.send_segments(memoryview(b"\x10" * 1000), 100, parse_peer(gone, {}))
    world.run(10)
    plane.tick()
    assert plane.drops.nonzero() == {DropReason.CARRIER_QUEUE: 10}


def test_the_first_record_makes_a_peer_s_connection_known_and_no_share_holds_him_up() -> None:
    """Both dial, so records come by a connection that is not the one to the endpoint; no tick in between."""
    world = World()
    planes, tuns = {}, {}
    for name, where in (("alice", CLIENT), ("bob", SERVER)):
        bind, _ = world.end(where)
        tuns[name] = MemoryTun()
        planes[name] = Plane(tuns[name], bind, lambda: world.network.now, Recorder())
    planes["alice"].add_peer("bob", networks(FROM_BOB), overlap=10.0)
    planes["bob"].add_peer("alice", networks(FROM_ALICE), overlap=10.0)
    for name, other, keys in zip(planes, reversed(planes), epoch_pair(), strict=True):
        planes[name].install(other, keys)
    planes["alice"].set_endpoint("bob", TO)
    planes["bob"].set_endpoint("alice", parse_peer(CLIENT, {}))
    for plane in planes.values():
        plane.start()
    world.run(1)
    bind: Any = planes["bob"]._bind
    (came,) = (each for each in bind.links if not each.client)
    assert not came.known
    sent = 4000
    for number in range(0, sent, 10):
        tuns["alice"].inject([numbered(number + n, FROM_ALICE[4], FROM_BOB[4], 1200) for n in range(10)])
        world.run(0.001)
    world.run(1)
    assert came.known and came.kept and "unproved_dropped" not in bind.counts()
    drops = planes["alice"].stats("bob").drops
    assert len(tuns["bob"].taken) == sent - sum(drops.values()) > 3 * WORK.burst
