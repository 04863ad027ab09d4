"""A superpacket is pending, and in the receive that goes on with it a chunk is forged: only that chunk is lost."""

from __future__ import annotations

import pytest

from qvpn.tunnel.drops import DropReason
from tests.unit.dataplane.segments import UDP, Big, finish
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, Pair
from tests.unit.dataplane.test_chunks import CHUNKS, PATTERN, receive, records

FIRST = 17
"""Chunks in the receive that is joined and waits."""


@pytest.mark.parametrize("segment", [1000, 60, 7], ids=lambda segment: f"segments of {segment}")
@pytest.mark.parametrize("forged", [FIRST, FIRST + 1, 30, CHUNKS - 2, CHUNKS - 1])
@pytest.mark.parametrize("protocol", [6, UDP])
def test_what_was_pending_and_the_rest_arrive_whole(protocol: int, forged: int, segment: int) -> None:
    big = Big(FROM_ALICE[4], FROM_BOB[4], bytes(range(200)) * segment, segment, protocol=protocol)
    big = Big(**{**big.__dict__, "payload": big.payload[: CHUNKS * segment - 1]})
    pair = Pair()
    pair.bob.tun.merges_udp = True
    keys, _ = pair.install()
    made = records(keys, big)
    assert len(made) == CHUNKS
    made[forged] = made[forged][:16] + PATTERN * (len(made[forged]) - 16)
    receive(pair, made[:FIRST])
    assert pair.bob.tun.taken == []
    receive(pair, made[FIRST:])
    pair.bob.plane._inbound.flush()
    expected = big.segments()
    del expected[forged]
    assert [packet for written in pair.bob.tun.taken for packet in finish(written)] == expected
    assert not any(PATTERN * 2 in written for written in pair.bob.tun.taken)
    assert pair.bob.plane.stats("alice").drops == {DropReason.AUTHENTICATION: 1}


def test_a_continuation_that_is_all_forged_leaves_what_was_pending() -> None:
    pair = Pair()
    keys, _ = pair.install()
    big = Big(FROM_ALICE[6], FROM_BOB[6], bytes(range(250)) * 160, 1000)
    made = records(keys, big)
    receive(pair, made[:FIRST])
    receive(pair, [each[:16] + PATTERN * (len(each) - 16) for each in made[FIRST:]])
    receive(pair, made[FIRST:])  # the true ones come after all
    pair.bob.plane._inbound.flush()
    assert [packet for written in pair.bob.tun.taken for packet in finish(written)] == big.segments()
    assert pair.bob.plane.stats("alice").drops == {DropReason.AUTHENTICATION: CHUNKS - FIRST}
