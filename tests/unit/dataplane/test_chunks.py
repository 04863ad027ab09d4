"""Superpackets: forged chunks, limits, and how many calls they cost."""

from __future__ import annotations

from typing import Any

import pytest

from qvpn.dataplane.views import RecordViews
from qvpn.netio.base import Received
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import EpochKeys
from qvpn.tunnel.records import Limits, Sealer
from tests.unit.dataplane.segments import Big, finish
from tests.unit.dataplane.support import ALICE, BOB, FROM_ALICE, FROM_BOB, Pair

PATTERN = b"\xee"
CHUNKS = 40
BIG = Big(FROM_ALICE[4], FROM_BOB[4], bytes(range(250)) * 160, 1000)


def records(keys: EpochKeys, big: Big = BIG) -> list[bytes]:
    whole = big.virtio()
    head = whole[: len(whole) - len(big.payload)]
    plaintexts = [head + big.payload[cut : cut + big.segment] for cut in range(0, len(big.payload), big.segment)]
    sealer = Sealer(keys.cipher, keys.send_key(0), keys.send_index)
    out = memoryview(bytearray(sum(len(plaintext) + 32 for plaintext in plaintexts)))
    made, position = [], 0
    for length in sealer.seal_batch([memoryview(plaintext) for plaintext in plaintexts], out):
        made.append(bytes(out[position : position + length]))
        position += length
    return made


def receive(pair: Pair, batch: list[bytes]) -> None:
    joined = b"".join(batch)
    pair.bob.plane._inbound.process(Received(memoryview(joined), len(joined), len(batch[0]), ALICE), 0.0)


def got(pair: Pair) -> list[bytes]:
    return [packet for written in pair.bob.tun.taken for packet in finish(written)]


def watch_calls(pair: Pair) -> list[int]:
    """The list grows by one with each AEAD call of Bob's receiving key."""
    calls: list[int] = []
    (_, epoch) = next(iter(pair.bob.plane._table.by_index.values()))
    decrypt = epoch.opener.decrypt

    def counted(nonce: Any, data: Any, aad: None, out: Any) -> int:
        calls.append(len(data))
        return decrypt(nonce, data, aad, out)

    epoch.opener.decrypt = counted
    return calls


def test_a_whole_superpacket_is_one_write_and_one_aead_call_per_chunk() -> None:
    pair = Pair()
    keys, _ = pair.install()
    receive(pair, records(keys))
    assert len(pair.bob.tun.taken) == 1
    assert got(pair) == BIG.segments()
    epoch = pair.bob.plane.stats("alice").epochs[0]
    assert (epoch.opened, epoch.marked) == (CHUNKS, CHUNKS)


def test_two_receives_of_one_superpacket_are_one_write() -> None:
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    receive(pair, made[:23])
    assert pair.bob.tun.taken == []
    receive(pair, made[23:])
    assert len(pair.bob.tun.taken) == 1
    assert got(pair) == BIG.segments()


def test_what_is_pending_is_written_when_nothing_more_waits() -> None:
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    receive(pair, made[:23])
    pair.bob.plane._inbound.flush()
    assert got(pair) == BIG.segments()[:23]
    receive(pair, made[23:])
    pair.bob.plane._inbound.flush()
    assert got(pair) == BIG.segments()


@pytest.mark.parametrize("at", [0, 1, 20, 38, 39])
def test_a_forged_chunk_costs_itself_and_bounded_work(at: int) -> None:
    """Its bytes reach nothing; its neighbours all arrive; no more than two AEAD calls a datagram."""
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    made[at] = made[at][:40] + PATTERN * (len(made[at]) - 40)
    calls = watch_calls(pair)
    receive(pair, made)
    pair.bob.plane._inbound.flush()
    expected = BIG.segments()
    del expected[at]
    assert got(pair) == expected
    assert pair.bob.plane.stats("alice").drops == {DropReason.AUTHENTICATION: 1}
    epoch = pair.bob.plane.stats("alice").epochs[0]
    assert epoch.marked == CHUNKS - 1
    assert (epoch.opened, epoch.failed) == (CHUNKS - 1, 1)
    assert len(calls) <= 2 * CHUNKS


