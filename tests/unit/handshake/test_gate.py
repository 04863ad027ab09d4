"""The gate by itself: whose datagram, which budget, which cookie, how much memory."""

from __future__ import annotations

import ipaddress
import random
from dataclasses import dataclass

import pytest

from qvpn.config import identity
from qvpn.handshake import gate as gates
from qvpn.handshake.gate import TRIALS_PER_SOURCE, TRIALS_TOTAL, Complete, Dropped, Gate, Reply, Stored
from qvpn.handshake.parameters import PeerParameters, Randomness
from qvpn.handshake.port import ATTEMPT, ENTRY, Port
from qvpn.tunnel.drops import DropReason
from qvpn.wire import datagram
from qvpn.wire.messages import MessageType

SITE = identity.generate(3)
PEERS = [identity.generate(3) for _ in range(8)]


@dataclass(frozen=True)
class Where:
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int = 51840


HOME = Where(ipaddress.ip_address("192.0.2.9"))
AWAY = Where(ipaddress.ip_address("198.51.100.9"))


def make(count: int = 3) -> tuple[Gate, Port]:
    chance = random.Random(5)
    port = Port(chance.randbytes)
    gate = Gate(port, Randomness(chance.randbytes, chance.random), 0.0)
    for number, peer in enumerate(PEERS[:count]):
        gate.add_peer(PeerParameters(f"peer{number}", SITE, (peer.public,)))
    return gate, port


def key(peer: int) -> bytes:
    own, theirs = SITE.public.fingerprint, PEERS[peer].public.fingerprint
    return datagram.gate_key(bytes(32), own, theirs, theirs)


def sent(
    peer: int,
    cookie: bytes | None = None,
    kind: MessageType = MessageType.M1,
    receiver: bytes = bytes(4),
    size: int = 1236,
    name: bytes = b"id 1",
    suite: int = 1,
) -> tuple[bytes, ...]:
    return datagram.Outgoing(kind, suite, b"\1\1\1\x10", receiver, name, bytes(size)).datagrams(key(peer), cookie)


def cookie_of(gate: Gate, address: Where, now: float = 0.0) -> bytes:
    return gate._cookies.cookie(address, now)


def test_a_whole_m1_from_stranger_to_message() -> None:
    gate, _ = make()
    first, second = sent(1)
    answer = gate.receive(first, AWAY, 0.0)
    assert isinstance(answer, Reply) and answer.peer == "peer1" and len(answer.datagram) == 80
    own = datagram.gate_key(bytes(32), SITE.public.fingerprint, PEERS[1].public.fingerprint, SITE.public.fingerprint)
    cookie = datagram.open_retry_untrusted(answer.datagram, own, first[-32:-16])
    assert gate.receive(second, AWAY, 0.0) == Dropped(DropReason.HANDSHAKE_COOKIE, "peer1")
    first, second = sent(1, cookie)
    assert gate.receive(first, AWAY, 0.1) == Stored("peer1")
    whole = gate.receive(second, AWAY, 0.1)
    assert isinstance(whole, Complete)
    assert (whole.peer, whole.message_type, whole.message) == ("peer1", MessageType.M1, bytes(1236))
    assert (whole.carrier.address, whole.carrier.suite, whole.carrier.sender_index) == (AWAY, 1, b"\1\1\1\x10")


@pytest.mark.parametrize("where", [AWAY, Where(AWAY.ip, 1), Where(ipaddress.ip_address("198.51.100.10"))])
def test_a_cookie_belongs_to_one_address(where: Where) -> None:
    gate, _ = make()
    raw = sent(0, cookie_of(gate, AWAY))[0]
    verdict = gate.receive(raw, where, 0.0)
    assert isinstance(verdict, Stored if where == AWAY else Reply)


def test_a_cookie_is_wanted_from_the_endpoint_too() -> None:
    gate, _ = make()
    gate.set_endpoint("peer0", HOME)
    assert isinstance(gate.receive(sent(0)[0], HOME, 0.0), Reply)


@pytest.mark.parametrize("kind", [MessageType.M3, MessageType.M3R])
def test_m3_without_a_cookie_is_dropped_silently(kind: MessageType) -> None:
    gate, port = make()
    index = port.allocate("peer0", ENTRY)
    for raw in sent(0, None, kind, index, 3400):
        assert gate.receive(raw, AWAY, 0.0) == Dropped(DropReason.HANDSHAKE_COOKIE, "peer0")


@pytest.mark.parametrize("kind", [MessageType.M2, MessageType.M3, MessageType.M4, MessageType.M3R])
def test_all_but_m1_go_by_the_index_they_name(kind: MessageType) -> None:
    gate, port = make()
    waits = ATTEMPT if kind in (MessageType.M2, MessageType.M4) else ENTRY
    mine, others = port.allocate("peer0", waits), port.allocate("peer1", waits)
    wrong = port.allocate("peer0", ENTRY if waits is ATTEMPT else ATTEMPT)
    epoch = port.allocate("peer0", waits)
    port.becomes_epoch(epoch)
    cookie = cookie_of(gate, AWAY)
    for receiver, good in (
        (mine, True),
        (others, False),
        (wrong, False),
        (epoch, False),
        (b"\7\7\7\x70", False),
        (bytes(4), False),
    ):
        verdict = gate.receive(sent(0, cookie, kind, receiver, 100)[0], AWAY, 0.0)
        assert isinstance(verdict, Complete) is good
        assert good or verdict == Dropped(DropReason.HANDSHAKE_UNKNOWN_PEER)


