"""Each datagram of a handshake lost at each position, once and more often: it ends well, the chain is kept."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from qvpn.netio.base import Address
from tests.simnet.carriers import over_each
from tests.simnet.world import World

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
NAMES = {1: "M1", 2: "M2", 3: "M3", 4: "M4", 5: "RETRY", 6: "M3R"}


def dropping(world: World, kind: int, fragment: int, times: int) -> Counter[str]:
    """Swallow the first ``times`` datagrams of that type and fragment, from whomever."""
    left = {world.addresses["a"]: times, world.addresses["b"]: times}
    seen: Counter[str] = Counter()

    def swallow(source: Address, destination: Address, datagram: bytes) -> bool:
        if datagram[0] != kind or (fragment >= 0 and datagram[3] >> 4 != fragment) or not left[source]:
            return False
        left[source] -= 1
        seen[NAMES[kind]] += 1
        return True

    world.network.filter = swallow
    return seen


@over_each
@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "fragment"), [(1, 0), (1, 1), (5, 0), (2, 0), (2, 3), (2, -1), (3, 0), (3, 2), (3, -1), (4, 0)]
)
def test_cold_messages_lost_at_each_position(kind: int, fragment: int, times: int, carrier: str) -> None:
    world = World(11, carrier=carrier, rekey=10.0, b={"has_endpoint": False})
    seen = dropping(world, kind, fragment, times)
    world.begin()
    assert world.run(29, world.up), f"{NAMES[kind]} {fragment} x{times}"
    assert sum(seen.values()) == times
    assert sum(world.keys.drawn.values()) == 1
    world.traffic(0.2)
    world.run(25)
    world.quiet()
    assert world.lost() == 0
    assert world.a.log.chain_broken == world.b.log.chain_broken == []


@over_each
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("sender", ["a", "b"])
@pytest.mark.parametrize("position", range(24 if LONG else 12))
def test_inner_records_lost_at_each_position(position: int, sender: str, times: int, carrier: str) -> None:
    """Control records of a rekey (its messages, EPOCH_OK, EPOCH_ACK) look alike: lost by number."""
    world = World(12, carrier=carrier, rekey=10.0).begin()
    assert world.run(5, world.up)
    world.run(8.0)  # just before the rekey (at 9 to 10 s)
    first = world.a.sending
    passed = Counter[str]()

    def swallow(source: Address, destination: Address, datagram: bytes) -> bool:
        if datagram[0] != 0x10 or not datagram[15] & 0x80 or source != world.addresses[sender]:
            return False
        passed["control"] += 1
        return position < passed["control"] <= position + times

    world.network.filter = swallow
    world.traffic(0.2)
    assert world.run(15, lambda: world.up() and world.a.sending is not first)
    world.run(25)
    world.quiet()
    assert world.lost() == 0
    assert world.a.log.chain_broken == world.b.log.chain_broken == []
    assert sum(world.keys.drawn.values()) <= len(world.a.log.confirmed) + 2


@over_each
def test_m4_and_everything_after_it_lost_keeps_the_chain(carrier: str) -> None:
    """R has the new epoch, I never hears of it: the next handshake still finds a common chain."""
    world = World(13, carrier=carrier, rekey=10.0).begin()
    assert world.run(5, world.up)
    world.run(8.0)
    started = len(world.b.installed)
    world.network.filter = lambda source, destination, datagram: (
        source == world.addresses["b"] and len(world.b.installed) > started
    )
    world.run(10.0)
    assert len(world.b.installed) > started
    world.network.filter = lambda source, destination, datagram: False
    count = len(world.a.log.confirmed)
    assert world.run(30, lambda: world.up() and len(world.a.log.confirmed) > count)
    assert world.a.log.chain_broken == world.b.log.chain_broken == []
    assert sum(world.keys.drawn.values()) - len(world.a.log.confirmed) <= 1  # the held key served again