def test_every_other_chunk_forged_is_bounded_too() -> None:
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    for at in range(1, CHUNKS, 2):
        made[at] = made[at][:-1] + bytes([made[at][-1] ^ 1])
    calls = watch_calls(pair)
    receive(pair, made)
    pair.bob.plane._inbound.flush()
    assert got(pair) == BIG.segments()[::2]
    epoch = pair.bob.plane.stats("alice").epochs[0]
    assert (epoch.opened, epoch.failed) == ((CHUNKS + 1) // 2, CHUNKS // 2)
    assert len(calls) <= 2 * CHUNKS + 1


def test_a_chunk_that_arrives_twice_is_a_replay_and_spoils_nothing() -> None:
    pair = Pair()
    keys, _ = pair.install()
    made = records(keys)
    receive(pair, [made[5]])
    receive(pair, made)
    pair.bob.plane._inbound.flush()
    assert sorted(got(pair)) == sorted(BIG.segments())
    assert pair.bob.plane.stats("alice").drops == {DropReason.REPLAY: 1}


def test_a_foreign_source_is_dropped_once_for_the_whole_run() -> None:
    pair = Pair()
    keys, _ = pair.install()
    receive(pair, records(keys, Big("10.90.0.99", FROM_BOB[4], bytes(5000), 1000)))
    assert pair.bob.tun.taken == []
    assert pair.bob.plane.stats("alice").drops == {DropReason.WRONG_SOURCE: 5}


def test_a_kernel_that_refuses_is_counted_per_segment() -> None:
    pair = Pair()
    keys, _ = pair.install()
    pair.bob.tun.room = 0
    receive(pair, records(keys))
    assert pair.bob.plane.stats("alice").drops == {DropReason.TUN_FULL: CHUNKS}


def spoil(at: int, value: bytes) -> bytes:
    """The virtio, IP and TCP header of the superpacket with other bytes at one place."""
    head = BIG.virtio()[:50]
    return head[:at] + value + head[at + len(value) :]


@pytest.mark.parametrize(
    "head",
    [
        spoil(0, b"\0"),  # checksum not asked for
        spoil(0, b"\2"),
        spoil(1, b"\4"),  # TCPv6 in IPv4
        spoil(1, b"\5"),  # UDP type, TCP inside
        spoil(1, b"\3"),
        spoil(1, b"\x40"),
        spoil(4, b"\0\0"),  # segments of no bytes
        spoil(4, b"\xe7\3"),  # one byte less than the slice
        spoil(6, b"\x13\0"),  # checksum starts in the IP header
        spoil(6, b"\xff\xff"),
        spoil(8, b"\6\0"),  # UDP's checksum in TCP
        spoil(8, b"\xff\xff"),
        spoil(10, b"\x46"),  # IP header longer than csum_start
        spoil(10, b"\x44"),
        spoil(10, b"\x65"),
        spoil(12, b"\0\x30"),  # IP length within the headers
        spoil(16, b"\x20\0"),  # more fragments
        spoil(16, b"\0\1"),  # a later fragment
        spoil(19, b"\x11"),  # protocol UDP
        spoil(19, b"\x01"),
        spoil(42, b"\x40"),  # TCP data offset 16
        spoil(42, b"\xf0"),  # TCP options that are payload: the slice no longer fits
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_lying_header_reaches_nothing(head: bytes, count: int) -> None:
    pair = Pair()
    keys, _ = pair.install()
    sealer = Sealer(keys.cipher, keys.send_key(0), keys.send_index)
    plaintext = memoryview(head + bytes(1000))
    out = memoryview(bytearray(count * (len(plaintext) + 32)))
    lengths = sealer.seal_batch([plaintext] * count, out)
    receive(pair, [bytes(out[n * lengths[0] : (n + 1) * lengths[0]]) for n in range(count)])
    pair.bob.plane._inbound.flush()
    assert pair.bob.tun.taken == []
    assert pair.bob.plane.stats("alice").drops == {DropReason.MALFORMED: count}


def test_chunks_of_two_superpackets_in_one_block_are_not_mixed() -> None:
    """No honest sender does it; each chunk whose place does not fit its header is refused, none is joined."""
    pair = Pair()
    keys, _ = pair.install()
    other = Big(FROM_ALICE[4], FROM_BOB[4], bytes(40_000), 1000, sequence=5)
    mine, theirs = BIG.virtio(), other.virtio()
    plaintexts = [
        memoryview((mine if place % 2 else theirs)[:50] + (mine if place % 2 else theirs)[50 + place * 1000 :][:1000])
        for place in range(6)
    ]
    sealer = Sealer(keys.cipher, keys.send_key(0), keys.send_index)
    out = memoryview(bytearray(6 * 1082))
    sealer.seal_batch(plaintexts, out)
    for place in range(6):
        receive(pair, [bytes(out[place * 1082 : (place + 1) * 1082])])
    pair.bob.plane._inbound.flush()
    expected = [(BIG if place % 2 else other).segments()[place] for place in range(6)]
    assert got(pair) == expected


def test_sending_costs_one_call_per_chunk_and_two_sends_per_superpacket() -> None:
    pair = Pair()
    pair.established()
    sends: list[int] = []
    original = pair.alice.bind.send_segments

    def counted(buffer: memoryview, segment: int, address: object, ecn: int = 0) -> int:
        sends.append(-(-len(buffer) // segment))
        return original(buffer, segment, BOB, ecn)

    pair.alice.bind.send_segments = counted  # type: ignore[method-assign, assignment]
    before = pair.alice.plane.stats("bob").epochs[0].sealed
    for _ in range(5):
        pair.alice.tun.inject([BIG.virtio()])
    pair.run()
    assert sends == [CHUNKS] * 5
    assert pair.alice.plane.stats("bob").epochs[0].sealed - before == 5 * CHUNKS
    assert got(pair) == BIG.segments() * 5


@pytest.mark.parametrize(("ready", "reason"), [(False, DropReason.NO_KEY), (True, DropReason.NO_ENDPOINT)])
def test_a_superpacket_fails_closed_and_is_counted_by_segment(ready: bool, reason: DropReason) -> None:
    pair = Pair()
    if ready:
        pair.established()
        pair.alice.plane.set_endpoint("bob", None)
    sent = pair.network.counts["sent"]
    pair.alice.tun.inject([BIG.virtio()])
    assert pair.alice.plane.stats("bob").drops == {reason: CHUNKS}
    assert pair.network.counts["sent"] == sent


def test_the_limit_drops_a_whole_superpacket() -> None:
    pair = Pair(limits=Limits(rekey=5, stop=CHUNKS))
    keys, _ = pair.install()
    pair.alice.plane.send_control("bob", b"\x04")
    pair.alice.tun.inject([BIG.virtio()])
    pair.run()
    assert pair.bob.tun.taken == []
    assert pair.alice.plane.stats("bob").drops == {DropReason.LIMIT: CHUNKS}
    assert pair.alice.hooks.limits == []
    pair.alice.plane.erase("bob", keys.receive_index)


def test_runs_are_cut_at_every_break() -> None:
    def record(index: int, counter: int, size: int = 40) -> bytes:
        return b"\x10\x01\0\0" + index.to_bytes(4, "big") + counter.to_bytes(8, "little") + bytes(size - 16)

    control = 1 << 63
    batch = [
        record(16, 60),
        record(16, 61),
        record(32, 62),
        record(32, 64),
        record(32, 65),
        record(32, 127),
        record(32, 128),
        record(32, control | 5),
        record(32, control | 6),
        b"\x01" * 40,
        record(32, 200),
        record(32, 201, 35),
    ]
    joined = b"".join(batch)
    views = RecordViews(memoryview(joined), 40)
    assert list(views.split(0, len(batch))) == [
        (0, 2), (2, 1), (3, 2), (5, 1), (6, 1), (7, 1), (8, 1), (9, 1), (10, 2),
    ]  # fmt: skip


def test_a_part_of_a_receive_is_looked_at_by_itself() -> None:
    def record(counter: int) -> bytes:
        return b"\x10\x01\0\0" + bytes(4) + counter.to_bytes(8, "little") + bytes(24)

    counters = [60, 61, 62, 63, 64, 65, 70, 71]
    views = RecordViews(memoryview(b"".join(map(record, counters))), 40)
    assert not views.is_run(0, 8)
    assert views.is_run(0, 4)
    assert views.is_run(4, 2)
    assert not views.is_run(3, 2)
    assert not views.is_run(4, 3)
    assert list(views.split(4, 4)) == [(4, 2), (6, 2)]
    assert list(views.split(2, 3)) == [(2, 2), (4, 1)]
