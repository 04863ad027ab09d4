"""The short way for packets of DATAGRAM frames against aioquic's own: the same packets, the same books.

Also what of aioquic's insides the short way stands on.
"""

from __future__ import annotations

import ipaddress
import os
import random
import ssl
from collections import Counter, deque
from typing import Any

import pytest
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.tls import CipherSuite, Epoch
from hypothesis import given
from hypothesis import strategies as st

from qvpn.netio.base import Address
from qvpn.transports.quic import certificate
from qvpn.transports.quic.connection import (
    ACKNOWLEDGEMENTS,
    FRAMES,
    LEAST_FRAME,
    SENT_FRAMES,
    Connection,
    datagrams_in,
)
from qvpn.transports.quic.pacer import BatchPacer
from qvpn.transports.quic.settings import parse_peer
from tests.unit.transports.quic_world import SERVER, World, pair

CERTIFICATE = certificate.self_made("localhost")
LONG = os.environ.get("QVPN_TEST_LONG") == "1"
HERE, THERE = (Address(ipaddress.ip_address(f"192.0.2.{n}"), 443) for n in (1, 2))
SUITES = [
    CipherSuite.AES_128_GCM_SHA256,
    CipherSuite.AES_256_GCM_SHA384,
    CipherSuite.CHACHA20_POLY1305_SHA256,
]


def configured(*, client: bool, suite: CipherSuite | None = None) -> QuicConfiguration:
    made = QuicConfiguration(
        alpn_protocols=["h3"],
        connection_id_length=8,
        idle_timeout=30.0,
        is_client=client,
        max_datagram_frame_size=65_535,
        max_datagram_size=1400,
        verify_mode=ssl.CERT_NONE,
        cipher_suites=None if suite is None else [suite],
    )
    if not client:
        made.certificate, made.private_key = CERTIFICATE.leaf, CERTIFICATE.private_key
    return made


class Pair:
    """Two ends that have shaken hands; ``stock`` ends are aioquic's own.  Nothing is lost unless a test does it."""

    def __init__(self, *, stock_client: bool = False, stock_server: bool = False, suite: Any = None) -> None:
        self.now = 1.0
        self.client: Any = self._end(stock_client, configured(client=True, suite=suite))
        original = self.client.original_destination_connection_id
        serving = configured(client=False, suite=suite)
        self.server: Any = self._end(stock_server, serving, original_destination_connection_id=original)
        self.client.connect(THERE, self.now)
        for _ in range(6):
            self.exchange()
        for end in (self.client, self.server):
            assert end._handshake_confirmed
            end._loss._pacer = BatchPacer(1200)

    @staticmethod
    def _end(stock: bool, configuration: QuicConfiguration, **more: Any) -> Any:
        if stock:
            return QuicConnection(configuration=configuration, **more)
        return Connection(configuration, Counter(), **more)

    def exchange(self) -> None:
        """What each wants to send arrives; a little time passes."""
        for end, other, source in ((self.client, self.server, HERE), (self.server, self.client, THERE)):
            for data, _ in end.datagrams_to_send(self.now):
                other.receive_datagram(data, source, self.now)
            self.now += 0.005

    def carry(self, packets: list[Any], to: Any) -> None:
        for packet in packets:
            to.receive_datagram(packet[0], HERE if to is self.server else THERE, self.now)


def arrived(end: Any) -> list[bytes]:
    """And taken away."""
    if isinstance(end, Connection):
        found, end.datagrams = end.datagrams, []
        return found
    taken = list(iter(end.next_event, None))
    return [each.data for each in taken if isinstance(each, events.DatagramFrameReceived)]


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError(f"aioquic's {name} is not to be used here")

    monkeypatch.setattr(QuicConnection, name, refuse)


@pytest.mark.parametrize("suite", SUITES)
def test_what_is_sealed_here_is_opened_by_aioquic(suite: CipherSuite) -> None:
    pair = Pair(stock_server=True, suite=suite)
    arrived(pair.server)
    sent = [bytes([0x10, number % 256]) * (1 + number * 9 % 680) for number in range(150)]
    waiting = deque(sent)
    while waiting:
        assert pair.client.only_datagrams
        packets = pair.client.seal(waiting, 1400, pair.now)
        assert packets and all(len(packet.data) <= 1400 for packet in packets)
        pair.carry(packets, pair.server)
        pair.now += 0.01
        for data, _ in pair.server.datagrams_to_send(pair.now):
            pair.client.receive_datagram(data, THERE, pair.now)
    assert arrived(pair.server) == sent


