"""Superpackets as chunks, against segmentation done one packet at a time."""

from __future__ import annotations

import os
import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from qvpn.netio import offload
from qvpn.netio.base import Received
from qvpn.netio.memory import Impairments
from qvpn.tunnel.records import Sealer
from tests.unit.dataplane.segments import ACK, CWR, ECE, FIN, PSH, TCP, UDP, Big, finish, reassemble
from tests.unit.dataplane.support import ALICE, FROM_ALICE, FROM_BOB, Pair, numbered, two_in_one

LONG = os.environ.get("QVPN_TEST_LONG") == "1"


@st.composite
def bigs(draw: st.DrawFn, max_chunks: int = 64) -> Big:
    version = draw(st.sampled_from([4, 6]))
    segment = draw(st.integers(1, 80) | st.integers(500, 1300))
    chunks = draw(st.integers(1, max_chunks))
    size = min((chunks - 1) * segment + draw(st.integers(1, segment)), 60_000)
    seed = draw(st.integers(0, 2**32))
    return Big(
        FROM_ALICE[version],
        FROM_BOB[version],
        random.Random(seed).randbytes(size),
        segment,
        protocol=draw(st.sampled_from([TCP, TCP, UDP])),
        flags=ACK | draw(st.sampled_from([0, PSH, FIN | PSH, CWR, CWR | ECE | FIN])),
        sequence=draw(st.sampled_from([0, 1000, 0xFFFF_FF00, 0xFFFF_FFFF])),
        tcp_options=draw(st.sampled_from([b"", b"\1\1\x08\x0a" + bytes(8), b"\1" * 40])),
        ip_options=draw(st.sampled_from([b"", b"", b"\1" * 4 if version == 4 else bytes([0, 0, 1, 4, 0, 0, 0, 0])])),
        identification=draw(st.sampled_from([0, 77, 0xFFFE, 0xFFFF])),
        traffic_class=draw(st.sampled_from([0, 0xB8, 0xB9, 3])),
    )


ONE_CHUNK = Big(FROM_ALICE[4], FROM_BOB[4], b"\xd8", 1, flags=ACK, sequence=0, identification=0)


def chunks(big: Big) -> list[bytes]:
    """Cut on paper: header and one slice each."""
    whole = big.virtio()
    head = len(whole) - len(big.payload)
    return [whole[:head] + big.payload[cut : cut + big.segment] for cut in range(0, len(big.payload), big.segment)]


@given(bigs())
def test_the_model_is_its_own_inverse(big: Big) -> None:
    """The kernel of the model, given the superpacket, sends what the model's segmentation gives."""
    assert finish(big.virtio()) == big.segments()


@settings(deadline=None)
@given(bigs(), st.data())
def test_each_chunk_alone_becomes_the_packet_that_segmentation_gives(big: Big, data: st.DataObject) -> None:
    expected = big.segments()
    places = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=4, unique=True))
    for place in places:
        chunk = memoryview(bytearray(chunks(big)[place]))
        packet = offload.parse_superpacket(chunk, 0, len(chunk))
        assert packet is not None
        assert (packet.segment, packet.payload, packet.chunks) == (big.segment, len(big.payload), len(expected))
        assert offload.chunk_fits(packet, place, len(chunk))
        assert not offload.chunk_fits(packet, place, len(chunk) - 1)
        offload.settle(chunk, 0, packet, place, len(chunk) - packet.header)
        assert finish(bytes(chunk)) == [expected[place]]


@settings(deadline=None)
@given(bigs(), st.data())
def test_any_run_of_chunks_becomes_what_segmentation_gives(big: Big, data: st.DataObject) -> None:
    expected = big.segments()
    first = data.draw(st.integers(0, len(expected) - 1))
    last = data.draw(st.integers(first, len(expected) - 1))
    whole = big.virtio()
    head = len(whole) - len(big.payload)
    payload = big.payload[first * big.segment : (last + 1) * big.segment]
    run = memoryview(bytearray(whole[:head] + payload))
    packet = offload.parse_superpacket(run, 0, len(run))
    assert packet is not None
    offload.settle(run, 0, packet, first, len(payload))
    assert finish(bytes(run)) == expected[first : last + 1]


def seal(plaintexts: list[bytes], sealer: Sealer) -> list[bytes]:
    out = memoryview(bytearray(sum(len(plaintext) + 32 for plaintext in plaintexts)))
    records, position = [], 0
    for length in sealer.seal_batch([memoryview(plaintext) for plaintext in plaintexts], out):
        records.append(bytes(out[position : position + length]))
        position += length
    return records


@settings(max_examples=400 if LONG else 80, deadline=None)
@given(st.lists(bigs(), min_size=1, max_size=3), st.data())
def test_received_chunks_in_any_state_give_the_right_packets(superpackets: list[Big], data: st.DataObject) -> None:
    """Lost, forged, repeated, shuffled and cut anywhere into receive batches; each packet once, none wrong."""
    pair = Pair()
    keys, _ = pair.install()
    sealer = Sealer(keys.cipher, keys.send_key(0), keys.send_index)
    generator = random.Random(data.draw(st.integers(0, 2**32)))
    records: list[bytes] = []
    expected: dict[bytes, bytes] = {}
    for big in superpackets:
        sealed = seal(chunks(big), sealer)
        records += sealed
        expected |= dict(zip(sealed, big.segments(), strict=True))
    trouble = data.draw(st.sampled_from(["none", "none", "lost", "forged", "repeated", "shuffled", "all"]))
    arriving, honest = disturb(records, trouble, generator)
    joined = [(b"".join(batch), len(batch[0])) for batch in gro(arriving, generator)]
    batches = [Received(memoryview(data), len(data), segment, ALICE) for data, segment in joined]
    for received in two_in_one(batches, generator):
        pair.bob.plane._inbound.process(received, 0.0)
        if generator.random() < 0.3:
            pair.bob.plane._inbound.flush()
    pair.bob.plane._inbound.flush()
    got = [packet for written in pair.bob.tun.taken for packet in finish(written)]
    assert sorted(got) == sorted(expected[record] for record in honest)
    if trouble == "none":
        assert got == [expected[record] for record in records]
    epoch = pair.bob.plane.stats("alice").epochs[0]
    assert epoch.marked == len(honest) == pair.bob.plane.stats("alice").received_records


