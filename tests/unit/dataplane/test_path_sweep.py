"""Every inner packet size from 20 to 9000 bytes, over paths of several sizes: it passes, or its sender is told.

The sender is told a size that passes: no packet vanishes without a word.
"""

from __future__ import annotations

import ipaddress
import os

import pytest

from qvpn.dataplane.plane import payload_for
from qvpn.netio.memory import Impairments
from tests.unit.dataplane.segments import UDP, Big, checksum, finish, reassemble
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, PLAIN, Pair, dont_fragment, ip_packet

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
LINK = 9100


def path_pair(payload: int, *, provisional: bool = False) -> Pair:
    """A link that carries all sizes, and a path behind it whose size has been found."""
    pair = Pair(impairments=Impairments(max_payload=payload_for(LINK), path_payload=payload))
    pair.established()
    for site, peer in ((pair.alice, "bob"), (pair.bob, "alice")):
        site.plane.set_path(peer, payload, provisional=provisional)
    return pair


def icmp_mtu(packet: bytes, about: bytes) -> int:
    """What an answer says, after everything else in it has been checked; ``about`` without its virtio header."""
    assert packet[:10] == PLAIN
    inner = packet[10:]
    if inner[0] >> 4 == 4:
        assert (inner[9], inner[20:22], len(inner) <= 576) == (1, b"\x03\x04", True)
        assert checksum(inner[:20]) == checksum(inner[20:]) == 0
        assert (inner[12:16], inner[16:20]) == (about[16:20], about[12:16])
        assert about.startswith(inner[28:]) and len(inner) >= min(28 + len(about), 576)
        return int.from_bytes(inner[26:28], "big")
    assert (inner[6], inner[40:42], len(inner) <= 1280) == (58, b"\x02\x00", True)
    pseudo = inner[8:40] + (len(inner) - 40).to_bytes(4, "big") + (58).to_bytes(4, "big")
    assert checksum(pseudo + inner[40:]) == 0
    assert (inner[8:24], inner[24:40]) == (about[24:40], about[8:24])
    assert about.startswith(inner[48:])
    return int.from_bytes(inner[44:48], "big")


@pytest.mark.parametrize("payload", [618, 700, 1232, 1300, 1472, 4442, 8972])
@pytest.mark.parametrize("kind", ["v4", "v4-df", "v6"])
def test_every_size_passes_or_is_answered(payload: int, kind: str) -> None:
    pair = path_pair(payload)
    version, limit = (6 if kind == "v6" else 4), payload - 42
    answered = 0
    for size in range(20 if version == 4 else 40, 9001, 1 if LONG else 19):
        body = (size.to_bytes(2, "big") * 4500)[: size - (20 if version == 4 else 40)]
        packet = PLAIN + ip_packet(FROM_ALICE[version], FROM_BOB[version], body)
        if kind == "v4-df":
            packet = dont_fragment(packet)
        pair.alice.tun.inject([packet])
        pair.run(0.2)
        arrived, told = [each[10:] for each in pair.bob.tun.taken], pair.alice.tun.taken
        if told:
            mtu = icmp_mtu(*told, about=packet[10:])
            assert not arrived and mtu == (max(limit, 1280) if version == 6 else limit) < size
            answered += 1
        elif size <= limit or kind == "v6":
            assert arrived == [packet[10:]]
        else:
            assert all(len(each) <= limit for each in arrived)
            (whole,) = reassemble(arrived)
            assert whole[20:] == packet[30:]
        pair.bob.tun.taken.clear()
        pair.alice.tun.taken.clear()
    assert pair.network.counts["too_long"] == 0
    assert pair.drops() == ({"too_big": answered} if answered else {})
    assert bool(answered) == (kind != "v4")


def test_while_the_path_is_searched_nobody_is_told_and_all_passes() -> None:
    pair = path_pair(1200, provisional=True)
    for version in (4, 6):
        body = bytes(1400)
        packet = PLAIN + ip_packet(FROM_ALICE[version], FROM_BOB[version], body)
        pair.alice.tun.inject([dont_fragment(packet) if version == 4 else packet])
    pair.run()
    assert [len(packet) for packet in pair.bob.tun.taken] == [10 + 20 + 1400, 10 + 40 + 1400]
    assert (pair.alice.tun.taken, pair.drops(), pair.network.counts["fragmented"]) == ([], {}, 2)


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_superpackets_are_cut_to_the_path(version: int) -> None:
    pair = path_pair(1000)
    big = Big(FROM_ALICE[version], FROM_BOB[version], bytes(range(256)) * 60, 1400)
    pair.alice.tun.inject([big.virtio()])
    pair.run()
    packets = [packet for written in pair.bob.tun.taken for packet in finish(written)]
    head = 40 if version == 4 else 60
    assert b"".join(packet[head:] for packet in packets) == big.payload
    assert max(map(len, packets)) == 1000 - 42
    assert (pair.alice.tun.taken, pair.drops()) == ([], {})


def test_datagrams_of_a_udp_superpacket_pass_or_are_answered() -> None:
    pair = path_pair(1000)
    for version in (4, 6):
        big = Big(FROM_ALICE[version], FROM_BOB[version], bytes(1300 * 4 + 100), 1300, protocol=UDP)
        pair.alice.tun.inject([big.virtio()])
        pair.run()
        arrived = reassemble([packet for written in pair.bob.tun.taken for packet in finish(written)])
        assert arrived == (big.segments() if version == 4 else big.segments()[-1:])
        pair.bob.tun.taken.clear()
    assert [int.from_bytes(answer[54:58], "big") for answer in pair.alice.tun.taken] == [1280] * 4
    assert pair.drops() == {"too_big": 4}


