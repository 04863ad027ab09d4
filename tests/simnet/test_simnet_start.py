"""Beginnings: both at once, one without an endpoint, restarts at any moment, CLOSE."""

from __future__ import annotations

import os
import random

import pytest

from qvpn.handshake.events import Failure
from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments
from tests.simnet.carriers import over_each, reach
from tests.simnet.world import World

LONG = os.environ.get("QVPN_TEST_LONG") == "1"


@over_each
@pytest.mark.parametrize("block", range(10))
def test_both_start_in_the_same_moment(block: int, carrier: str) -> None:
    """1,000 seeds in the long run: one epoch for both, at most one key a side, the chain holds at the next rekey."""
    size = 100 if LONG else 10
    within = 20 if carrier == "udp" else 35  # a lost packet of its own handshake costs QUIC a second, then two
    for seed in range(block * size, (block + 1) * size):
        chance = random.Random(seed)
        delay, jitter = chance.uniform(0.0005, 0.15), chance.uniform(0.0, 0.1)
        lossy = Impairments(delay=delay, jitter=jitter, loss=chance.choice([0.0, 0.0, 0.1]))
        world = World(seed, impairments=lossy, carrier=carrier, rekey=10.0).begin()
        assert world.run(within, world.up), f"seed {seed}: nothing after {within} s"
        world.run(1.0)
        assert world.up(), f"seed {seed}: they parted again"
        assert sum(world.keys.drawn.values()) <= 2, f"seed {seed}: {world.keys.drawn}"
        first, settled = len(world.a.log.confirmed), world.now
        world.traffic(0.5)
        assert world.run(30, lambda: len(world.a.log.confirmed) > first and len(world.b.log.confirmed) > first)  # noqa: B023
        world.quiet()
        assert world.lost() == world.network.data_lost, f"seed {seed}"
        # an M1 from before the first epoch may arrive after it, and can offer no chain
        broken = [when for site in (world.a, world.b) for when in site.log.chain_broken]
        assert all(when < settled for when in broken), f"seed {seed}"


@pytest.mark.parametrize("seed", range(20))
def test_the_preferred_peers_handshake_wins_where_both_complete(seed: int) -> None:
    """M2 to a is late and b's EPOCH_OK is lost, so that a accepts its M4 while b has accepted the other one."""
    world = World(seed, rekey=10.0)
    world.keys.latency = 0.2
    b = world.addresses["b"]

    def swallow(source: Address, destination: Address, datagram: bytes) -> bool:
        return source == b and world.now < {2: 0.6, 0x10: 4.0}.get(datagram[0], 0.0)

    world.network.filter = swallow
    world.begin()
    assert world.run(3, lambda: len(world.a.installed) == len(world.b.installed) == 2)
    world.run(4)
    ours, theirs = (
        next(e.keys for e in world.a.installed.values() if e.keys.initiator is own) for own in (True, False)
    )
    assert world.up() and world.a.sending is ours
    assert world.a.plane._table["b"].epochs.get(theirs.receive_index).held
    world.traffic(0.1)
    world.run(20)
    world.quiet()
    assert world.lost() == 0
    assert world.a.log.chain_broken == world.b.log.chain_broken == []
    assert [event.number for _, event in world.a.log.confirmed] == [0, 0, 1, 2]


@over_each
@pytest.mark.parametrize("without", ["a", "b"])
def test_a_site_that_knows_no_endpoint_learns_it(without: str, carrier: str) -> None:
    world = World(1, carrier=carrier, **{without: {"has_endpoint": False}}).begin()
    assert world.run(5, world.up)
    world.traffic(0.1)
    world.run(25)
    world.quiet()
    assert world.lost() == 0
    site = world.a if without == "a" else world.b
    assert site.endpoint == reach(carrier, world.addresses[site.other])


@over_each
def test_without_any_endpoint_nothing_is_sent(carrier: str) -> None:
    world = World(1, carrier=carrier, a={"has_endpoint": False}, b={"has_endpoint": False}).begin()
    world.run(100)
    assert world.network.counts["sent"] == 0


@over_each
@pytest.mark.parametrize("end", ["a", "b"])
@pytest.mark.parametrize("block", range(4))
def test_either_end_restarts_at_any_moment(end: str, block: int, carrier: str) -> None:
    """kill -9 and a new process after a while, at moments spread over handshakes and the time between."""
    for seed in range(block * 10, block * 10 + (10 if LONG else 5)):
        chance = random.Random(seed)
        lossy = Impairments(delay=0.02, jitter=0.02, loss=chance.choice([0.0, 0.05]))
        world = World(seed, impairments=lossy, carrier=carrier, rekey=5.0)
        world.begin()
        site = world.a if end == "a" else world.b
        world.run(chance.choice([chance.uniform(0.0, 0.3), chance.uniform(4.3, 5.8), chance.uniform(1.0, 30.0)]))
        site.crash()
        world.run(chance.choice([0.0, 0.05, 1.0, 40.0]))
        site.begin()
        assert world.run(32, world.up), f"seed {seed}: not up 32 s after the restart of {end}"
        world.traffic(0.2)
        assert world.run(20, lambda: len(site.log.confirmed) > 2)  # noqa: B023
        world.quiet()
        assert world.lost() == world.network.data_lost, f"seed {seed}"


@over_each
def test_both_restart_together(carrier: str) -> None:
    world = World(7, carrier=carrier, rekey=5.0).begin()
    assert world.run(5, world.up)
    for site in world.sites:
        site.crash()
    for site in world.sites:
        site.begin()
    assert world.run(5, world.up)


@over_each
def test_an_orderly_stop_is_told_and_nothing_goes_into_the_void(carrier: str) -> None:
    world = World(8, carrier=carrier, rekey=10.0).begin()
    assert world.run(5, world.up)
    world.a.stop()
    world.run(0.2)
    assert world.b.sending is None
    world.b.send_packet()
    assert world.b.plane.stats("a").drops == {"no_key": 1}
    assert [event.failure for _, event in world.a.log.failed + world.b.log.failed] == [
        Failure.YIELDED
    ]  # at the start
    world.run(5)
    world.a.begin()
    assert world.run(32, world.up)


@over_each
def test_a_peer_that_vanishes_is_noticed_and_one_that_comes_back_found(carrier: str) -> None:
    world = World(9, carrier=carrier, rekey=10.0).begin()
    assert world.run(5, world.up)
    ends = world.addresses["a"], world.addresses["b"]
    for pair in (ends, ends[::-1]):
        world.network.block(*pair)
    world.run(100)
    assert (world.a.sending, world.b.sending) == (None, None)  # hard end
    for pair in (ends, ends[::-1]):
        world.network.block(*pair, False)
    assert world.run(25, world.up)


@over_each
def test_a_one_way_street_is_not_sent_into_for_ever(carrier: str) -> None:
    """b hears a, a hears nothing: no epoch gets confirmed at a, and all is well when the way back opens."""
    world = World(10, carrier=carrier, rekey=10.0)
    world.network.block(world.addresses["b"], world.addresses["a"])
    world.begin()
    world.run(60)
    assert world.a.log.confirmed == world.b.log.confirmed == []
    world.network.block(world.addresses["b"], world.addresses["a"], False)
    assert world.run(40, world.up)
