"""Handshake datagrams: macs, RETRY, fragments, bounds of the reassembler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.errors import BadPacket
from qvpn.wire import datagram
from qvpn.wire.datagram import DEFAULT_LIMIT, INNER_FRAGMENT, MAX_FRAGMENTS, NO_MAC, OVERHEAD, RETRY_BYTES, Outgoing
from qvpn.wire.fragments import LIFETIME, PoolFull, Reassembler
from qvpn.wire.messages import MessageType

GATE, OTHER = bytes(range(32)), bytes(range(1, 33))
COOKIE = b"sixteen bytes..!"
M1 = Outgoing(MessageType.M1, 1, b"\1\1\1\0", bytes(4), b"id 1", bytes(range(256)) * 5)


@given(
    body=st.binary(min_size=1, max_size=8192),
    limit=st.integers(OVERHEAD + 600, 1400),
    cookie=st.sampled_from([None, COOKIE]),
    order=st.randoms(use_true_random=False),
)
def test_cold_messages_arrive_whole_in_any_order(
    body: bytes, limit: int, cookie: bytes | None, order: object
) -> None:
    outgoing = Outgoing(MessageType.M3, 1, b"\1\1\1\0", b"\2\2\2\0", b"abcd", body)
    sent = list(outgoing.datagrams(GATE, cookie, limit))
    assert max(map(len, sent)) <= limit and len(sent) <= MAX_FRAGMENTS
    assert len({len(raw) for raw in sent[:-1]}) <= 1
    order.shuffle(sent)  # type: ignore[attr-defined]
    pool, whole = Reassembler(1), None
    for raw in sent:
        piece = datagram.decode_untrusted(raw)
        assert piece.mac1_fits(GATE) and not piece.mac1_fits(OTHER)
        assert piece.mac2_fits(COOKIE) == (cookie is not None)
        assert cookie is not None or piece.mac2 == NO_MAC
        assert (piece.sender, piece.receiver, piece.message_id) == (b"\1\1\1\0", b"\2\2\2\0", b"abcd")
        assert whole is None
        whole = pool.add("key", (), piece, 0.0)
    assert whole == body


@given(body=st.binary(min_size=1, max_size=8192))
def test_inner_messages_arrive_whole(body: bytes) -> None:
    outgoing = Outgoing(MessageType.M2, 3, bytes(4), bytes(4), b"abcd", body)
    pool, whole = Reassembler(1), None
    for payload in outgoing.payloads(b"\2\2\2\0"):
        assert len(payload) <= INNER_FRAGMENT + 12
        piece = datagram.decode_inner_untrusted(payload)
        assert (piece.type, piece.suite, piece.handshake_index) == (MessageType.M2, 3, b"\2\2\2\0")
        whole = pool.add("key", (), piece, 0.0)
    assert whole == body


def test_retransmissions_are_the_same_bytes() -> None:
    assert M1.datagrams(GATE, None) == M1.datagrams(GATE, None)
    with_cookie = M1.datagrams(GATE, COOKIE)
    assert [raw[:-16] for raw in with_cookie] == [raw[:-16] for raw in M1.datagrams(GATE, None)]


@given(bit=st.integers(0), which=st.integers(0, 1))
def test_every_bit_before_the_macs_is_covered(bit: int, which: int) -> None:
    raw = bytearray(M1.datagrams(GATE, COOKIE)[which])
    bit %= 8 * (len(raw) - 32)
    raw[bit // 8] ^= 1 << bit % 8
    try:
        piece = datagram.decode_untrusted(bytes(raw))
    except BadPacket:
        return
    assert piece.type is MessageType.RETRY or not piece.mac1_fits(GATE)
    assert piece.type is MessageType.RETRY or not piece.mac2_fits(COOKIE)


def test_a_message_that_needs_sixteen_fragments_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError):
        datagram.split(bytes(16 * 100), 100)


def test_gate_keys_know_their_sender_and_their_pair() -> None:
    a, b, c, psk = bytes(48), b"\1" * 48, b"\2" * 48, bytes(32)
    assert datagram.gate_key(psk, a, b, a) == datagram.gate_key(psk, b, a, a)
    keys = {datagram.gate_key(p, x, y, s) for p in (psk, b"\1" * 32) for x, y in ((a, b), (a, c)) for s in (x, y)}
    assert len(keys) == 8


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("type 0", (0, 0)),
        ("type 7", (0, 7)),
        ("a record", (0, 0x10)),
        ("version 0", (1, 0)),
        ("version 2", (1, 2)),
        ("no fragments", (3, 0x00)),
        ("fragment 2 of 2", (3, 0x22)),
        ("fragment 15 of 15", (3, 0xFF)),
        ("RETRY of another length", (0, 5)),
    ],
)
def test_impossible_headers_are_refused(what: str, change: tuple[int, int]) -> None:
    raw = bytearray(M1.datagrams(GATE, None)[0])
    raw[change[0]] = change[1]
    with pytest.raises(BadPacket):
        datagram.decode_untrusted(bytes(raw))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 47, 48])
def test_datagrams_without_a_fragment_are_refused(length: int) -> None:
    with pytest.raises(BadPacket):
        datagram.decode_untrusted(M1.datagrams(GATE, None)[0][:length])


def test_retry_opens_only_with_the_m1_it_answers() -> None:
    first, *_ = M1.datagrams(GATE, None)
    retry = datagram.encode_retry(datagram.decode_untrusted(first), OTHER, COOKIE, bytes(16))
    assert len(retry) == RETRY_BYTES < len(first)
    read = datagram.decode_untrusted(retry)
    assert (read.receiver, read.message_id, read.mac1_fits(OTHER)) == (b"\1\1\1\0", b"id 1", True)
    assert datagram.open_retry_untrusted(retry, OTHER, first[-32:-16]) == COOKIE
    again = Outgoing(MessageType.M1, 1, b"\1\1\1\0", bytes(4), b"id 2", M1.body).datagrams(GATE, None)[0]
    for key, mac1 in ((OTHER, again[-32:-16]), (GATE, first[-32:-16])):
        with pytest.raises(BadPacket):
            datagram.open_retry_untrusted(retry, key, mac1)
    for at in range(16, 64):
        broken = bytearray(retry)
        broken[at] ^= 1
        with pytest.raises(BadPacket):
            datagram.open_retry_untrusted(bytes(broken), OTHER, first[-32:-16])


@pytest.mark.parametrize("payload", [b"", b"\1", b"\1" + bytes(11), b"\1\5\1\1" + bytes(9), b"\1\1\1\x11" + bytes(9)])
def test_impossible_inner_fragments_are_refused(payload: bytes) -> None:
    with pytest.raises(BadPacket):
        datagram.decode_inner_untrusted(payload)


def add(pool: Reassembler, key: object, index: int, count: int = 3, **more: object) -> bytes | None:
    part = SimpleNamespace(suite=more.get("suite", 1), index=index, count=count, fragment=more.get("fragment", b"x"))
    return pool.add(key, more.get("limits", ()), part, more.get("now", 0.0), reserved=more.get("reserved", 0))  # type: ignore[arg-type]


def test_the_first_fragment_fixes_count_and_suite() -> None:
    pool = Reassembler(4)
    add(pool, "a", 0)
    for bad in ({"count": 4, "index": 1}, {"suite": 2, "index": 1}, {"index": 0, "count": 1}):
        with pytest.raises(BadPacket):
            add(pool, "a", **bad)  # type: ignore[arg-type]
    add(pool, "a", 1)
    assert add(pool, "a", 2) == b"xxx"
    assert add(pool, "a", 0) is None  # freed: a retransmission starts anew


def test_the_first_value_of_a_fragment_stays() -> None:
    pool = Reassembler(4)
    add(pool, "a", 0, 2, fragment=b"first")
    with pytest.raises(BadPacket):
        add(pool, "a", 0, 2, fragment=b"other")
    assert add(pool, "a", 0, 2, fragment=b"first") is None  # a retransmission changes nothing
    assert add(pool, "a", 1, 2, fragment=b" last") == b"first last"


def test_pools_are_bounded_and_forget() -> None:
    pool = Reassembler(4)
    for key in range(3):
        add(pool, key, 0, limits=[("peer", 3)])
    add(pool, "fourth of the peer", 0, limits=[("peer", 3)])  # the oldest of its group gives way
    assert len(pool) == 3
    add(pool, 0, 1, limits=[("peer", 3)])
    assert add(pool, 0, 0) is None  # its first fragment went with it, and the third is still missing
    with pytest.raises(PoolFull):
        add(pool, "last place is reserved", 0, limits=[("other", 3)], reserved=1)
    add(pool, "other", 0, limits=[("other", 3)])
    with pytest.raises(PoolFull):
        add(pool, "no room at all", 0)
    assert len(pool) == 4
    add(pool, "later", 0, now=LIFETIME)
    assert len(pool) == 1


def test_messages_are_bounded() -> None:
    pool = Reassembler(4)
    for index in range(7):
        add(pool, "a", index, 15, fragment=bytes(1152))
    with pytest.raises(BadPacket):
        add(pool, "a", 7, 15, fragment=bytes(1152))
    assert len(pool) == 0


def test_default_limit_fits_the_least_ipv6_path() -> None:
    assert DEFAULT_LIMIT <= 1280 - 40 - 8
