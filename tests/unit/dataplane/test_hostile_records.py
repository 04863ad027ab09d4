"""What a forger on the path can try: nothing of it is delivered, and each drop has its name."""

from __future__ import annotations

import random

import pytest

from qvpn.netio.base import Address, Received
from qvpn.netio.memory import Impairments
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import EpochKeys
from qvpn.tunnel.records import Sealer
from tests.unit.dataplane.support import (
    ALICE,
    BOB,
    EVE,
    FROM_ALICE,
    FROM_BOB,
    PLAIN,
    Pair,
    epoch_pair,
    ip_packet,
    numbered,
)

HEADER_DROPS = (
    {
        0: DropReason.BAD_HEADER,
        1: DropReason.BAD_VERSION,
        2: DropReason.BAD_HEADER,
        3: DropReason.BAD_HEADER,
    }
    | dict.fromkeys(range(4, 8), DropReason.UNKNOWN_INDEX)
    | dict.fromkeys(range(8, 16), DropReason.AUTHENTICATION)
)


def capture(pair: Pair) -> list[bytes]:
    """Records of Alice that never arrive: one with data, one with control."""
    records: list[bytes] = []
    pair.network.tap = lambda _source, _destination, datagram: records.append(datagram)
    pair.network.block(ALICE, BOB)
    pair.alice_sends([1])
    pair.alice.plane.send_control("bob", b"\x04")
    pair.network.block(ALICE, BOB, False)
    pair.network.tap = None
    assert len(records) == 2
    return records


def delivered(pair: Pair) -> int:
    return len(pair.bob.tun.taken) + len(pair.bob.hooks.controls)


def sealed(keys: EpochKeys, *plaintexts: bytes) -> list[bytes]:
    """Records with any plaintext, as a peer that lies inside would send them."""
    sealer = Sealer(keys.cipher, keys.send_key(0), keys.send_index)
    out = memoryview(bytearray(sum(len(plaintext) + 32 for plaintext in plaintexts)))
    records, position = [], 0
    for length in sealer.seal_batch([memoryview(plaintext) for plaintext in plaintexts], out):
        records.append(bytes(out[position : position + length]))
        position += length
    return records


@pytest.mark.parametrize("control", [False, True], ids=["data", "control"])
@pytest.mark.parametrize("position", range(16))
def test_no_header_byte_can_be_changed(position: int, control: bool) -> None:
    pair = Pair()
    pair.install()
    record = capture(pair)[control]
    for bit in range(8):
        changed = bytearray(record)
        changed[position] ^= 1 << bit
        pair.network.inject(ALICE, BOB, bytes(changed))
    pair.run()
    assert delivered(pair) == 0
    assert pair.drops() == {HEADER_DROPS[position]: 8}
    pair.network.inject(ALICE, BOB, record)
    pair.run()
    assert delivered(pair) == 1


@pytest.mark.parametrize("control", [False, True], ids=["data", "control"])
def test_no_byte_of_ciphertext_or_tag_can_be_changed(control: bool) -> None:
    pair = Pair()
    pair.install()
    record = capture(pair)[control]
    for position in range(16, len(record)):
        changed = bytearray(record)
        changed[position] ^= 1
        pair.network.inject(ALICE, BOB, bytes(changed))
    pair.run()
    assert delivered(pair) == 0
    assert pair.drops() == {DropReason.AUTHENTICATION: len(record) - 16}


@pytest.mark.parametrize("control", [False, True], ids=["data", "control"])
def test_truncated_or_longer(control: bool) -> None:
    pair = Pair()
    pair.install()
    record = capture(pair)[control]
    for length in range(len(record)):
        pair.network.inject(ALICE, BOB, record[:length])
    pair.network.inject(ALICE, BOB, record + b"\0")
    pair.run()
    assert delivered(pair) == 0
    assert pair.drops() == {DropReason.TRUNCATED: 32, DropReason.AUTHENTICATION: len(record) - 32 + 1}


def test_replayed() -> None:
    pair = Pair()
    pair.install()
    records = capture(pair)
    for _ in range(5):
        for record in records:
            pair.network.inject(ALICE, BOB, record)
    pair.run()
    assert (len(pair.bob.tun.taken), len(pair.bob.hooks.controls)) == (1, 1)
    assert pair.drops() == {DropReason.REPLAY: 8}


