"""How many lanes an epoch has: the smaller of what both sides say, which both signatures cover."""

from __future__ import annotations

import pytest

from qvpn.handshake.core import lanes_said
from qvpn.wire.messages import TLV_LANES
from tests.simnet.world import World


@pytest.mark.parametrize(
    ("value", "lanes"), [(b"", 1), (b"\0", 1), (b"\1", 1), (b"\2", 2), (b"\x10", 16), (b"\xff", 16), (b"\4more", 4)]
)
def test_any_value_of_the_entry_is_a_count(value: bytes, lanes: int) -> None:
    assert lanes_said({TLV_LANES: value}) == lanes


def test_a_peer_that_says_nothing_has_one_lane() -> None:
    assert lanes_said({}) == 1


@pytest.mark.parametrize(("one", "other", "both"), [(4, 2, 2), (1, 4, 1), (4, 1, 1), (3, 3, 3)])
def test_both_sides_take_the_smaller_count_and_have_equal_keys_for_each_lane(one: int, other: int, both: int) -> None:
    world = World(1, rekey=5.0, a={"lanes": one}, b={"lanes": other}).begin()
    assert world.run(20, world.up)
    world.run(12)
    installed = [(world.a.installed, world.b.installed), (world.b.installed, world.a.installed)]
    for mine, theirs in installed:
        assert len(mine) > 1
        for epoch in mine.values():
            assert epoch.keys.lanes == both
            peer = theirs[epoch.keys.send_index].keys
            for lane in range(both):
                assert epoch.keys.send_key(lane) == peer.receive_key(lane)
            everything = {k.send_key(lane) for k in (epoch.keys, peer) for lane in range(both)}
            assert len(everything) == 2 * both
