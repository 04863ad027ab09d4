"""The MSS clamp: only SYNs, only downwards, and the checksum stays right (or as wrong as it was)."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from qvpn.dataplane.clamp import clamp, is_syn
from tests.unit.dataplane.segments import checksum
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, PLAIN, Pair, ip_packet

OPTIONS = st.lists(st.sampled_from([b"\1", b"\1\1", b"\3\3\7", b"\4\2", b"\x08\x0a" + bytes(8)]), max_size=3)


def tcp(version: int, flags: int, options: bytes, *, extension: bytes = b"") -> bytes:
    """Virtio header and a TCP packet without payload, its checksum finished."""
    options = options.ljust(-(-len(options) // 4) * 4, b"\0")
    head = bytearray(20)
    head[0:4], head[12], head[13] = b"\x30\x39\0\x16", (20 + len(options)) // 4 << 4, flags
    segment = bytearray(head + options)
    ends = ipaddress.ip_address(FROM_ALICE[version]).packed + ipaddress.ip_address(FROM_BOB[version]).packed
    pseudo = ends + len(segment).to_bytes(4, "big") + (6).to_bytes(4, "big")
    segment[16:18] = checksum(pseudo + segment).to_bytes(2, "big")
    protocol = 60 if extension else 6
    return PLAIN + ip_packet(FROM_ALICE[version], FROM_BOB[version], extension + segment, protocol=protocol)


def valid(packet: bytes, version: int, skip: int = 0) -> bool:
    inner = packet[10:]
    ends, segment = (inner[12:20], inner[20:]) if version == 4 else (inner[8:40], inner[40 + skip :])
    return checksum(ends + len(segment).to_bytes(4, "big") + (6).to_bytes(4, "big") + segment) == 0


def mss_of(packet: bytes) -> int:
    place = 10 + (40 if packet[10] >> 4 == 4 else 60)
    while packet[place] != 2:
        place += 1 if packet[place] == 1 else packet[place + 1]
    return int.from_bytes(packet[place + 2 : place + 4], "big")


@given(
    st.sampled_from([4, 6]),
    st.sampled_from([0x02, 0x12, 0xC2]),
    OPTIONS,
    OPTIONS,
    st.integers(1, 0xFFFF),
    st.integers(68, 9000),
    st.booleans(),
)
def test_the_mss_is_lowered_to_the_path_and_the_checksum_with_it(
    version: int, flags: int, before: list[bytes], after: list[bytes], said: int, mtu: int, good: bool
) -> None:
    options = b"".join(before) + b"\2\4" + said.to_bytes(2, "big") + b"".join(after)
    packet = tcp(version, flags, options[:40] if len(b"".join(before)) <= 36 else b"\2\4" + said.to_bytes(2, "big"))
    if not good:
        broken = bytearray(packet)
        broken[10 + (25 if version == 4 else 45)] ^= 0x5A  # in the sequence number
        packet = bytes(broken)
    wanted = mtu - (40 if version == 4 else 60)
    data = memoryview(bytearray(packet))
    assert is_syn(data, 10, len(data))
    changed = clamp(data, 0, len(data), mtu)
    assert changed == (0 < wanted < said)
    assert changed or bytes(data) == packet
    if changed:
        assert mss_of(bytes(data)) == wanted
    assert valid(bytes(data), version) == valid(packet, version)


def test_a_partial_checksum_is_left_alone() -> None:
    packet = bytearray(tcp(4, 2, b"\2\4\x05\xb4"))
    packet[0] = 1
    data = memoryview(bytearray(packet))
    assert clamp(data, 0, len(data), 1000)
    assert data[46:48] == packet[46:48] and mss_of(bytes(data)) == 960


def test_what_is_no_syn_with_an_mss_is_left_alone() -> None:
    whole = tcp(4, 2, b"\2\4\x05\xb4")
    fragment = bytearray(whole)
    fragment[17] = 1
    cases = [
        tcp(4, 0x10, b"\2\4\x05\xb4"),  # an ACK
        tcp(4, 2, b""),
        tcp(4, 2, b"\0\2\4\x05\xb4"),  # after the end of the options
        tcp(4, 2, b"\2\0\x05\xb4"),  # a length that leads nowhere
        tcp(4, 2, b"\1\1\1\2"),  # cut off
        tcp(4, 2, b"\3\x20\1\2"),
        bytes(fragment),
        whole[:40],
        PLAIN + ip_packet(FROM_ALICE[4], FROM_BOB[4], whole[30:], protocol=17),
    ]
    for case in cases:
        data = memoryview(bytearray(case))
        assert not clamp(data, 0, len(data), 600)
        assert bytes(data) == case


def test_behind_ipv6_extension_headers() -> None:
    packet = tcp(6, 2, b"\2\4\x05\xb4", extension=b"\x06\0\1\4" + bytes(4))
    data = memoryview(bytearray(packet))
    assert clamp(data, 0, len(data), 1280)
    assert int.from_bytes(data[10 + 40 + 8 + 22 : 10 + 40 + 8 + 24], "big") == 1220
    assert valid(bytes(data), 6, skip=8)


@given(st.binary(max_size=120), st.integers(-100, 70_000))
def test_no_bytes_make_it_raise_or_reach_beyond_the_packet(body: bytes, mtu: int) -> None:
    for version in (4, 6):
        packet = PLAIN + ip_packet(FROM_ALICE[version], FROM_BOB[version], body, protocol=6)
        data = memoryview(bytearray(packet) + b"beyond")
        is_syn(data[: len(packet)], 10, len(packet))
        clamp(data, 0, len(packet), mtu)
        assert data[len(packet) :] == b"beyond"


def test_both_directions_through_the_tunnel() -> None:
    pair = Pair()
    pair.established()
    pair.alice.plane.set_path("bob", 1000, provisional=False)
    pair.alice.tun.inject([tcp(4, 2, b"\2\4\x05\xb4")])
    pair.run()
    assert mss_of(pair.bob.tun.taken[0]) == 1000 - 42 - 40
    pair.bob.plane.set_path("alice", 1472, provisional=False)
    back = bytearray(tcp(4, 0x12, b"\2\4\x05\xb4"))
    back[22:26], back[26:30] = back[26:30], back[22:26]
    pair.bob.tun.inject([bytes(back)])
    pair.run()
    assert mss_of(pair.alice.tun.taken[0]) == 1000 - 42 - 40
