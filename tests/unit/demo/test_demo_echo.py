"""ICMP echo: the checksum of RFC 1071, and answers that are not ours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.demo import echo

IPV4_HEADER = bytes([0x45]) + bytes(19)


def test_the_checksum_of_the_example_in_rfc_1071_section_3() -> None:
    # The words 0001 f203 f4f5 f6f7 sum to ddf2, whose complement is the checksum.
    assert echo.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2


@given(st.binary(max_size=99))
def test_a_message_with_its_checksum_sums_to_zero(data: bytes) -> None:
    even = data + b"\0" * (len(data) % 2)
    assert echo.checksum(even + echo.checksum(even).to_bytes(2, "big")) == 0


def _answer(sequence: int, identifier: int, *, v6: bool) -> bytes:
    asked = echo.request(identifier, sequence, v6=v6)
    return (b"" if v6 else IPV4_HEADER) + bytes([129 if v6 else 0]) + asked[1:]


@pytest.mark.parametrize("v6", [False, True])
def test_our_answer_is_known_by_its_number(v6: bool) -> None:
    assert echo.reply_untrusted(_answer(7, 1234, v6=v6), 1234, v6=v6) == 7


@pytest.mark.parametrize("v6", [False, True])
def test_a_request_or_another_programs_answer_is_not_ours(v6: bool) -> None:
    header = b"" if v6 else IPV4_HEADER
    assert echo.reply_untrusted(header + echo.request(1234, 7, v6=v6), 1234, v6=v6) is None
    assert echo.reply_untrusted(_answer(7, 1235, v6=v6), 1234, v6=v6) is None
    assert echo.reply_untrusted(_answer(7, 1234, v6=v6)[:-1], 1234, v6=v6) is None


@given(st.binary(max_size=120), st.booleans())
def test_no_packet_breaks_the_reader(packet: bytes, v6: bool) -> None:
    assert echo.reply_untrusted(packet, 1, v6=v6) in (None, *range(65536))
