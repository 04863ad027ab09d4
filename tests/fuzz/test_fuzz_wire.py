"""Every decoder of the handshake: any bytes give a value or BadPacket, and a value has one encoding."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

from hypothesis import example, given
from hypothesis import strategies as st

from qvpn.crypto.suites import SUITES
from qvpn.errors import BadPacket
from qvpn.wire import codec, datagram
from qvpn.wire.fragments import Reassembler
from qvpn.wire.messages import P2, P3, TLV_CLAIM, KeyName, Mode, Policy, WireOrigin

S1 = SUITES[1]
SIGNATURES = bytes(S1.signature_bytes)
POLICY = Policy(Mode.REQUIRE_QKD, True, 60)
GOOD_P2 = codec.encode_p2(P2(POLICY, {TLV_CLAIM: b"claim"})) + SIGNATURES
GOOD_P3 = codec.encode_p3(P3(POLICY, 0, (KeyName("kme", "key-1", WireOrigin.QKD, 1),), {})) + SIGNATURES


def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    """Good bytes with a piece cut out, replaced or put in."""

    def change(at: int, cut: int, put: bytes) -> bytes:
        at %= len(good) + 1
        return good[:at] + put + good[at + cut :]

    return st.builds(change, st.integers(0, 60), st.integers(0, 4), st.binary(max_size=4))


anything = st.binary(max_size=1400)


@given(anything)
def test_m1_m2_p4(data: bytes) -> None:
    for suite in SUITES.values():
        with contextlib.suppress(BadPacket):
            assert codec.encode_m1(codec.decode_m1_untrusted(suite, data)) == data
        with contextlib.suppress(BadPacket):
            codec.decode_m2_untrusted(suite, data, (b"12345678", b"12345678"))
        with contextlib.suppress(BadPacket):
            assert codec.encode_p4(codec.decode_p4_untrusted(suite, data)) == data


@given(st.one_of(anything, mutated(GOOD_P2)))
@example(GOOD_P2)
def test_p2(data: bytes) -> None:
    with contextlib.suppress(BadPacket):
        signed = codec.decode_p2_untrusted(S1, data)
        assert signed.raw + signed.signatures == data
        assert codec.encode_p2(signed.body)[8:] == signed.raw[8:]  # of the policy block, spare bits are ignored


@given(st.one_of(anything, mutated(GOOD_P3)))
@example(GOOD_P3)
def test_p3(data: bytes) -> None:
    with contextlib.suppress(BadPacket):
        signed = codec.decode_p3_untrusted(S1, data)
        assert signed.raw + signed.signatures == data
        assert codec.encode_p3(signed.body)[8:] == signed.raw[8:]


@given(st.one_of(anything, st.builds(bytes.__add__, st.binary(min_size=16, max_size=16), anything)))
def test_datagrams_and_inner_fragments(data: bytes) -> None:
    with contextlib.suppress(BadPacket):
        piece = datagram.decode_untrusted(data)
        assert piece.raw == data and piece.index < piece.count
        assert not piece.mac1_fits(bytes(32))
    with contextlib.suppress(BadPacket):
        inner = datagram.decode_inner_untrusted(data)
        assert inner.index < inner.count and inner.fragment


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),  # message
            st.integers(0, 14),  # index
            st.integers(1, 15),  # count
            st.integers(1, 2),  # suite
            st.binary(min_size=1, max_size=1152),
            st.floats(0, 2),  # seconds since the fragment before
        ),
        max_size=60,
    )
)
def test_reassembler_never_gives_what_was_not_sent(steps: list[tuple[int, int, int, int, bytes, float]]) -> None:
    """Bounded whatever comes; a whole message is the first value of each of its fragments, all of one kind."""
    pool, now = Reassembler(4), 0.0
    seen: dict[tuple[int, int, int], dict[int, list[bytes]]] = {}
    for message, index, count, suite, fragment, wait in steps:
        if index >= count:
            continue
        now += wait
        seen.setdefault((message, count, suite), {}).setdefault(index, []).append(fragment)
        with contextlib.suppress(BadPacket):
            whole = pool.add(
                message,
                [("peer", 3)],
                SimpleNamespace(suite=suite, index=index, count=count, fragment=fragment),
                now,
            )
            if whole is not None:
                pieces = seen[message, count, suite]
                assert sorted(pieces) == list(range(count))
                lengths = {0}
                for place in range(count):
                    lengths = {
                        n + len(piece)
                        for n in lengths
                        for piece in pieces[place]
                        if whole[n : n + len(piece)] == piece
                    }
                assert len(whole) in lengths
        assert len(pool) <= 3
