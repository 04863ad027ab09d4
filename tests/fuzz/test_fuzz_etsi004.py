"""The 004 wire: bytes written out by hand from the profiles' descriptions, and decoders that raise only BadAnswer."""

from __future__ import annotations

import struct
import uuid
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysource.errors import BadAnswer
from keysource.etsi004.messages import Delivered, Qos, Status, hops_of
from keysource.etsi004.wire import ETSI_C, PROFILES, QUBIP, Service, WireProfile

STREAM = uuid.UUID("00112233-4455-4677-8899-aabbccddeeff")
QOS = Qos(32, 40000, 5000, 10, 1, 5000, 3600)
QOS_HEX = "00000020 00009c40 00001388 0000000a 00000001 00001388 00000e10"
MIME = b"application/json"
STREAM_HEX = "00112233445546778899aabbccddeeff"
profiles = st.sampled_from(list(PROFILES.values()))


def test_requests_of_etsi_c_byte_by_byte() -> None:
    opened = ETSI_C.open_connect("a://1", "b://2", QOS, STREAM)
    payload = b"a://1\0b://2\0" + bytes.fromhex(QOS_HEX) + MIME + b"\0" + bytes.fromhex(STREAM_HEX)
    assert opened == bytes.fromhex("02010102") + struct.pack(">I", len(payload)) + payload
    assert ETSI_C.get_key(STREAM, 7, 3) == bytes.fromhex(f"02010104 0000001b {STREAM_HEX} 00000007 00000003 000000")
    assert ETSI_C.close(STREAM) == bytes.fromhex(f"02010108 00000010 {STREAM_HEX}")


def test_requests_of_qubip_byte_by_byte() -> None:
    opened = QUBIP.open_connect("a://1", "b://2", QOS, STREAM)
    payload = b"a://1\0b://2\0" + bytes.fromhex(QOS_HEX) + MIME + bytes(240) + bytes.fromhex(STREAM_HEX)
    assert opened == bytes.fromhex("01000102") + struct.pack(">I", len(payload)) + payload
    assert QUBIP.get_key(STREAM, 7, 3) == bytes.fromhex(f"01000104 00000018 {STREAM_HEX} 00000007 00000003")
    assert QUBIP.close(STREAM) == bytes.fromhex(f"01000108 00000010 {STREAM_HEX}")


def test_answers_byte_by_byte() -> None:
    key = "aa" * 32
    for profile in PROFILES.values():
        good = bytes.fromhex(f"00000000 00000007 00000020 {key} 00000002 7b7d")
        assert profile.delivered_untrusted(bytearray(good)) == Delivered(
            Status.SUCCESSFUL, 7, bytearray.fromhex(key), b"{}", 2
        )
        assert profile.closed_untrusted(bytes(4)) is Status.SUCCESSFUL
    small = bytes.fromhex("00000008 00000007 00000000 00001000")
    assert ETSI_C.delivered_untrusted(bytearray(small)).metadata_size == 4096
    assert QUBIP.delivered_untrusted(bytearray.fromhex("00000008 00001000")).metadata_size == 4096
    assert QUBIP.delivered_untrusted(bytearray.fromhex("00000002")).status is Status.INSUFFICIENT_KEY
    assert QUBIP.opened_untrusted(bytes.fromhex("00000005")).stream is None


def test_the_payload_is_wiped_once_the_key_is_out() -> None:
    payload = bytearray(bytes.fromhex("00000000 00000000 00000001 aa 00000000"))
    assert ETSI_C.delivered_untrusted(payload).key == b"\xaa"
    assert not any(payload)


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "000000",
        "00000009",
        "00000000 00000007",
        "00000000 00000007 ffffffff aa",
        "00000000 00000000 00000000 00000000 00",
    ],
)
def test_wrong_lengths_are_bad_answers(payload: str) -> None:
    for profile in PROFILES.values():
        with pytest.raises(BadAnswer):
            profile.delivered_untrusted(bytearray.fromhex(payload))


@given(profiles, st.binary(min_size=8, max_size=8), st.sampled_from(Service))
def test_headers_raise_only_bad_answer(profile: WireProfile, header: bytes, service: Service) -> None:
    with suppress(BadAnswer):
        assert profile.payload_length_untrusted(header, service) <= 1024 * 1024
        assert header[:3] == profile.version


answers = st.binary(max_size=400) | st.builds(
    lambda status, rest: struct.pack(">I", status) + rest, st.integers(0, 9), st.binary(max_size=400)
)


@given(profiles, answers)
def test_payloads_raise_only_bad_answer(profile: WireProfile, payload: bytes) -> None:
    with suppress(BadAnswer):
        profile.opened_untrusted(payload)
    with suppress(BadAnswer):
        profile.closed_untrusted(payload)
    with suppress(BadAnswer):
        answer = profile.delivered_untrusted(bytearray(payload))
        assert len(answer.key) + len(answer.metadata) <= len(payload)


@given(st.binary(max_size=100))
def test_metadata_raise_only_bad_answer(metadata: bytes) -> None:
    with suppress(BadAnswer):
        hops = hops_of(metadata)
        assert hops is None or 0 <= hops <= 255


u32 = st.integers(0, 2**32 - 1)


@given(profiles, st.builds(Qos, u32, u32, u32, u32, u32, u32, u32), st.uuids())
def test_qos_survives_the_way(profile: WireProfile, qos: Qos, stream: uuid.UUID) -> None:
    frame = profile.open_connect("a://1", "b://2", qos, stream)
    answer = bytes(4) + frame[8 + len(b"a://1\0b://2\0") :]
    opened = profile.opened_untrusted(answer)
    assert (opened.status, opened.qos, opened.stream) == (Status.SUCCESSFUL, qos, stream)
