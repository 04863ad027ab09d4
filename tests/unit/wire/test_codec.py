"""Messages to bytes and back: one encoding of each value, and every liberty refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.crypto.suites import SUITES, Suite
from qvpn.errors import BadPacket
from qvpn.wire import codec
from qvpn.wire.messages import (
    CRITICAL,
    M1,
    NO_CHAIN,
    P2,
    P3,
    P4,
    TLV_CLAIM,
    TLV_LANES,
    KeyName,
    Mode,
    Outcome,
    Policy,
    Reason,
    WireOrigin,
)

S1 = SUITES[1]
SIGNATURES = bytes(S1.signature_bytes)
POLICY = Policy(Mode.PREFER_QKD, True, 3600)
UUID_ID = "018f3a52-91d2-8c44-9f10-2b5a0d6c7e81"

indexes = st.binary(min_size=4, max_size=4).map(lambda raw: raw[:3] + bytes([raw[3] & 0xF0 or 0x10]))
visible = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
key_names = st.builds(
    KeyName,
    st.text(visible, min_size=1, max_size=32),
    st.one_of(st.uuids().map(str), st.text(visible, min_size=1, max_size=64)),
    st.sampled_from(WireOrigin),
    st.integers(0, 255),
)
policies = st.builds(Policy, st.sampled_from(Mode), st.booleans(), st.integers(0, 2**32 - 1))
tlvs = st.dictionaries(st.integers(0, CRITICAL - 1), st.binary(max_size=60), max_size=5).map(
    lambda entries: {kind: value[:1] if kind == TLV_LANES else value for kind, value in entries.items()}
)
each_suite = pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: f"suite{suite.code}")


@each_suite
@given(data=st.data())
def test_m1_and_m2_survive(suite: Suite, data: st.DataObject) -> None:
    chain = st.binary(min_size=8, max_size=8)
    m1 = M1(data.draw(indexes), bytes(suite.ek_bytes), bytes(range(32)), data.draw(chain), data.draw(chain))
    assert codec.decode_m1_untrusted(suite, codec.encode_m1(m1)) == m1
    index, offered = data.draw(indexes), (b"new id..", b"old id..")
    selected = data.draw(st.integers(0, 2))
    clear = codec.encode_m2_clear(index, bytes(suite.ct_bytes), bytes(range(32)), selected)
    sealed = bytes(8 + 2 + suite.signature_bytes + 16)
    m2 = codec.decode_m2_untrusted(suite, clear + sealed, offered)
    assert (m2.index, m2.chain_selected, m2.clear, m2.sealed) == (index, selected, clear, sealed)


@given(policy=policies, extra=tlvs)
def test_p2_survives(policy: Policy, extra: dict[int, bytes]) -> None:
    body = P2(policy, extra)
    raw = codec.encode_p2(body)
    assert codec.decode_p2_untrusted(S1, raw + SIGNATURES) == codec.Signed(body, raw, SIGNATURES)


@given(policy=policies, attempt=st.integers(0, 255), keys=st.lists(key_names, max_size=1), extra=tlvs)
def test_p3_survives(policy: Policy, attempt: int, keys: list[KeyName], extra: dict[int, bytes]) -> None:
    body = P3(policy, attempt, tuple(keys), extra)
    raw = codec.encode_p3(body)
    assert codec.decode_p3_untrusted(S1, raw + SIGNATURES) == codec.Signed(body, raw, SIGNATURES)


@pytest.mark.parametrize(
    "body",
    [
        P4(Outcome.OK, Reason.NONE, bytes(32)),
        P4(Outcome.CHAINED, Reason.NONE, bytes(32), SIGNATURES),
        P4(Outcome.ABSENT, Reason.NONE, bytes(32), SIGNATURES),
        *(P4(outcome, reason) for outcome in (Outcome.RETRY_KEY, Outcome.REFUSED) for reason in list(Reason)[1:]),
    ],
)
def test_p4_survives_and_no_shorter_or_longer_one_does(body: P4) -> None:
    raw = codec.encode_p4(body)
    assert codec.decode_p4_untrusted(S1, raw) == body
    for bad in (raw[:-1], raw + b"\0", raw[:1], b""):
        with pytest.raises(BadPacket):
            codec.decode_p4_untrusted(S1, bad)


@pytest.mark.parametrize(
    "raw",
    [
        bytes([0, 1]) + bytes(32),  # OK with a reason
        bytes([1, 0]),  # RETRY-KEY without one
        bytes([4, 0]),
        bytes([4, 9]),  # a reason nobody knows
        bytes([5, 1]),  # an outcome nobody knows
        bytes([3, 0]) + bytes(32),  # ABSENT unsigned
        bytes([1, 1]) + bytes(32),
    ],
)
def test_p4_has_one_form_for_each_outcome(raw: bytes) -> None:
    with pytest.raises(BadPacket):
        codec.decode_p4_untrusted(S1, raw)


@pytest.mark.parametrize("index", [bytes(4), b"\1\2\3\4", b"\1\2\3\x1f", b"\0\0\0\1"])
def test_an_index_has_room_for_the_lane_and_is_not_zero(index: bytes) -> None:
    m1 = codec.encode_m1(M1(index, bytes(S1.ek_bytes), bytes(32)))
    with pytest.raises(BadPacket):
        codec.decode_m1_untrusted(S1, m1)
    m2 = codec.encode_m2_clear(index, bytes(S1.ct_bytes), bytes(32), 0) + bytes(4000)
    with pytest.raises(BadPacket):
        codec.decode_m2_untrusted(S1, m2, (NO_CHAIN, NO_CHAIN))


@pytest.mark.parametrize(
    ("selected", "offered"),
    [
        (3, (b"8 bytes.", b"8 bytes.")),
        (255, (b"8 bytes.", b"8 bytes.")),
        (1, (NO_CHAIN, b"8 bytes.")),
        (2, (b"8 bytes.", NO_CHAIN)),
    ],
)
def test_m2_selects_only_what_was_offered(selected: int, offered: tuple[bytes, bytes]) -> None:
    m2 = codec.encode_m2_clear(b"\1\2\3\0", bytes(S1.ct_bytes), bytes(32), selected) + bytes(4000)
    with pytest.raises(BadPacket):
        codec.decode_m2_untrusted(S1, m2, offered)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: f"suite{suite.code}")
def test_m1_of_another_length_is_refused(suite: Suite) -> None:
    m1 = codec.encode_m1(M1(b"\1\2\3\0", bytes(suite.ek_bytes), bytes(32)))
    assert len(m1) == {1: 1236, 2: 1236, 3: 1620}[suite.code]
    for bad in (m1[:-1], m1 + b"\0", b""):
        with pytest.raises(BadPacket):
            codec.decode_m1_untrusted(suite, bad)


def p3(key: bytes, count: int = 1, attempt: int = 0) -> bytes:
    return codec.encode_policy(POLICY) + bytes([attempt, count]) + key + b"\0\0" + SIGNATURES


GOOD_KEY = codec.encode_key(KeyName("kme", UUID_ID, WireOrigin.QKD, 0))


@pytest.mark.parametrize(
    ("what", "key"),
    [
        ("a UUID sent as text", b"\3kme\1" + bytes([36]) + UUID_ID.encode() + b"\1\0"),
        ("no label", b"\0\0" + bytes(16) + b"\1\0"),
        ("a label of 33", b"\x21" + b"k" * 33 + b"\0" + bytes(16) + b"\1\0"),
        ("a label with a line break", b"\3k\ne\0" + bytes(16) + b"\1\0"),
        ("a label that is not ASCII", b"\3k\xffe\0" + bytes(16) + b"\1\0"),
        ("an empty key_ID", b"\3kme\1\0\1\0"),
        ("a key_ID of 65", b"\3kme\1\x41" + b"x" * 65 + b"\1\0"),
        ("kind 2", b"\3kme\2" + bytes(16) + b"\1\0"),
        ("origin 0", b"\3kme\0" + bytes(16) + b"\0\0"),
        ("origin 6", b"\3kme\0" + bytes(16) + b"\6\0"),
        ("cut off", GOOD_KEY[:-1]),
    ],
)
def test_a_key_has_one_form(what: str, key: bytes) -> None:
    assert codec.decode_p3_untrusted(S1, p3(GOOD_KEY)).body.keys[0].key_id == UUID_ID
    with pytest.raises(BadPacket):
        codec.decode_p3_untrusted(S1, p3(key))


@pytest.mark.parametrize(
    "key_id", [UUID_ID.upper(), "{" + UUID_ID + "}", UUID_ID.replace("-", ""), "urn:uuid:" + UUID_ID]
)
def test_other_spellings_of_a_uuid_stay_text(key_id: str) -> None:
    raw = codec.encode_key(KeyName("kme", key_id, WireOrigin.QKD, 0))
    assert raw[4] == 1
    assert codec.decode_p3_untrusted(S1, p3(raw)).body.keys[0].key_id == key_id


def test_version_1_has_at_most_one_key() -> None:
    for raw in (p3(GOOD_KEY + GOOD_KEY, 2), p3(b"", 1), p3(GOOD_KEY, 0)):
        with pytest.raises(BadPacket):
            codec.decode_p3_untrusted(S1, raw)


@pytest.mark.parametrize("block", [b"\0\0\1\0", b"\4\0\1\0", b"\1\0\2\0", b"\1\0\0\0"])
def test_a_policy_that_cannot_be_is_refused(block: bytes) -> None:
    with pytest.raises(BadPacket):
        codec.decode_p2_untrusted(S1, block + bytes(4) + b"\0\0" + SIGNATURES)


def test_other_flags_and_the_reserved_byte_are_ignored() -> None:
    signed = codec.decode_p2_untrusted(S1, b"\2\xff\1\x77" + bytes(4) + b"\0\0" + SIGNATURES)
    assert signed.body.policy == Policy(Mode.PREFER_QKD, True, 0)
    assert signed.raw[1:4] == b"\xff\1\x77"  # yet bound: the transcript has the bytes as they came


def p2(entries: bytes, total: int | None = None) -> bytes:
    length = len(entries) if total is None else total
    return codec.encode_policy(POLICY) + length.to_bytes(2, "big") + entries + SIGNATURES


def entry(kind: int, value: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value


def test_tlvs_unknown_ones_are_ignored_unless_critical() -> None:
    signed = codec.decode_p2_untrusted(S1, p2(entry(TLV_LANES, b"\2") + entry(TLV_CLAIM, b"c") + entry(0x7000, b"x")))
    assert (signed.body.tlvs[TLV_LANES], signed.body.tlvs[TLV_CLAIM]) == (b"\2", b"c")
    with pytest.raises(BadPacket, match="0x7000"):
        codec.decode_p2_untrusted(S1, p2(entry(CRITICAL | 0x7000, b"x")))


@pytest.mark.parametrize(
    "raw",
    [
        p2(entry(2, b"a") + entry(1, b"\1")),  # descending
        p2(entry(2, b"a") + entry(2, b"a")),  # twice
        p2(entry(2, b"a") + entry(CRITICAL | 2, b"a")),  # twice but for the critical bit
        p2(entry(2, b"a"), 4),  # ends inside an entry
        p2(entry(2, b"a") + b"\0\3", 7),
        p2(entry(2, b"a"), 6),  # reaches into the signatures
        p2(entry(3, bytes(509))),  # 513 bytes
        p2(b"")[:-1],  # signatures one byte short
        p2(b"") + b"\0",
    ],
)
def test_tlvs_that_do_not_add_up_are_refused(raw: bytes) -> None:
    with pytest.raises(BadPacket):
        codec.decode_p2_untrusted(S1, raw)


def test_what_cannot_be_encoded_is_a_mistake_of_ours() -> None:
    for name in (
        KeyName("", UUID_ID, WireOrigin.QKD),
        KeyName("k" * 33, UUID_ID, WireOrigin.QKD),
        KeyName("k", "", WireOrigin.QKD),
        KeyName("k", "x" * 65, WireOrigin.QKD),
        KeyName("ü", UUID_ID, WireOrigin.QKD),
    ):
        with pytest.raises(ValueError):
            codec.encode_key(name)
    with pytest.raises(ValueError):
        codec.encode_tlvs({3: bytes(510)})


def test_reprs_keep_quiet() -> None:
    secret = b"\xab" * 32
    shown = repr(P4(Outcome.OK, Reason.NONE, secret)) + repr(M1(b"\1\2\3\0", secret, secret))
    assert "xab" not in shown