def test_reflected() -> None:
    """A site's own records come back to it: their index is the peer's, and even with ours the key is another."""
    pair = Pair()
    initiator, _ = pair.install()
    records = capture(pair)
    for record in records:
        pair.network.inject(BOB, ALICE, record)
        pair.network.inject(BOB, ALICE, record[:4] + initiator.receive_index.to_bytes(4, "big") + record[8:])
    pair.run()
    assert pair.alice.tun.taken == []
    assert pair.alice.hooks.controls == []
    assert pair.drops() == {DropReason.UNKNOWN_INDEX: 2, DropReason.AUTHENTICATION: 2}


def test_from_another_peer() -> None:
    """Carol has an epoch with Bob too; her records do not pass as Alice's, nor with Alice's addresses inside."""
    pair = Pair()
    _, with_alice = pair.install()
    carol_keys, bobs = epoch_pair(7, seed=b"carol")
    pair.bob.plane.add_peer("carol", [], overlap=1.0)
    pair.bob.plane.install("carol", bobs)
    as_alice = sealed(carol_keys, numbered(1, FROM_ALICE[4], FROM_BOB[4]))[0]
    pair.network.inject(EVE, BOB, as_alice)
    pair.network.inject(EVE, BOB, as_alice[:4] + with_alice.receive_index.to_bytes(4, "big") + as_alice[8:])
    pair.run()
    assert pair.bob.tun.taken == []
    assert pair.bob.plane.stats("carol").drops == {DropReason.WRONG_SOURCE: 1}
    assert pair.bob.plane.stats("alice").drops == {DropReason.AUTHENTICATION: 1}


@pytest.mark.parametrize("size", [16, 1400])
@pytest.mark.parametrize("forged", [0, 5, 9], ids=["first", "middle", "last"])
def test_a_forged_datagram_in_a_batch_costs_only_itself(forged: int, size: int) -> None:
    """Ten datagrams in one receive, as UDP GRO hands them over."""
    pair = Pair()
    initiator, _ = pair.install()
    packets = [numbered(n, FROM_ALICE[4], FROM_BOB[4], size) for n in range(10)]
    records = sealed(initiator, *packets)
    records[forged] = records[forged][:-1] + bytes([records[forged][-1] ^ 1])
    batch = b"".join(records)
    pair.bob.plane._inbound.process(Received(memoryview(batch), len(batch), len(records[0]), ALICE), 0.0)
    assert pair.bob.tun.taken == [packet for n, packet in enumerate(packets) if n != forged]
    assert pair.bob.plane.stats("alice").drops == {DropReason.AUTHENTICATION: 1}


def test_handshake_and_records_in_one_batch_are_told_apart() -> None:
    pair = Pair()
    initiator, _ = pair.install()
    records = sealed(initiator, *[numbered(n, FROM_ALICE[4], FROM_BOB[4]) for n in range(2)])
    handshake = b"\x02" + bytes(len(records[0]) - 1)
    batch = records[0] + handshake + records[1] + b"\x05short"
    pair.bob.plane._inbound.process(Received(memoryview(batch), len(batch), len(records[0]), ALICE), 0.0)
    assert pair.bob.taken_numbers() == [0, 1]
    assert [datagram for datagram, _ in pair.bob.hooks.handshakes] == [handshake, b"\x05short"]


def test_what_a_failed_open_left_in_the_buffer_never_reaches_the_tun() -> None:
    """The failed open's region is the only one holding this pattern; no packet that is written has a byte of it."""
    pair = Pair()
    initiator, _ = pair.install()
    secret = PLAIN + ip_packet(FROM_ALICE[4], FROM_BOB[4], b"\xee" * 1000)
    good = PLAIN + ip_packet(FROM_ALICE[4], FROM_BOB[4], b"\x11" * 1000)
    records = sealed(initiator, good, secret, good, secret)
    for number in (1, 3):
        records[number] = records[number][:-1] + bytes([records[number][-1] ^ 0xFF])
    batch = b"".join(records)
    pair.bob.plane._inbound.process(Received(memoryview(batch), len(batch), len(records[0]), ALICE), 0.0)
    assert pair.bob.tun.taken == [good, good]


IPV4 = ip_packet(FROM_ALICE[4], FROM_BOB[4], b"payload!")
IPV6 = ip_packet(FROM_ALICE[6], FROM_BOB[6], b"payload!")


def with_header(flags: int, gso: int, hdr_len: int, gso_size: int, start: int, offset: int, packet: bytes) -> bytes:
    fields = (hdr_len, gso_size, start, offset)
    return bytes([flags, gso]) + b"".join(field.to_bytes(2, "little") for field in fields) + packet


