"""From TUN to TUN over a network that loses, shuffles, repeats, forges and marks: byte for byte what was sent.

Both ends are the real Outbound and Inbound; between them stands a model of the network and of UDP GRO.  A second,
slow reading of the records (own decryption, own walk over the packets) tells what each of them must deliver.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import event, given, settings
from hypothesis import strategies as st

from qvpn.netio.base import Received
from qvpn.netio.memory import Impairments
from qvpn.tunnel.keys import EpochKeys
from tests.property.dataplane_traffic import superpackets, traffic
from tests.property.kernel_model import UDP_L4, kernel, ones_complement, without_free_identification
from tests.property.test_dataplane_chunks_model import bigs
from tests.unit.dataplane.segments import Big
from tests.unit.dataplane.support import ALICE, Pair, two_in_one

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
CE = 3


@dataclass(frozen=True)
class Datagram:
    """A record on the wire and the ECN bits of its outer header."""

    data: bytes
    ecn: int


def sent_by(pair: Pair) -> list[Datagram]:
    """Grows by what Alice sends; nothing of it arrives by itself."""
    caught: list[Datagram] = []

    def take(buffer: memoryview, segment: int, address: object, ecn: int = 0) -> int:
        cuts = range(0, len(buffer), segment)
        caught.extend(Datagram(bytes(buffer[cut : cut + segment]), ecn) for cut in cuts)
        return len(cuts)

    pair.alice.bind.send_segments = take  # type: ignore[method-assign, assignment]
    return caught


def open_slowly(record: bytes, keys: list[EpochKeys]) -> bytes:
    """The plaintext, with nothing of the code under test."""
    (key,) = [each for each in keys if each.send_index.to_bytes(4, "big")[:3] == record[4:7]]
    return AESGCM(key.send_key(0)).decrypt(record[4:16], record[16:], None)


def packets_in(plaintext: bytes) -> int:
    if plaintext[1]:
        return 1
    count = position = 0
    while position < len(plaintext):
        version = plaintext[position + 10] >> 4
        at, base = (12, 0) if version == 4 else (14, 40)
        position += 10 + base + int.from_bytes(plaintext[position + at : position + at + 2], "big")
        count += 1
    assert position == len(plaintext)
    return count


def contents(caught: list[Datagram], packets: list[bytes], keys: list[EpochKeys]) -> dict[bytes, list[bytes]]:
    """Which of the packets, in order, each record carries: none missing, none twice."""
    found, rest = {}, list(packets)
    for datagram in caught:
        count = packets_in(open_slowly(datagram.data, keys))
        assert datagram.data not in found
        found[datagram.data], rest = rest[:count], rest[count:]
        assert len(found[datagram.data]) == count
        for packet in found[datagram.data]:
            assert ecn_of(packet) == datagram.ecn
    assert rest == []
    return found


def ecn_of(packet: bytes) -> int:
    return (packet[1] if packet[0] >> 4 == 4 else packet[1] >> 4) & 3


def marked(packet: bytes, outer: int) -> list[bytes]:
    """RFC 6040, figure 4, for one finished packet."""
    inner = ecn_of(packet)
    if outer == CE and inner == 0:
        return []
    new = CE if outer == CE else 1 if (inner, outer) == (2, 1) else inner
    data = bytearray(packet)
    if data[0] >> 4 == 4:
        data[1] = data[1] & 0xFC | new
        data[10:12] = bytes(2)
        data[10:12] = (0xFFFF - ones_complement(bytes(data[: (data[0] & 15) * 4]))).to_bytes(2, "big")
    else:
        data[1] = data[1] & 0xCF | new << 4
    return [bytes(data)]


def disturb(datagrams: list[Datagram], trouble: set[str], chance: random.Random) -> list[Datagram]:
    """What a hostile path makes of them."""
    arriving = list(datagrams)
    if "mark" in trouble:
        arriving = [_marked_on_the_way(each, chance) for each in arriving]
    if "lose" in trouble:
        arriving = [each for each in arriving if chance.random() > 0.15]
    if "repeat" in trouble:
        for each in chance.sample(arriving, len(arriving) // 4):
            arriving.insert(chance.randrange(len(arriving) + 1), each)
    if "forge" in trouble and arriving:
        for _ in range(1 + len(arriving) // 8):
            victim = chance.randrange(len(arriving))
            arriving.insert(victim + chance.randrange(2), _forged(arriving[victim], chance))
    if "replace" in trouble and arriving:
        for _ in range(1 + len(arriving) // 16):
            victim = chance.randrange(len(arriving))
            arriving[victim] = _forged(arriving[victim], chance)
    if "shuffle near" in trouble:
        for _ in range(4):
            cut = chance.randrange(len(arriving) + 1)
            arriving[cut : cut + 9] = chance.sample(arriving[cut : cut + 9], len(arriving[cut : cut + 9]))
    if "shuffle far" in trouble:
        for _ in range(2):
            cut, size = chance.randrange(len(arriving) + 1), chance.randrange(1, 40)
            moved = arriving[cut : cut + size]
            del arriving[cut : cut + size]
            target = chance.randrange(len(arriving) + 1)
            arriving[target:target] = moved
    return arriving


def _marked_on_the_way(datagram: Datagram, chance: random.Random) -> Datagram:
    """A router marks what is capable; a broken one changes anything."""
    if chance.random() > 0.3:
        return datagram
    outer = CE if datagram.ecn and chance.random() < 0.8 else chance.randrange(4)
    return Datagram(datagram.data, outer)


def _forged(datagram: Datagram, chance: random.Random) -> Datagram:
    data = bytearray(datagram.data) or bytearray(40)
    way = chance.randrange(4)
    if way == 0:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == 1:
        data[16:] = chance.randbytes(max(0, len(data) - 16))
    elif way == 2:
        data[-1] ^= 0x80
    else:
        del data[chance.randrange(len(data)) :]
    return Datagram(bytes(data), datagram.ecn)


def receives(datagrams: list[Datagram], chance: random.Random) -> Iterator[Received]:
    """UDP GRO: neighbours of equal length (the last may be shorter) and equal ECN bits, broken off anywhere."""
    batch: list[Datagram] = []
    for datagram in datagrams:
        joins = (
            batch
            and len(batch) < 64
            and datagram.ecn == batch[0].ecn
            and len(batch[-1].data) == len(batch[0].data) >= len(datagram.data) > 0
            and (len(batch) + 1) * len(batch[0].data) <= 65_507
            and chance.random() < 0.95
        )
        if batch and not joins:
            yield _received(batch)
            batch = []
        batch.append(datagram)
    if batch:
        yield _received(batch)


def _received(batch: list[Datagram]) -> Received:
    data = b"".join(each.data for each in batch)
    return Received(memoryview(bytearray(data)), len(data), len(batch[0].data), ALICE, batch[0].ecn)


TROUBLES = st.one_of(
    st.just(frozenset[str]()),
    st.sampled_from(
        [frozenset({each}) for each in ("mark", "lose", "repeat", "forge", "replace", "shuffle near", "shuffle far")]
    ),
    st.frozensets(st.sampled_from(["mark", "lose", "repeat", "forge", "replace", "shuffle near", "shuffle far"])),
)


@pytest.mark.timeout(900)
@settings(max_examples=600 if LONG else 60, deadline=None)
@given(
    st.lists(traffic(), min_size=1, max_size=3),
    TROUBLES,
    st.integers(0, 2**32),
    st.sampled_from([1472, 1600, 9000]),
    st.sampled_from([True, True, False]),
)
def test_what_comes_out_is_what_went_in(
    bursts: list[list[bytes]], trouble: frozenset[str], seed: int, path: int, udp_whole: bool
) -> None:
    """Each arriving honest record delivers its packets, once, unaltered and at once in order; nothing else does.

    Without ``udp_whole`` the receiver's kernel knows no UDP superpackets, and gets none.
    """
    pair = Pair(impairments=Impairments(max_payload=path))
    pair.bob.tun.merges_udp = udp_whole
    keys = [pair.established()[0]]
    caught = sent_by(pair)
    for number, burst in enumerate(bursts, start=2):
        pair.alice.tun.inject(burst)
        if number % 2:
            keys.append(pair.install(number)[0])
    assert pair.alice.plane.stats("bob").drops == {}
    sent = [packet for burst in bursts for frame in burst for packet in kernel(frame)]
    carried = contents(caught, sent, keys)

    chance = random.Random(seed)
    arriving = disturb(caught, set(trouble), chance)
    expected, seen = [], set()
    for datagram in arriving:
        if datagram.data in carried and datagram.data not in seen:
            seen.add(datagram.data)
            expected += [after for packet in carried[datagram.data] for after in marked(packet, datagram.ecn)]

    pair.bob.tun.taken.clear()
    for received in two_in_one(receives(arriving, chance), chance):
        pair.bob.plane._inbound.process(received, 1.0)
        if chance.random() < 0.2:
            pair.bob.plane._inbound.flush()
    pair.bob.plane._inbound.flush()
    got = [packet for frame in pair.bob.tun.taken for packet in kernel(frame)]
    assert list(map(without_free_identification, got)) == list(map(without_free_identification, expected))
    assert udp_whole or all(frame[1] != UDP_L4 for frame in pair.bob.tun.taken)
    traffic_stats = pair.bob.plane.stats("alice")
    assert sum(epoch.marked for epoch in traffic_stats.epochs) == len(seen) + 1  # and one control record
    assert traffic_stats.received_packets == len(expected)
    assert traffic_stats.received_bytes == sum(map(len, expected))
    event(f"trouble: {len(trouble)}")


@settings(max_examples=300 if LONG else 40, deadline=None)
@given(superpackets(most=400), st.sampled_from([1472, 9000]))
def test_superpackets_with_any_number_of_segments(frame: bytes, path: int) -> None:
    """More than 64 chunks take several blocks, the last of them perhaps one byte."""
    pair = Pair(impairments=Impairments(max_payload=path))
    pair.established()
    pair.alice.tun.inject([frame])
    pair.run()
    assert [packet for written in pair.bob.tun.taken for packet in kernel(written)] == kernel(frame)
    assert pair.drops() == {}


@given(bigs())
def test_the_two_models_agree(big: Big) -> None:
    """This one computes from bytes, the other from fields."""
    if len(big.payload) > big.segment:
        assert kernel(big.virtio()) == big.segments()
