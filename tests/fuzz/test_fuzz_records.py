"""Anything at all as a datagram or as a plaintext: a counted drop or a good packet, never an error."""

from __future__ import annotations

from hypothesis import event, given, settings
from hypothesis import strategies as st

from qvpn.netio import offload
from qvpn.netio.base import Received
from qvpn.tunnel import ip
from qvpn.tunnel.records import Sealer
from tests.unit.dataplane.support import ALICE, FROM_ALICE, FROM_BOB, PLAIN, Pair, ip_packet

PAIR = Pair()
INITIATOR, RESPONDER = PAIR.install()
SEALER = Sealer(INITIATOR.cipher, INITIATOR.send_key(0), INITIATOR.send_index)

FIRST_BYTES = st.sampled_from(
    [b"\x10\x01\0\0", b"\x10\x01\0\0" + RESPONDER.receive_index.to_bytes(4, "big"), b"\x01"]
)


def total_drops() -> int:
    return sum(PAIR.bob.plane.stats("alice").drops.values()) + sum(PAIR.bob.plane.drops.nonzero().values())


def receive(data: bytes, segment: int, joined: int = 0) -> None:
    received = Received(memoryview(data), len(data), segment, ALICE, joined=joined)
    PAIR.bob.plane._inbound.process(received, 0.0)


@given(
    st.binary(max_size=200) | st.builds(lambda a, b: a + b, FIRST_BYTES, st.binary(max_size=200)),
    st.integers(1, 300),
    st.integers(0, 9),
)
def test_any_datagrams(data: bytes, segment: int, joined: int) -> None:
    drops, handshakes = total_drops(), len(PAIR.bob.hooks.handshakes)
    receive(data, min(segment, len(data)), joined)
    datagrams = -(-len(data) // min(segment, len(data))) if data else 1
    assert total_drops() - drops + len(PAIR.bob.hooks.handshakes) - handshakes == datagrams
    assert PAIR.bob.tun.taken == []


VIRTIO = st.builds(
    lambda flags, gso, *words: bytes([flags, gso]) + b"".join(word.to_bytes(2, "little") for word in words),
    st.sampled_from([0, 1, 2, 3, 4, 255]),
    st.sampled_from([0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 0x85, 255]),
    *[st.integers(0, 60) | st.integers(0, 65535)] * 4,
)
IP_START = st.sampled_from(
    [
        ip_packet(FROM_ALICE[4], FROM_BOB[4], b"", 6),
        ip_packet(FROM_ALICE[4], FROM_BOB[4], b"", 17),
        ip_packet(FROM_ALICE[6], FROM_BOB[6], b"", 6),
        ip_packet(FROM_ALICE[6], FROM_BOB[6], b"", 0),
        b"",
    ]
)


@st.composite
def inner(draw: st.DrawFn) -> bytes:
    """Something like a packet: header fields right, wrong or random, a few bytes flipped."""
    packet = bytearray(draw(IP_START) + draw(st.binary(max_size=120)))
    if len(packet) >= 20 and draw(st.booleans()):
        length = len(packet) if packet[0] >> 4 == 4 else max(0, len(packet) - 40)
        at = 2 if packet[0] >> 4 == 4 else 4
        packet[at : at + 2] = (length + draw(st.sampled_from([0, 0, 0, 1, 1000]))).to_bytes(2, "big")
    for _ in range(draw(st.integers(0, 2))):
        if packet:
            packet[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    return draw(VIRTIO | st.just(PLAIN)) + bytes(packet)


@settings(max_examples=400)
@given(st.lists(inner(), max_size=4).map(b"".join) | st.binary(max_size=300))
def test_any_plaintext_of_an_authenticated_peer(plaintext: bytes) -> None:
    """What comes out is fit for the kernel: lengths agree with the bytes, offsets lie inside, source allowed."""
    drops = total_drops()
    PAIR.bob.tun.taken.clear()
    record = memoryview(bytearray(len(plaintext) + 32))
    SEALER.seal_batch([memoryview(plaintext)], record)
    receive(bytes(record), len(record))
    taken = PAIR.bob.tun.taken
    event("passed" if taken else "dropped")
    assert taken or total_drops() > drops
    for packet in taken:
        check_fit(memoryview(packet))
    taken.clear()


def check_fit(packet: memoryview) -> None:
    flags, gso_type, hdr_len, _, csum_start, csum_offset = offload.VIRTIO.unpack_from(packet)
    inner_length = len(packet) - 10
    assert ip.packet_length(packet, 10, len(packet)) == inner_length
    assert gso_type == 0
    assert flags in (0, 1, 2)
    assert hdr_len <= inner_length
    if flags == 1:
        assert 20 <= csum_start < csum_start + csum_offset + 2 <= inner_length
    assert bytes(ip.source(packet, 10)) in {
        bytes([10, 90, 0, 1]),
        bytes.fromhex("fd900000000000000000000000000001"),
    }


@given(st.binary(min_size=1, max_size=120), st.integers(0, 120), st.integers(0, 120))
def test_ip_parsing_never_raises(data: bytes, start: int, end: int) -> None:
    view = memoryview(data)
    end = min(end, len(data))
    start = min(start, end)
    length = ip.packet_length(view, start, end)
    assert 0 <= length <= end - start
    if length:
        assert len(ip.source(view, start)) == len(ip.destination(view, start)) in (4, 16)
        found = ip.transport(view, start, start + length)
        assert found is None or 20 <= found[1] <= length
    if end - start >= 10:
        parsed = offload.parse_superpacket(view, start, end)
        assert parsed is None or start + parsed.header <= end