def disturb(records: list[bytes], trouble: str, generator: random.Random) -> tuple[list[bytes], list[bytes]]:
    """What arrives, and which honest records are among it."""
    arriving = list(records)
    if trouble in ("lost", "all"):
        arriving = [record for record in arriving if generator.random() > 0.2]
    honest = list(arriving)
    if trouble in ("forged", "all"):
        for _ in range(1 + len(arriving) // 10):
            if not arriving:
                break
            at = generator.randrange(len(arriving))
            spoiled = bytearray(arriving[at])
            spoiled[generator.randrange(8, len(spoiled))] ^= 1 << generator.randrange(8)
            if arriving[at] in honest and generator.random() < 0.5:
                honest.remove(arriving[at])
                arriving[at] = bytes(spoiled)
            else:
                arriving.insert(at, bytes(spoiled))
    if trouble in ("repeated", "all"):
        for record in generator.sample(honest, len(honest) // 4):
            arriving.insert(generator.randrange(len(arriving) + 1), record)
    if trouble in ("shuffled", "all"):
        for _ in range(3):
            cut = generator.randrange(len(arriving) + 1)
            arriving[cut : cut + 9] = generator.sample(arriving[cut : cut + 9], len(arriving[cut : cut + 9]))
    return arriving, honest


def gro(records: list[bytes], generator: random.Random) -> list[list[bytes]]:
    """Join neighbours of equal size as a receiving kernel does, and break off anywhere."""
    batches: list[list[bytes]] = []
    for record in records:
        last = batches[-1] if batches else None
        fits = (
            last is not None
            and len(last[-1]) == len(last[0])
            and len(record) <= len(last[0])
            and sum(map(len, last)) + len(record) < 65_000
            and len(last) < 64
        )
        if last is not None and fits and generator.random() < 0.95:
            last.append(record)
        else:
            batches.append([record])
    return batches


def _may_be_cut(packet: bytes) -> bool:
    """IPv4 inside (none of them forbids it), IPv6 of up to 1280 bytes outside."""
    return packet[0] >> 4 == 4 or len(packet) <= 1280


@settings(max_examples=200 if LONG else 40, deadline=None)
@given(st.lists(bigs(max_chunks=200), min_size=1, max_size=3), st.sampled_from([576, 1472, 9000, 65_507]))
def test_sent_superpackets_arrive_as_segmentation_gives(superpackets: list[Big], path: int) -> None:
    """Through both planes.  TCP may be cut smaller where the path is narrow: then its bytes are compared."""
    pair = Pair(impairments=Impairments(max_payload=path))
    pair.established()
    for big in superpackets:
        pair.bob.tun.taken.clear()
        before = pair.alice.plane.stats("bob").drops.get("too_big", 0)
        pair.alice.tun.inject([big.virtio()])
        pair.run()
        got = [packet for written in pair.bob.tun.taken for packet in finish(written)]
        head = len(big.virtio()) - len(big.payload)
        fits = 32 + head + min(big.segment, len(big.payload)) <= path
        if fits:
            assert got == big.segments()
        elif big.protocol == UDP:
            passing = [packet for packet in big.segments() if len(packet) <= path - 42 or _may_be_cut(packet)]
            assert reassemble(got) == passing
            assert (pair.alice.plane.stats("bob").drops.get("too_big", 0) > before) == (passing != big.segments())
        else:
            smaller = Big(**{**big.__dict__, "segment": path - 32 - head})
            assert got == smaller.segments()


def by_flow(packets: list[bytes]) -> dict[tuple[int, int], list[bytes]]:
    """Version and protocol tell the flows of these tests apart: their addresses and ports are all the same."""
    flows: dict[tuple[int, int], list[bytes]] = {}
    for packet in packets:
        version = packet[0] >> 4
        flows.setdefault((version, packet[9 if version == 4 else 6]), []).append(packet)
    return flows


@settings(max_examples=200 if LONG else 40, deadline=None)
@given(st.lists(bigs(max_chunks=10) | st.integers(8, 1300), min_size=1, max_size=12))
@example([ONE_CHUNK] * 8 + [8, ONE_CHUNK, 8])
def test_packets_and_superpackets_of_one_batch_keep_their_order(items: list[Big | int]) -> None:
    """Within a flow, that is: where more comes than is sealed at once, flows take turns (RFC 8290)."""
    pair = Pair(impairments=Impairments(max_payload=1600))
    pair.established()
    injected, expected = [], []
    for number, item in enumerate(items):
        if isinstance(item, Big):
            injected.append(item.virtio())
            expected += item.segments()
        else:
            packet = numbered(number, FROM_ALICE[4], FROM_BOB[4], item)
            injected.append(packet)
            expected.append(packet[10:])
    pair.alice.tun.inject(injected)
    pair.run()
    assert by_flow([packet for written in pair.bob.tun.taken for packet in finish(written)]) == by_flow(expected)
    assert pair.drops() == {}
    traffic = pair.alice.plane.stats("bob"), pair.bob.plane.stats("alice")
    assert traffic[0].sent_packets == traffic[1].received_packets == len(expected)
    assert traffic[0].sent_bytes == traffic[1].received_bytes == sum(map(len, expected))