def test_answers_do_not_come_faster_than_the_limit_and_strangers_do_not_use_it_up() -> None:
    pair = path_pair(1000)
    loud, quiet = "10.90.0.1", "10.90.7.7"

    def long(source: str) -> bytes:
        return dont_fragment(PLAIN + ip_packet(source, FROM_BOB[4], bytes(1400)))

    for _ in range(1000):
        pair.alice.tun.inject([long(loud)])
    assert len(pair.alice.tun.taken) <= 11
    pair.alice.tun.taken.clear()
    pair.alice.tun.inject([long(str(ipaddress.ip_address(quiet) + n)) for n in range(8)])
    # Senders share 256 buckets by a hash of their address: most of eight are not in the loud one's.
    assert len(pair.alice.tun.taken) >= 4
    pair.run(10.0)
    pair.alice.tun.taken.clear()
    pair.alice.tun.inject([long(loud)])
    assert len(pair.alice.tun.taken) == 1
    assert pair.drops() == {"too_big": 1009}


ERROR4 = bytes([3, 4]) + bytes(1400)
ERROR6 = bytes([2, 0]) + bytes(1400)


@pytest.mark.parametrize(
    "packet",
    [
        ip_packet("224.0.0.1", FROM_BOB[4], bytes(1400)),
        ip_packet("0.0.0.0", FROM_BOB[4], bytes(1400)),
        ip_packet("127.0.0.1", FROM_BOB[4], bytes(1400)),
        ip_packet(FROM_ALICE[4], FROM_BOB[4], ERROR4, protocol=1),
        ip_packet("::", FROM_BOB[6], bytes(1400)),
        ip_packet("ff02::1", FROM_BOB[6], bytes(1400)),
        ip_packet(FROM_ALICE[6], FROM_BOB[6], ERROR6, protocol=58),
        ip_packet(FROM_ALICE[6], FROM_BOB[6], b"\x3a\0\0\1" + bytes(4) + ERROR6, protocol=44),
        ip_packet(FROM_ALICE[6], FROM_BOB[6], b"\x3c\0\0\0" + bytes(4) + b"\x3a\xff" + bytes(1400), protocol=60),
    ],
)
def test_no_answer_about_errors_and_what_is_no_hosts(packet: bytes) -> None:
    pair = path_pair(1000)
    packet = PLAIN + packet
    pair.alice.tun.inject([dont_fragment(packet) if packet[10] >> 4 == 4 else packet])
    assert pair.alice.tun.taken == []
    assert pair.drops() == {"too_big": 1}


def test_later_fragments_are_not_answered_and_fragments_are_fragmented_further() -> None:
    pair = path_pair(1000)
    later = bytearray(ip_packet(FROM_ALICE[4], FROM_BOB[4], bytes(range(250)) * 5))
    later[6:8] = (0x4000 | 0x2000 | 100).to_bytes(2, "big")
    pair.alice.tun.inject([PLAIN + bytes(later)])
    assert pair.alice.tun.taken == [] and pair.drops() == {"too_big": 1}
    later[6:8] = (0x2000 | 100).to_bytes(2, "big")
    pair.alice.tun.inject([PLAIN + bytes(later)])
    pair.run()
    fields = [int.from_bytes(packet[16:18], "big") for packet in pair.bob.tun.taken]
    first = (1000 - 42 - 20) // 8
    assert fields == [0x2000 | 100, 0x2000 | 100 + first]
    assert b"".join(packet[30:] for packet in pair.bob.tun.taken) == bytes(later[20:])


def test_options_without_the_copied_flag_stand_in_the_first_fragment_only() -> None:
    options = b"\x07\x04\x04\0" + b"\x94\x04\0\0"  # record route: not copied; router alert: copied
    payload = bytes(1300)
    head = bytearray(ip_packet(FROM_ALICE[4], FROM_BOB[4], payload)[:20])
    head[0], head[2:4] = 0x47, (28 + len(payload)).to_bytes(2, "big")
    pair = path_pair(1000)
    pair.alice.tun.inject([PLAIN + bytes(head) + options + payload])
    pair.run()
    first, second = (packet[10:] for packet in pair.bob.tun.taken)
    assert (first[0], first[20:28]) == (0x47, options)
    assert (second[0], second[20:24]) == (0x46, options[4:])
    assert checksum(first[:28]) == checksum(second[:24]) == 0
    assert len(first) - 28 + len(second) - 24 == len(payload)


def test_a_checksum_left_to_the_card_is_finished_before_fragmenting() -> None:
    pair = path_pair(1000)
    whole = Big(FROM_ALICE[4], FROM_BOB[4], bytes(range(256)) * 5, 1280, protocol=UDP)
    partial = bytearray(whole.virtio())
    partial[1], partial[4:6] = 0, b"\0\0"  # one packet, its checksum not finished
    pair.alice.tun.inject([bytes(partial)])
    pair.run()
    assert reassemble([packet[10:] for packet in pair.bob.tun.taken]) == whole.segments()
