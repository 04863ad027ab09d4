"""The books balance on every path: records opened = counters marked, sources accepted = written or refused."""

from __future__ import annotations

import random

import pytest

from qvpn.netio.base import Received
from qvpn.tunnel.drops import DropReason
from tests.unit.dataplane.segments import Big
from tests.unit.dataplane.support import ALICE, FROM_ALICE, FROM_BOB, Pair, numbered

BIG = Big(FROM_ALICE[4], FROM_BOB[4], random.Random(7).randbytes(23 * 1000 + 11), 1000)


def captured(pair: Pair) -> list[bytes]:
    """Alice's records of a superpacket, of small packets and of control, in order; none arrives."""
    records: list[bytes] = []
    pair.network.tap = lambda _source, _destination, datagram: records.append(datagram)
    pair.network.block(*(site.bind.local for site in (pair.alice, pair.bob)))
    pair.alice.tun.inject([BIG.virtio()])
    pair.alice_sends(range(40), size=200)
    pair.alice.plane.send_control("bob", b"\x04")
    pair.alice.tun.inject([BIG.virtio()])
    pair.network.tap = None
    return records


def receive(pair: Pair, records: list[bytes]) -> None:
    """As one GRO batch where all but the last have one length, else one by one."""
    plane = pair.bob.plane
    same = len({len(record) for record in records[:-1]}) < 2 and len(records[-1]) <= len(records[0])
    for batch in [records] if same else [[record] for record in records]:
        data = memoryview(b"".join(batch))
        plane._inbound.process(Received(data, len(data), len(batch[0]), ALICE), pair.network.now)


def check(pair: Pair) -> None:
    traffic = pair.bob.plane.stats("alice")
    assert traffic.opened == traffic.marked
    assert traffic.source_checks == traffic.tun_writes + traffic.tun_refused
    for epoch in traffic.epochs:
        assert epoch.opened == epoch.marked


@pytest.mark.parametrize("seed", range(30))
def test_books_balance_whatever_arrives(seed: int) -> None:
    """Forged, repeated, shuffled and cut batches, a TUN that refuses now and then, epochs that end."""
    dice = random.Random(seed)
    pair = Pair()
    opened = 0
    for number in (1, 2, 3):
        pair.install(number)
        records = captured(pair)
        while records:
            size = dice.choice((1, 2, 7, 24))
            batch, records = records[:size], records[size:]
            if dice.random() < 0.3:
                dice.shuffle(batch)
            if dice.random() < 0.3:
                at = dice.randrange(len(batch))
                place = dice.randrange(16, len(batch[at]))
                batch[at] = batch[at][:place] + bytes([batch[at][place] ^ 64]) + batch[at][place + 1 :]
            if dice.random() < 0.2:
                records = batch[::2] + records[:]
            pair.bob.tun.room = dice.choice((0, 3, 1 << 62))
            receive(pair, batch)
            if dice.random() < 0.5:
                pair.bob.plane._inbound.flush()
                check(pair)
        pair.bob.plane._inbound.flush()
        check(pair)
        before, opened = opened, pair.bob.plane.stats("alice").opened
        assert opened > before + 10
    traffic = pair.bob.plane.stats("alice")
    assert traffic.tun_writes == len(pair.bob.tun.taken) >= 5
    assert traffic.drops.get(DropReason.TUN_FULL, 0) >= traffic.tun_refused
    pair.bob.plane.erase_all("alice")
    gone = pair.bob.plane.stats("alice")
    assert not gone.epochs
    assert (gone.opened, gone.marked) == (traffic.opened, traffic.marked)


def test_a_foreign_source_is_no_accepted_check() -> None:
    pair = Pair()
    pair.established()
    pair.alice.tun.inject([numbered(1, "10.99.0.1", FROM_BOB[4]), numbered(2, FROM_ALICE[4], FROM_BOB[4])])
    pair.run()
    traffic = pair.bob.plane.stats("alice")
    assert (traffic.source_checks, traffic.tun_writes) == (1, 1)
    assert traffic.drops == {DropReason.WRONG_SOURCE: 1}