@pytest.mark.parametrize("suite", SUITES)
def test_what_aioquic_seals_is_opened_here(suite: CipherSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(stock_client=True, suite=suite)
    arrived(pair.server)
    sent = [bytes([0x10, number]) * (1 + number * 5) for number in range(100)]
    pair.client._loss._cc.congestion_window = 1 << 20
    for data in sent:
        pair.client.send_datagram_frame(data)
    packets = pair.client.datagrams_to_send(pair.now)
    forbid(monkeypatch, "receive_datagram")
    before = pair.server.verified
    pair.carry(packets, pair.server)
    assert arrived(pair.server) == sent and pair.server.verified == before + len(packets)


def test_keys_that_are_updated_are_followed_both_ways() -> None:
    pair = Pair()
    for turn in range(6):
        (pair.client, pair.server)[turn % 2].request_key_update()
        for number in range(4):
            for end, other in ((pair.client, pair.server), (pair.server, pair.client)):
                data = b"\x10%d %d" % (turn, number)
                if end.only_datagrams:
                    pair.carry(end.seal(deque([data]), 1400, pair.now), other)
                else:
                    end.send_datagram_frame(data)
                    pair.carry(end.datagrams_to_send(pair.now), other)
                assert arrived(other) == [data]
                pair.exchange()
        phases = {end._cryptos[Epoch.ONE_RTT].key_phase for end in (pair.client, pair.server)}
        assert phases == {(turn + 1) % 2}


def books(end: Any) -> dict[str, Any]:
    """Everything that receiving a packet changes, but for the idle timeout."""
    space = end._spaces[Epoch.ONE_RTT]
    return {
        "expected": space.expected_packet_number,
        "largest": (space.largest_received_packet, space.largest_received_time),
        "ack": (list(space.ack_queue), space.ack_at),
        "window": (space.received_packets._lower, {n for n in range(3000) if n in space.received_packets}),
        "spin": (end._spin_bit, end._spin_highest_pn),
        "state": (end._state, end._close_pending, end._ack_eliciting_sent_since_receipt),
        "flight": end._loss.bytes_in_flight,
    }


def twins(pair: Pair) -> Any:
    """A second server with the keys of the pair's, which goes aioquic's way only."""
    twin: Any = Pair().server
    first = pair.server
    twin._host_cids, twin.host_cid = list(first._host_cids), first.host_cid
    twin._receive_short = lambda *_: False
    keys = first._cryptos[Epoch.ONE_RTT].recv
    twin._cryptos[Epoch.ONE_RTT].recv.setup(cipher_suite=keys.cipher_suite, secret=keys.secret, version=keys.version)
    for end in (first, twin):
        end._spaces[Epoch.ONE_RTT] = QuicPacketSpace(is_application_data=True)
        end._loss.spaces = list(end._spaces.values())
        end._spin_bit, end._spin_highest_pn = False, 0
        end._ack_eliciting_sent_since_receipt = True
        arrived(end)
    return twin


@pytest.mark.parametrize("seed", range(30 if LONG else 6))
def test_the_books_are_the_same_as_after_aioquic_s_way(seed: int) -> None:
    """Packets of all kinds, lost, doubled, disordered, altered: two receivers with one key, by either way."""
    chance = random.Random(seed)
    pair = Pair()
    twin, sender = twins(pair), pair.client
    sender._packet_number = chance.choice([0, 300, 70_000]) + 100
    for end in (pair.server, twin):
        end._spaces[Epoch.ONE_RTT].expected_packet_number = sender._packet_number
    under_way: list[bytes] = []
    total = 0
    for _ in range(400):
        sender._loss._cc.bytes_in_flight = 0
        if chance.random() < 0.2:
            sender.send_ping(1)
        waiting = deque(chance.randbytes(chance.randrange(1, 600)) for _ in range(chance.randrange(4)))
        if sender.only_datagrams:
            sender._loss._pacer.open = True
            under_way += [packet.data for packet in sender.seal(waiting, 1400, pair.now)]
        else:
            sender._datagrams_pending.extend(waiting)
            under_way += [data for data, _ in sender.datagrams_to_send(pair.now)]
        if len(under_way) < chance.randrange(1, 12):
            continue
        packet = under_way.pop(chance.randrange(len(under_way)))
        if (fate := chance.random()) < 0.1:
            continue
        if fate < 0.3:
            under_way.append(packet)
        elif fate < 0.4:
            changed = bytearray(packet)
            changed[chance.randrange(1, len(changed))] ^= 1 << chance.randrange(8)
            packet = bytes(changed)
        for end in (pair.server, twin):
            end.receive_datagram(packet, HERE, pair.now)
        got = arrived(pair.server)
        total += len(got)
        assert got == arrived(twin)
        assert books(pair.server) == books(twin)
        if pair.server._spaces[Epoch.ONE_RTT].ack_at is not None and chance.random() < 0.2:
            for end in (pair.server, twin):
                end._spaces[Epoch.ONE_RTT].ack_at = None
        pair.now += 0.001
    assert total > 100 and abs(pair.server._close_at - twin._close_at) <= 0.3


def test_with_losses_nothing_stays_in_flight_and_the_window_opens_again() -> None:
    chance = random.Random(5)
    pair = Pair()
    client, server = pair.client, pair.server
    for _ in range(1500 if LONG else 400):
        waiting = deque(bytes([0x10]) * 1000 for _ in range(8))
        for packet in client.seal(waiting, 1400, pair.now) if client.only_datagrams else ():
            if chance.random() > 0.05:
                server.receive_datagram(packet.data, HERE, pair.now)
        pair.now += 0.002
        for end in (client, server):
            if (due := end.get_timer()) is not None and due <= pair.now:
                end.handle_timer(pair.now)
        pair.exchange()
        arrived(server)
        assert len(server._spaces[Epoch.ONE_RTT].ack_queue) <= 65
        assert len(client._spaces[Epoch.ONE_RTT].sent_packets) < 400
    for _ in range(200):
        pair.now += 0.05
        for end in (client, server):
            if (due := end.get_timer()) is not None and due <= pair.now:
                end.handle_timer(pair.now)
        pair.exchange()
    assert client._loss.bytes_in_flight == 0 and not client._spaces[Epoch.ONE_RTT].sent_packets
    assert client.only_datagrams and client._loss.congestion_window >= 2400


def test_no_more_is_sent_than_congestion_control_and_pacing_allow() -> None:
    pair = Pair()
    client = pair.client
    client._loss._pacer.open = True
    before = client._loss.bytes_in_flight
    window = client._loss.congestion_window - before
    waiting = deque(bytes([0x10]) * 1170 for _ in range(200))
    packets = client.seal(waiting, 1200, pair.now)
    assert window - 1200 < sum(len(packet.data) for packet in packets) <= window
    assert client._loss.bytes_in_flight - before == sum(len(packet.data) for packet in packets)
    assert client.seal(waiting, 1200, pair.now) == [] and client._pacing_at is None
    client._loss._cc.congestion_window, client._loss._pacer.open = 1 << 24, False
    client._loss._pacer._rate, client._loss._pacer._tokens, client._loss._pacer._at = 1000.0, 8.0, pair.now
    assert len(client.seal(waiting, 1200, pair.now)) == 8
    assert client._pacing_at is not None and client.get_timer() <= client._pacing_at


def test_a_packet_holds_few_datagrams_and_none_that_would_not_fit() -> None:
    pair = Pair()
    client = pair.client
    client._loss._pacer.open = True
    packets = client.seal(deque([b"\x10" * 32] * 100), 1400, pair.now)
    assert [packet.datagrams for packet in packets] == [SENT_FRAMES] * 6 + [4]
    assert client.seal(deque([b"\x10" * 1371]), 1400, pair.now) == []
    assert len(client.seal(deque([b"\x10" * 1370]), 1400, pair.now)[0].data) == 1400


def test_whatever_is_unusual_goes_aioquic_s_way() -> None:
    pair = Pair()
    client, server = pair.client, pair.server
    assert client.only_datagrams and server.only_datagrams
    for name, value in (
        ("_probe_pending", True),
        ("_close_pending", True),
        ("_ping_pending", [1]),
        ("_retire_connection_ids", [1]),
        ("_handshake_done_pending", True),
        ("_handshake_confirmed", False),
    ):
        before = getattr(client, name)
        setattr(client, name, value)
        assert not client.only_datagrams, name
        setattr(client, name, before)
    (packet,) = client.seal(deque([b"\x10"]), 1400, pair.now)
    elsewhere = Address(ipaddress.ip_address("192.0.2.77"), 443)
    assert not server._receive_short(packet.data, elsewhere, pair.now)
    assert not server._receive_short(packet.data[:20], HERE, pair.now)
    assert not server._receive_short(bytes([packet.data[0]]) + bytes(8) + packet.data[9:], HERE, pair.now)
    assert server._receive_short(packet.data, HERE, pair.now) and arrived(server) == [b"\x10"]


def test_a_client_that_moves_is_followed_and_the_short_way_taken_again() -> None:
    pair = Pair()
    moved = Address(ipaddress.ip_address("192.0.2.77"), 443)
    (packet,) = pair.client.seal(deque([b"\x10moved"]), 1400, pair.now)
    pair.server.receive_datagram(packet.data, moved, pair.now)
    assert arrived(pair.server) == [b"\x10moved"] and pair.server.get_peer_address() == moved
    assert not pair.server.only_datagrams  # its new place is to be proved first
    for _ in range(3):
        for data, to in pair.server.datagrams_to_send(pair.now):
            assert to in (moved, HERE)
            pair.client.receive_datagram(data, THERE, pair.now)
        for data, _ in pair.client.datagrams_to_send(pair.now):
            pair.server.receive_datagram(data, moved, pair.now)
        pair.now += 0.01
    assert pair.server.only_datagrams
    (packet,) = pair.server.seal(deque([b"\x10found"]), 1400, pair.now)
    assert packet.place == moved


@given(st.binary(max_size=300))
def test_any_bytes_are_datagrams_or_not(plain: bytes) -> None:
    found = datagrams_in(plain)
    assert found is None or sum(map(len, found)) < len(plain)


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=FRAMES))
def test_frames_come_out_as_they_went_in(contents: list[bytes]) -> None:
    long = b"".join(b"\x31" + (0x4000 | len(each)).to_bytes(2) + each for each in contents)
    assert datagrams_in(long) == contents
    short = b"".join(b"\x31" + bytes([len(each)]) + each for each in contents if len(each) < 64)
    # an empty one at the very end has not the room that the short way looks for; aioquic reads it
    assert datagrams_in(short) in ([each for each in contents if len(each) < 64], None)
    assert datagrams_in(long + b"\x01") is None and datagrams_in(long[:-1]) is None
    many = b"\x31\x01x" * (FRAMES + 300)
    assert len(many) // LEAST_FRAME < 300 and datagrams_in(many) is None


def test_an_end_that_only_receives_remembers_few_of_its_acknowledgements() -> None:
    """Nobody acknowledges them, so aioquic alone would keep every one for as long as the connection lasts."""
    world = World()
    server, at_server, client, _ = pair(world)
    books = [link.quic._spaces[Epoch.ONE_RTT] for link in (*server.links, *client.links)]
    first = server.links[0].quic._packet_number
    for number in range(500):
        client.send_batch([memoryview(b"\x10%d" % number)], parse_peer(SERVER, {}))
        world.run(0.03)
        assert all(len(book.sent_packets) <= 2 * ACKNOWLEDGEMENTS + 1 for book in books)
    assert server.links[0].quic._packet_number - first >= 400, "there were acknowledgements to forget"
    assert at_server == [b"\x10%d" % number for number in range(500)]
    assert server.send_batch([memoryview(b"\x10back")], server.links[0].address) == 1
    world.run(0.2)
    assert all(not book.ack_eliciting_in_flight for book in books)
    assert not books[0].sent_packets, "what was kept is known to have arrived"