@pytest.mark.parametrize(
    "plaintext",
    [
        b"",
        bytes(9),
        bytes(10),
        PLAIN + b"\x45",
        PLAIN + IPV4[:19],
        PLAIN + IPV4[:-1],
        PLAIN + IPV6[:-1],
        PLAIN + IPV6[:39],
        PLAIN + b"\x44" + IPV4[1:],  # header of 16 bytes
        PLAIN + b"\x4f" + IPV4[1:],  # header longer than the packet
        PLAIN + IPV4[:2] + b"\x00\x13" + IPV4[4:],  # total length below the header
        PLAIN + b"\x55" + IPV4[1:],  # version 5
        PLAIN + b"\x00" + IPV4[1:],
        with_header(4, 0, 0, 0, 0, 0, IPV4),  # unknown flag
        with_header(3, 0, 0, 0, 20, 0, IPV4),
        with_header(0, 0, 29, 0, 0, 0, IPV4),  # hdr_len beyond the packet
        with_header(1, 0, 0, 0, 20, 7, IPV4),  # checksum ends beyond the packet
        with_header(1, 0, 0, 0, 27, 0, IPV4),
        with_header(1, 0, 0, 0, 19, 0, IPV4),  # checksum inside the IP header
        with_header(1, 0, 0, 0, 39, 0, IPV6),
        with_header(1, 0, 0, 0, 0xFFFF, 0xFFFF, IPV4),
        with_header(0, 0x80, 0, 0, 0, 0, IPV4),  # ECN without segmentation
        with_header(0, 3, 0, 8, 20, 6, IPV4),  # UDP fragmentation offload
        with_header(1, 2, 0, 8, 20, 6, IPV4),
    ],
)
def test_a_peer_that_lies_inside_reaches_nothing(plaintext: bytes) -> None:
    pair = Pair()
    initiator, _ = pair.install()
    pair.network.inject(ALICE, BOB, sealed(initiator, plaintext)[0])
    pair.run()
    assert pair.bob.tun.taken == []
    assert pair.bob.plane.stats("alice").drops == {DropReason.MALFORMED: 1}


def test_rubbish_behind_a_good_packet_costs_only_itself() -> None:
    pair = Pair()
    initiator, _ = pair.install()
    good = numbered(5, FROM_ALICE[6], FROM_BOB[6])
    pair.network.inject(ALICE, BOB, sealed(initiator, good + bytes(17))[0])
    pair.run()
    assert pair.bob.tun.taken == [good]
    assert pair.bob.plane.stats("alice").drops == {DropReason.MALFORMED: 1}


def test_each_packet_of_a_record_has_its_source_checked() -> None:
    pair = Pair()
    initiator, _ = pair.install()
    good = [numbered(n, FROM_ALICE[4], FROM_BOB[4]) for n in range(2)]
    foreign = numbered(9, "10.90.0.200", FROM_BOB[4])
    pair.network.inject(ALICE, BOB, sealed(initiator, good[0] + foreign + good[1])[0])
    pair.run()
    assert pair.bob.tun.taken == good
    assert pair.bob.plane.stats("alice").drops == {DropReason.WRONG_SOURCE: 1}


def test_a_hostile_network_delivers_each_packet_at_most_once_and_none_altered() -> None:
    """Duplicates, reordering, forged copies: what arrives is what was sent, once."""
    pair = Pair(seed=3, impairments=Impairments(loss=0.05, duplicate=0.3, jitter=0.05, reorder=0.1))
    pair.established()
    generator = random.Random(3)
    addresses: list[tuple[Address, Address]] = [(ALICE, BOB), (EVE, BOB)]

    def forge(source: Address, destination: Address, datagram: bytes) -> None:
        changed = bytearray(datagram)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        pair.network.inject(*generator.choice(addresses), bytes(changed))

    pair.network.tap = forge
    for number in range(0, 2000, 10):
        pair.alice_sends(range(number, number + 10), size=1200)
        pair.run(0.002)
    pair.run(5.0)
    taken = pair.bob.taken_numbers()
    assert len(taken) == len(set(taken))
    assert len(taken) == 2000 - pair.network.counts["lost"]
    assert set(pair.bob.tun.taken) <= {numbered(n, FROM_ALICE[4], FROM_BOB[4], 1200) for n in range(2000)}