def test_strangers_are_dropped_without_an_answer_and_within_a_budget() -> None:
    gate, _ = make(4)
    foreign = datagram.Outgoing(MessageType.M1, 1, b"\1\1\1\x10", bytes(4), b"id 1", bytes(500))
    raw = foreign.datagrams(b"k" * 32, None)[0]
    reasons = [gate.receive(raw, AWAY, 0.5) for _ in range(100)]
    tried = reasons.count(Dropped(DropReason.HANDSHAKE_UNKNOWN_PEER))
    assert tried == TRIALS_PER_SOURCE // 4
    assert reasons.count(Dropped(DropReason.HANDSHAKE_BUDGET)) == 100 - tried
    assert gate.receive(raw, AWAY, 1.5) == Dropped(DropReason.HANDSHAKE_UNKNOWN_PEER)  # the next second
    total = 0
    for number in range(3000):
        source = Where(ipaddress.ip_address(0x0A000000 + number))
        total += gate.receive(raw, source, 2.5) == Dropped(DropReason.HANDSHAKE_UNKNOWN_PEER)
    assert total == TRIALS_TOTAL // 4


def test_a_flood_does_not_lock_known_addresses_out() -> None:
    gate, _ = make(4)
    gate.set_endpoint("peer2", HOME)
    foreign = datagram.Outgoing(MessageType.M1, 1, b"\1\1\1\x10", bytes(4), b"id 1", bytes(500)).datagrams(
        b"k" * 32, None
    )
    for number in range(3000):
        gate.receive(foreign[0], Where(ipaddress.ip_address(0x0A000000 + number)), 0.5)
    for _ in range(300):
        gate.receive(foreign[0], HOME, 0.5)  # even spoofed from there
    assert isinstance(gate.receive(sent(2)[0], HOME, 0.5), Reply)
    assert gate.receive(sent(3)[0], HOME, 0.5) == Dropped(DropReason.HANDSHAKE_BUDGET)


def test_other_suites_and_own_datagrams_are_dropped() -> None:
    gate, _ = make()
    cookie = cookie_of(gate, AWAY)
    assert gate.receive(sent(0, cookie, suite=2)[0], AWAY, 0.0) == Dropped(DropReason.HANDSHAKE_MALFORMED, "peer0")
    own = SITE.public.fingerprint
    ours = datagram.gate_key(bytes(32), own, PEERS[0].public.fingerprint, own)
    reflected = datagram.Outgoing(MessageType.M1, 1, b"\1\1\1\x10", bytes(4), b"id 1", bytes(50)).datagrams(
        ours, cookie
    )
    assert gate.receive(reflected[0], AWAY, 0.0) == Dropped(DropReason.HANDSHAKE_UNKNOWN_PEER)


def test_pools_are_bounded_per_source_per_peer_and_in_all() -> None:
    gate, _ = make()
    for number in range(200):
        source = Where(ipaddress.ip_address(0x0A000000 + number))
        for place in range(4):
            name = bytes([number, place, 0, 0])
            gate.receive(sent(number % 3, cookie_of(gate, source), name=name)[0], source, 0.0)
        assert len(gate._questions) <= 3 * 16
    assert len(gate._questions) == 3 * 16


def test_strangers_take_no_place_of_the_known_endpoint() -> None:
    """Half messages from many addresses, as fast as they like: the peer's own message comes through."""
    gate, _ = make()
    gate.set_endpoint("peer0", HOME)
    first, *rest = sent(0, cookie_of(gate, HOME), name=b"real")
    assert isinstance(gate.receive(first, HOME, 0.0), Stored)
    for number in range(200):
        source = Where(ipaddress.ip_address(0x0A000000 + number))
        gate.receive(sent(0, cookie_of(gate, source), name=bytes([number, 9, 9, 9]))[0], source, 0.0)
    verdicts = [gate.receive(raw, HOME, 0.1) for raw in rest]
    assert isinstance(verdicts[-1], Complete)
    assert verdicts[-1].carrier.configured


def test_several_identities_of_one_peer() -> None:
    chance = random.Random(6)
    port = Port(chance.randbytes)
    gate = Gate(port, Randomness(chance.randbytes, chance.random), 0.0)
    gate.add_peer(PeerParameters("rolling", SITE, (PEERS[0].public, PEERS[1].public)))
    for place in (0, 1):
        whole = gate.receive(sent(place, cookie_of(gate, AWAY), size=100)[0], AWAY, 0.0)
        assert isinstance(whole, Complete) and whole.carrier.identity == place


def test_a_peer_s_name_is_taken_once() -> None:
    gate, _ = make(1)
    with pytest.raises(ValueError):
        gate.add_peer(PeerParameters("peer0", SITE, (PEERS[0].public,)))
    assert isinstance(gate.receive(sent(0)[0], AWAY, 0.0), Reply)


def test_the_number_of_remembered_addresses_is_bounded() -> None:
    gate, _ = make(1)
    for number in range(gates.REMEMBERED + 50):
        source = Where(ipaddress.ip_address(0x0A000000 + number))
        gate.receive(sent(0, cookie_of(gate, source), size=60)[0], source, float(number))
    assert len(gate._seen) == gates.REMEMBERED
