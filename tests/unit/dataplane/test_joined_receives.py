"""Two receives behind one another in one buffer: halves of a superpacket, or what only looks like that."""

from __future__ import annotations

import pytest

from qvpn.netio.base import Received
from qvpn.tunnel import ecn
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.records import Sealer
from tests.unit.dataplane.segments import Big, finish
from tests.unit.dataplane.support import ALICE, FROM_ALICE, FROM_BOB, Pair, numbered
from tests.unit.dataplane.test_chunks import BIG, CHUNKS, PATTERN, records, watch_calls

HALF = CHUNKS // 2


def receive(pair: Pair, first: list[bytes], second: list[bytes], mark: int = 0) -> None:
    whole = b"".join(first + second)
    pair.bob.plane._inbound.process(
        Received(memoryview(whole), len(whole), len(first[0]), ALICE, mark, joined=len(first)), 0.0
    )


def got(pair: Pair) -> list[bytes]:
    return [packet for written in pair.bob.tun.taken for packet in finish(written)]


def sealed(sealer: Sealer, plaintexts: list[bytes]) -> list[bytes]:
    out = memoryview(bytearray(1 << 17))
    made, position = [], 0
    for length in sealer.seal_batch([memoryview(each) for each in plaintexts], out):
        made.append(bytes(out[position : position + length]))
        position += length
    return made


def chunks(big: Big) -> list[bytes]:
    whole = big.virtio()
    head = whole[: len(whole) - len(big.payload)]
    return [head + big.payload[cut : cut + big.segment] for cut in range(0, len(big.payload), big.segment)]


def test_two_halves_are_one_run_and_one_write() -> None:
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    receive(pair, made[:HALF], made[HALF:])
    assert len(pair.bob.tun.taken) == 1  # and nothing waits for a flush
    assert got(pair) == BIG.segments()
    epoch = pair.bob.plane.stats("alice").epochs[0]
    assert (epoch.opened, epoch.marked) == (CHUNKS, CHUNKS)


@pytest.mark.parametrize("forged", [0, 1, HALF - 1, HALF, HALF + 1, CHUNKS - 1])
def test_a_forged_chunk_of_either_half_costs_itself(forged: int) -> None:
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    made[forged] = made[forged][:40] + PATTERN * (len(made[forged]) - 40)
    calls = watch_calls(pair)
    receive(pair, made[:HALF], made[HALF:])
    pair.bob.plane._inbound.flush()
    expected = BIG.segments()
    del expected[forged]
    assert got(pair) == expected
    assert not any(PATTERN * 2 in written for written in pair.bob.tun.taken)
    assert pair.bob.plane.stats("alice").drops == {DropReason.AUTHENTICATION: 1}
    assert len(calls) <= 2 * CHUNKS


@pytest.mark.parametrize("segment", [1000, 60, 7])
def test_receives_of_other_superpackets_are_taken_apart_where_they_meet(segment: int) -> None:
    """The second half of one, and the first half of the next: three superpackets in three joined receives."""
    pair = Pair()
    keys, _ = pair.install()
    sealer = Sealer(keys.cipher, keys.send_key(0), keys.send_index)
    bigs = [Big(FROM_ALICE[4], FROM_BOB[4], bytes([number]) * (segment * CHUNKS), segment) for number in range(3)]
    made = [sealed(sealer, chunks(big)) for big in bigs]
    halves = [half for each in made for half in (each[:HALF], each[HALF:])]
    pair.bob.plane._inbound.process(
        Received(memoryview(b"".join(halves[0])), sum(map(len, halves[0])), len(halves[0][0]), ALICE), 0.0
    )
    receive(pair, halves[1], halves[2])
    receive(pair, halves[3], halves[4])
    pair.bob.plane._inbound.flush()
    receive(pair, halves[5], sealed(sealer, [numbered(1, FROM_ALICE[4], FROM_BOB[4], 8)]))
    pair.bob.plane._inbound.flush()
    small = numbered(1, FROM_ALICE[4], FROM_BOB[4], 8)[10:]
    assert got(pair) == [packet for big in bigs for packet in big.segments()] + [small]
    assert pair.drops() == {}
    if segment == 1000:
        assert len(pair.bob.tun.taken) == 5  # the third superpacket was flushed in the middle
    traffic = pair.bob.plane.stats("alice")
    assert traffic.opened == traffic.marked == 3 * CHUNKS + 1
    assert traffic.source_checks == traffic.tun_writes == len(pair.bob.tun.taken)


def test_packed_packets_on_both_sides_of_the_seam_keep_their_order() -> None:
    pair = Pair()
    keys, _ = pair.install()
    sealer = Sealer(keys.cipher, keys.send_key(0), keys.send_index)
    packets = [numbered(number, FROM_ALICE[4], FROM_BOB[4]) for number in range(12)]
    one, other = sealed(sealer, packets[:6]), sealed(sealer, packets[6:])
    receive(pair, one, other)
    assert pair.bob.tun.taken == packets


def test_a_replayed_half_is_dropped_and_the_other_passes() -> None:
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    first = b"".join(made[:HALF])
    pair.bob.plane._inbound.process(Received(memoryview(first), len(first), len(made[0]), ALICE), 0.0)
    pair.bob.plane._inbound.flush()
    receive(pair, made[:HALF], made[HALF:])
    pair.bob.plane._inbound.flush()
    assert got(pair) == BIG.segments()
    assert pair.drops() == {DropReason.REPLAY: HALF}


def test_a_receive_that_waited_too_long_costs_its_own_half() -> None:
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    receive(pair, made[:HALF], made[HALF:], ecn.WAITED)
    pair.bob.plane._inbound.flush()
    assert got(pair) == BIG.segments()[HALF:]
    assert pair.drops() == {DropReason.RECEIVE_QUEUE: HALF}
    assert pair.bob.plane.stats("alice").marked == CHUNKS
