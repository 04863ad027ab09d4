"""IPv6 packets fragmented inside, for IPv6 paths of less than 1370 bytes, beside a slow host that joins them."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.dataplane.oversize import fragments6
from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments, MemoryNetwork
from tests.unit.dataplane.segments import UDP, Big, checksum
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, PLAIN, Recorder, epoch_pair, ip_packet, networks

NAME = b"\x12\x34\x56\x78"
HOP_BY_HOP, ROUTING, FRAGMENT, OPTIONS = 0, 43, 44, 60


def joined(fragments: list[bytes]) -> bytes:
    """What the destination makes of them, after RFC 8200, 4.5, in whatever order they come."""
    pieces: dict[int, bytes] = {}
    head, end, names = b"", None, set()
    for fragment in sorted(fragments, key=lambda each: each[::-1]):
        assert fragment[:10] == PLAIN
        packet = fragment[10:]
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
        at, kind, named = 40, packet[6], 6
        while kind != FRAGMENT:
            named, kind = at, packet[at]
            at += 8 * (packet[at + 1] + 1)
        following, reserved, field, name = struct.unpack_from(">BBH4s", packet, at)
        names.add(name)
        assert reserved == 0 and field & 6 == 0
        payload = packet[at + 8 :]
        assert field & 1 == 0 or len(payload) % 8 == 0
        if not field & 1:
            end = (field & ~7) + len(payload)
        if not field & ~7:
            changed = bytearray(packet[:at])
            changed[named] = following
            head = bytes(changed)
        pieces[field & ~7] = payload
    assert len(names) == 1 and head and end is not None
    body = b""
    for offset in sorted(pieces):
        assert offset == len(body)
        body += pieces[offset]
    assert len(body) == end
    whole = bytearray(head + body)
    struct.pack_into(">H", whole, 4, len(whole) - 40)
    return bytes(whole)


def extended(kinds: list[int], payload: bytes) -> bytes:
    """An IPv6 packet with these extension headers of 8 and 16 bytes in turn, then protocol 253."""
    chain = [*kinds, 253]
    body = b"".join(bytes([chain[place + 1], place & 1]) + bytes(6 + 8 * (place & 1)) for place in range(len(kinds)))
    packet = bytearray(ip_packet(FROM_ALICE[6], FROM_BOB[6], body + payload, protocol=chain[0]))
    return bytes(packet)


@given(
    st.integers(1, 1240),
    st.integers(600, 1279),
    st.integers(96, 900),
    st.sampled_from([[], [HOP_BY_HOP], [HOP_BY_HOP, OPTIONS, ROUTING], [OPTIONS], [ROUTING, OPTIONS]]),
)
def test_what_is_cut_once_and_again_is_joined_to_the_same_bytes(
    size: int, mtu: int, narrower: int, kinds: list[int]
) -> None:
    packet = extended(kinds, bytes(place * 7 & 255 for place in range(size)))
    parts = fragments6(memoryview(PLAIN + packet), mtu, NAME)
    assert all(len(part) - 10 <= mtu for part in parts)
    assert joined(parts) == packet
    again = [
        small
        for part in parts
        for small in (fragments6(memoryview(part), narrower, b"none") if len(part) - 10 > narrower else [part])
    ]
    assert all(len(part) - 10 <= narrower for part in again)
    assert joined(again) == packet


def test_a_checksum_left_to_the_card_is_finished_first() -> None:
    whole = Big(FROM_ALICE[6], FROM_BOB[6], bytes(range(256)) * 4 + bytes(180), 1280, protocol=UDP)
    packet = bytearray(whole.virtio())
    packet[1], packet[4:6] = 0, b"\0\0"
    made = joined(fragments6(memoryview(packet), 1190, NAME))
    assert checksum(whole.pseudo(len(made) - 40) + made[40:]) == 0


@pytest.mark.parametrize("broken", [b"\x3c" + bytes(7), b"\x3c\xff" + bytes(6), b""])
def test_a_broken_chain_of_headers_is_not_cut(broken: bytes) -> None:
    packet = ip_packet(FROM_ALICE[6], FROM_BOB[6], broken, protocol=OPTIONS)
    assert fragments6(memoryview(PLAIN + packet), 1190, NAME) == []
    assert fragments6(memoryview(PLAIN + extended([], bytes(200))), 55, NAME) == []


@given(st.binary(max_size=200))
def test_no_bytes_upset_it(rubbish: bytes) -> None:
    for kind in (HOP_BY_HOP, ROUTING, FRAGMENT, OPTIONS):
        fragments6(memoryview(PLAIN + ip_packet(FROM_ALICE[6], FROM_BOB[6], rubbish, protocol=kind)), 120, NAME)


@pytest.mark.parametrize("provisional", [False, True])
def test_on_a_narrow_ipv6_path_every_size_up_to_1280_arrives(provisional: bool) -> None:
    from qvpn.dataplane.plane import Plane
    from qvpn.netio.memory import MemoryTun

    payload = 1280 - 48
    network = MemoryNetwork(0, Impairments(max_payload=1452, path_payload=payload))
    ends = {name: Address(ipaddress.ip_address(f"2001:db8::{number}"), 51840) for number, name in enumerate("ab")}
    tuns = {name: MemoryTun() for name in "ab"}
    planes = {name: Plane(tuns[name], network.bind(ends[name]), lambda: network.now, Recorder()) for name in "ab"}
    keys = dict(zip("ab", epoch_pair(), strict=True))
    for name, other, prefixes in (("a", "b", FROM_BOB), ("b", "a", FROM_ALICE)):
        planes[name].add_peer(other, networks(prefixes), overlap=9.0)
        planes[name].set_endpoint(other, ends[other])
        planes[name].start()
        planes[name].set_path(other, payload, provisional=provisional)
    planes["b"].install("a", keys["b"])
    planes["a"].install("b", keys["a"])
    for size in range(40, 1500, 7):
        packet = ip_packet(FROM_ALICE[6], FROM_BOB[6], (size.to_bytes(2, "big") * 750)[: size - 40])
        tuns["a"].inject([PLAIN + packet])
        network.advance(network.now + 0.2)
        got, tuns["b"].taken = tuns["b"].taken, []
        told, tuns["a"].taken = tuns["a"].taken, []
        if size > 1280:
            assert not got and len(told) == (0 if provisional else 1)
        elif size > payload - 42:
            assert len(got) == 2 and joined(got) == packet
        else:
            assert got == [PLAIN + packet]
    assert network.counts["too_long"] == network.counts["fragmented"] == 0
