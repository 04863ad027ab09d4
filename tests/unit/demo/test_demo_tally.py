"""What a capture counts, on frames built here."""

import struct
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.demo import payload
from qvpn.demo.capture import Tally

MARKER = bytes(range(16))
INNER = [ip_network("10.90.0.0/24"), ip_network("fd90::/64")]


def _udp(source: str, target: str, body: bytes, port: int = 51840) -> bytes:
    ends = ip_address(source).packed + ip_address(target).packed
    datagram = struct.pack(">HHHH", 40000, port, 8 + len(body), 0) + body
    if ":" in source:
        return struct.pack(">IHBB", 6 << 28, len(datagram), 17, 64) + ends + datagram
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0) + ends + datagram


def _count(*frames: bytes, ethernet: bool = True, room: int = 65536) -> dict[str, object]:
    tally = Tally(MARKER, inner=INNER, port=51840)
    for number, frame in enumerate(frames):
        whole = bytes(12) + b"\x08\x00" + frame if ethernet else frame
        buffer = bytearray(room)
        buffer[: min(len(whole), room)] = whole[:room]
        tally.note_untrusted(buffer, len(whole), ethernet=ethernet, now=float(number))
    return tally.result()


@pytest.mark.parametrize("ethernet", [True, False])
@pytest.mark.parametrize(("left", "right"), [("192.0.2.2", "198.51.100.2"), ("2001:db8:1::2", "2001:db8:2::2")])
def test_plaintext_records_and_inner_addresses_are_counted(left: str, right: str, ethernet: bool) -> None:
    result = _count(
        _udp(left, right, b"\x10" + bytes(40)),
        _udp(left, right, b"\x01\x01\x03" + bytes(40)),
        _udp(left, right, b"\x10" + payload.filled(200, MARKER)),
        _udp("10.90.0.1", "10.90.0.2", bytes(10), port=9),
        _udp("fd90::1", right if ":" in right else "fd91::1", bytes(10), port=9),
        ethernet=ethernet,
    )
    assert result["frames"] == 5
    assert result["frames_with_plaintext"] == 1
    assert result["last_plaintext_at"] == 2.0
    assert result["tunnel_records"] == 2
    assert result["last_record_at"] == 2.0
    assert result["handshake_datagrams"] == {"M1": 1}
    assert result["suites"] == [3]
    assert result["frames_with_inner_address"] == 2
    assert result["truncated"] == 0


def test_what_an_earlier_longer_frame_left_in_the_buffer_is_not_found_again() -> None:
    tally = Tally(MARKER)
    buffer = bytearray(payload.filled(500, MARKER))
    tally.note_untrusted(buffer, 500, ethernet=True, now=0.0)
    tally.note_untrusted(buffer, 20, ethernet=True, now=1.0)
    assert tally.with_plaintext == 1


def test_a_frame_longer_than_the_buffer_is_counted_as_truncated() -> None:
    assert _count(bytes(300), room=100)["truncated"] == 1


@given(st.binary(max_size=100), st.booleans())
def test_no_frame_breaks_the_tally(frame: bytes, ethernet: bool) -> None:
    tally = Tally(MARKER, inner=INNER, port=51840)
    tally.note_untrusted(bytearray(frame), len(frame), ethernet=ethernet, now=0.0)
    assert tally.frames == 1
