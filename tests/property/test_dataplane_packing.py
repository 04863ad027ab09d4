"""Packing and change-over, end to end in memory: what arrives is what was sent, less what the network itself lost."""

from __future__ import annotations

import ipaddress
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from qvpn.netio.memory import Impairments
from tests.unit.dataplane.support import BOB, FROM_ALICE, FROM_BOB, Pair, numbered

LONG = os.environ.get("QVPN_TEST_LONG") == "1"

SIZES = st.lists(st.integers(8, 1390), min_size=1, max_size=80)


def greedy(sizes: list[int], room: int) -> int:
    """Records that first-fit packing in order needs: the model of ``Outbound``."""
    records, used = 0, room + 1
    for size in sizes:
        if used + size > room:
            records, used = records + 1, 0
        used += size
    return records


@given(SIZES, st.sampled_from([4, 6]))
def test_packed_records_unpack_to_the_same_packets(sizes: list[int], version: int) -> None:
    pair = Pair()
    pair.established()
    packets = [numbered(n, FROM_ALICE[version], FROM_BOB[version], size) for n, size in enumerate(sizes)]
    before = pair.network.counts["sent"]
    pair.alice.tun.inject(packets)
    pair.run()
    assert pair.bob.tun.taken == packets
    assert pair.network.counts["sent"] - before == greedy([len(packet) for packet in packets], 1472 - 32)
    assert pair.drops() == {}


@given(st.lists(st.tuples(st.sampled_from(["bob", "carol", "nobody"]), st.integers(8, 600)), max_size=60))
def test_interleaved_destinations_each_get_their_own_in_order(packets: list[tuple[str, int]]) -> None:
    """Carol has no epoch: what is for her stays, and nobody gets it."""
    pair = Pair()
    pair.alice.plane.add_peer("carol", [ipaddress.ip_network("10.99.0.0/16")], overlap=1.0)
    pair.alice.plane.set_endpoint("carol", BOB)
    pair.established()
    target = {"bob": FROM_BOB[4], "carol": "10.99.1.1", "nobody": "192.0.2.200"}
    pair.alice.tun.inject([numbered(n, FROM_ALICE[4], target[to], size) for n, (to, size) in enumerate(packets)])
    pair.run()
    assert pair.bob.taken_numbers() == [n for n, (to, _) in enumerate(packets) if to == "bob"]
    assert pair.alice.plane.stats("carol").drops.get("no_key", 0) == sum(to == "carol" for to, _ in packets)
    assert pair.drops().get("no_route", 0) == sum(to == "nobody" for to, _ in packets)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["bob", "bob", "bob", "carol", "nobody"]), st.sampled_from([40, 600]), st.integers(1, 9)
        ),
        max_size=20,
    ),
    st.sampled_from([4, 6]),
)
def test_runs_of_one_length_go_where_each_of_them_must(runs: list[tuple[str, int, int]], version: int) -> None:
    """Neighbours of one length are routed together only where one look-up does for all."""
    pair = Pair()
    pair.alice.plane.add_peer(
        "carol", [ipaddress.ip_network(net) for net in ("10.99.0.0/16", "fd99::/16")], overlap=1.0
    )
    pair.alice.plane.set_endpoint("carol", BOB)
    pair.established()
    target = {
        "bob": FROM_BOB[version],
        "carol": {4: "10.99.1.1", 6: "fd99::1"}[version],
        "nobody": {4: "192.0.2.200", 6: "2001:db8::1"}[version],
    }
    packets = [(to, size) for to, size, count in runs for _ in range(count)]
    sent = [numbered(n, FROM_ALICE[version], target[to], size) for n, (to, size) in enumerate(packets)]
    before = pair.network.counts["sent"]
    pair.alice.tun.inject(sent)
    pair.run()
    assert pair.bob.tun.taken == [sent[n] for n, (to, _) in enumerate(packets) if to == "bob"]
    assert pair.alice.plane.stats("carol").drops.get("no_key", 0) == sum(to == "carol" for to, _ in packets)
    assert pair.drops().get("no_route", 0) == sum(to == "nobody" for to, _ in packets)
    if all(to == "bob" for to, _ in packets):
        assert pair.network.counts["sent"] - before == greedy([len(packet) for packet in sent], 1472 - 32)


@settings(max_examples=100 if LONG else 15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.02, 0.2]),
    duplicate=st.sampled_from([0.0, 0.2]),
    jitter=st.sampled_from([0.0, 0.05]),
    reorder=st.sampled_from([0.0, 0.1]),
)
def test_changing_epochs_loses_nothing_of_its_own(
    seed: int, loss: float, duplicate: float, jitter: float, reorder: float
) -> None:
    """Twenty change-overs in both roles under load; one packet a datagram, so losses can be compared exactly."""
    network = Impairments(delay=0.01, loss=loss, duplicate=duplicate, jitter=jitter, reorder=reorder)
    pair = Pair(seed=seed, impairments=network, overlap=2.0)
    pair.install(1)
    while not pair.bob.hooks.firsts:  # until one gets through the responder may not send
        pair.alice.plane.send_control("bob", b"\x02")
        pair.run(0.1)
    pair.run(2.0)
    lost_before = pair.network.counts["lost"]
    total = 0
    for number in range(2, 22):
        pair.install(number)
        for _ in range(20):
            pair.alice_sends([total], size=1200)
            pair.bob_sends([total], size=1200)
            total += 1
            pair.run(0.02)
    pair.run(5.0)
    missing = 2 * total - len(pair.bob.tun.taken) - len(pair.alice.tun.taken)
    assert missing == pair.network.counts["lost"] - lost_before
    assert len(set(pair.bob.tun.taken)) == len(pair.bob.tun.taken)
    assert len(set(pair.alice.tun.taken)) == len(pair.alice.tun.taken)
    assert set(pair.drops()) <= {"replay"}  # the network's duplicates
    assert pair.alice.plane.stats("bob").epochs[-1].number == 21
