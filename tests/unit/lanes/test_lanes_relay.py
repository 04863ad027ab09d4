"""Frames that a lane cannot send come out at lane 0 as the TUN gave them."""

from __future__ import annotations

import asyncio
import os
import struct

import pytest

from qvpn.dataplane.outbound import SUPERPACKETS
from qvpn.lanes.relay import RelayInlet, RelayOutlet, relay_pair
from qvpn.netio.base import MAX_READ
from tests.unit.dataplane.segments import Big
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, Pair, number_of, numbered


@pytest.fixture
def ends():  # type: ignore[no-untyped-def]
    ours, theirs = relay_pair()
    yield RelayInlet(ours, "lane 1"), RelayOutlet(theirs), theirs
    ours.close()
    theirs.close()


def frame(number: int) -> bytes:
    return numbered(number, FROM_ALICE[4], FROM_BOB[4])


def taken(inlet: RelayInlet, limit: int = 256) -> list[bytes]:
    arena = memoryview(bytearray(4 * MAX_READ))
    return [bytes(arena[start : start + size]) for start, size in inlet.read_batch(arena, limit)]


def test_packets_that_shared_a_record_come_out_one_by_one(ends) -> None:  # type: ignore[no-untyped-def]
    inlet, outlet, _ = ends
    assert taken(inlet) == []
    assert outlet(memoryview(frame(0) + frame(1) + frame(2)))
    assert outlet(memoryview(frame(3)))
    assert taken(inlet) == [frame(number) for number in range(4)]


def test_a_superpacket_ends_the_batch_as_it_does_on_a_tun(ends) -> None:  # type: ignore[no-untyped-def]
    inlet, outlet, _ = ends
    big = struct.pack("<BBHHHH", 1, 1, 50, 1400, 20, 16) + os.urandom(64_000)
    outlet(memoryview(frame(0)))
    outlet(memoryview(big))
    outlet(memoryview(frame(1)))
    assert taken(inlet) == [frame(0), big]
    assert taken(inlet) == [frame(1)]


def test_garbage_is_one_frame_for_the_packet_path_to_refuse(ends) -> None:  # type: ignore[no-untyped-def]
    inlet, outlet, _ = ends
    outlet(memoryview(bytes(10) + b"\x99" * 30))
    outlet(memoryview(b"\0\0\0"))
    assert [len(each) for each in taken(inlet)] == [40, 3]


def test_a_full_way_refuses_and_an_ended_one_gives_nothing(ends) -> None:  # type: ignore[no-untyped-def]
    inlet, outlet, theirs = ends
    big = memoryview(bytes(60_000))
    count = 0
    while outlet(big):
        count += 1
        assert count < 10_000, "the buffer has no end"
    assert count > 2
    theirs.close()
    assert not outlet(big)
    while taken(inlet):
        pass
    assert taken(inlet) == []


async def test_lane_0_sends_what_comes_in_and_forgets_a_way_that_is_gone(ends) -> None:  # type: ignore[no-untyped-def]
    inlet, outlet, _ = ends
    pair = Pair()
    pair.alice.plane._loop = asyncio.get_running_loop()  # twins have no descriptors, so that it would not be watched
    pair.alice.plane.add_inlet(inlet)
    pair.established()
    outlet(memoryview(frame(7)))
    for _ in range(3):
        await asyncio.sleep(0)
    pair.run()
    assert [number_of(packet) for packet in pair.bob.tun.taken] == [7]
    pair.alice.plane.remove_inlet(inlet)
    outlet(memoryview(frame(8)))
    for _ in range(3):
        await asyncio.sleep(0)
    pair.run()
    assert [number_of(packet) for packet in pair.bob.tun.taken] == [7]
    pair.alice.plane._loop = None


async def test_lane_0_sends_all_that_came_in_though_nothing_follows(ends) -> None:  # type: ignore[no-untyped-def]
    inlet, outlet, _ = ends
    pair = Pair()
    pair.alice.plane._loop = asyncio.get_running_loop()
    pair.alice.plane.add_inlet(inlet)
    pair.established()
    for number in range(3 * SUPERPACKETS):
        data = number.to_bytes(2, "big") * 1000
        outlet(memoryview(Big(FROM_ALICE[4], FROM_BOB[4], data, 1000).virtio()))
    for _ in range(10):
        await asyncio.sleep(0)
    pair.run()
    assert pair.bob.plane.stats("alice").received_packets == 3 * SUPERPACKETS * 2
    pair.alice.plane.remove_inlet(inlet)
    pair.alice.plane._loop = None
