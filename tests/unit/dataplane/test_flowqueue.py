"""FQ-CoDel: fair by bytes, the sparse first, order within a flow, bounded."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvpn.dataplane.codel import INTERVAL, TARGET
from qvpn.dataplane.flowqueue import MAX_BYTES, MAX_PACKETS, QUANTUM, FlowQueue

BIG = 64_000
Packet = tuple[bytes, int]


def queue(lost: list[tuple[Packet, bool]] | None = None, **bounds: int) -> FlowQueue[Packet]:
    gone = [] if lost is None else lost
    return FlowQueue(lambda packet, full: gone.append((packet, full)), **bounds)


def drain(found: FlowQueue[Packet], now: float = 0.0) -> list[Packet]:
    out = []
    while (waiting := found.take(now)) is not None:
        out.append(waiting.packet)
    return out


def test_one_small_packet_leaves_before_a_transfer_that_came_first() -> None:
    found = queue()
    for number in range(100):
        found.put(b"bulk", (b"bulk", number), BIG, 0.0)
    assert [found.take(0.0).packet for _ in range(3)] == [(b"bulk", n) for n in range(3)]  # type: ignore[union-attr]
    found.put(b"echo", (b"echo", 0), 98, 0.0)
    assert found.take(0.0).packet == (b"echo", 0)  # type: ignore[union-attr]


def test_flows_share_by_bytes_and_not_by_packets() -> None:
    found = queue()
    for number in range(60):
        found.put(b"big", (b"big", number), BIG, 0.0)
    for number in range(2400):
        found.put(b"small", (b"small", number), 1500, 0.0)
    sent: dict[bytes, int] = defaultdict(int)
    for _ in range(1000):
        waiting = found.take(0.0)
        assert waiting is not None
        sent[waiting.packet[0]] += waiting.size
    assert abs(sent[b"big"] - sent[b"small"]) <= BIG + 2 * QUANTUM


def test_a_trickle_of_new_flows_does_not_starve_the_old(  # RFC 8290, 4.2
) -> None:
    found = queue()
    for number in range(50):
        found.put(b"bulk", (b"bulk", number), BIG, 0.0)
    bulk = 0
    for number in range(400):
        found.put(b"new", (b"new", number), 200, 0.0)
        waiting = found.take(0.0)
        assert waiting is not None
        bulk += waiting.packet[0] == b"bulk"
    assert bulk >= 2


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 4), st.sampled_from((60, 1500, BIG)), st.booleans()),
            st.just(None),
        ),
        max_size=200,
    ),
    st.floats(0.0001, 0.05),
)
def test_nothing_is_lost_unseen_nor_reordered_in_its_flow(
    run: list[tuple[int, int, bool] | None], pause: float
) -> None:
    lost: list[tuple[Packet, bool]] = []
    found = queue(lost, max_bytes=20 * BIG, max_packets=40)
    out: list[Packet] = []
    waits: dict[Packet, int] = {}
    now = number = 0.0
    for step in run:
        now += pause
        if step is None:
            if (waiting := found.take(now)) is not None:
                out.append(waiting.packet)
                assert waiting.markable or not waiting.marked
        else:
            flow, size, markable = step
            packet = (bytes([flow]), int(number))
            waits[packet] = size
            found.put(packet[0], packet, size, now, markable=markable)
            number += 1
        assert found.size <= 20 * BIG
        assert len(found) <= 40
        gone = {packet for packet, _ in lost} | set(out)
        assert found.size == sum(size for packet, size in waits.items() if packet not in gone)
        assert len(found) == len(waits) - len(gone)
    out += drain(found, now)
    assert sorted([*out, *(packet for packet, _ in lost)]) == sorted(waits)
    for flow in range(5):
        mine = [packet for packet in out if packet[0] == bytes([flow])]
        assert mine == sorted(mine)
    assert (found.size, len(found), found.flows) == (0, 0, 0)


def test_a_full_queue_costs_the_longest_flow_its_oldest() -> None:
    lost: list[tuple[Packet, bool]] = []
    found = queue(lost)
    for number in range(MAX_BYTES // BIG):
        found.put(b"bulk", (b"bulk", number), BIG, 0.0)
    for number in range(10):
        found.put(b"other", (b"other", number), BIG, 0.0)
    assert [packet for packet, full in lost if full] == [(b"bulk", number) for number in range(len(lost))]
    assert 9 <= len(lost) <= 10
    assert found.size <= MAX_BYTES


def test_small_packets_are_bounded_by_number() -> None:
    lost: list[tuple[Packet, bool]] = []
    found = queue(lost)
    for number in range(MAX_PACKETS + 7):
        found.put(b"flood", (b"flood", number), 60, 0.0)
    assert (len(lost), len(found)) == (7, MAX_PACKETS)


@pytest.mark.parametrize("markable", [True, False])
def test_a_standing_queue_is_marked_or_dropped_and_a_sparse_flow_beside_it_never(markable: bool) -> None:
    """One flow comes as fast as it leaves, ten superpackets behind: 1 ms each, so it waits 10 ms."""
    lost: list[tuple[Packet, bool]] = []
    found, marks, echoes = queue(lost), 0, 0
    number = 0
    for step in range(3000):
        now = step * 0.001
        while found.size < 10 * BIG:
            found.put(b"bulk", (b"bulk", number), BIG, now, markable=markable)
            number += 1
        if step % 10 == 0:
            found.put(b"echo", (b"echo", step), 98, now)
            waiting = found.take(now)
            assert waiting is not None
            echoes += waiting.packet[0] == b"echo"
        waiting = found.take(now)
        assert waiting is not None
        marks += waiting.marked
    told = marks if markable else len(lost)
    assert (marks, found.marked) == ((told, told) if markable else (0, 0))
    assert echoes >= 299  # at first the transfer is as new as the echo
    assert not any(packet[0] == b"echo" for packet, _ in lost)
    # the control law's count after 3 s without an answer: the sum of INTERVAL / sqrt(n) reaches the time
    assert told > (3.0 / INTERVAL / 2) ** 2 * 0.7
    assert found.longest > TARGET
