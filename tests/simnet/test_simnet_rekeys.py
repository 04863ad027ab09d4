"""Rekeys over a network that loses, doubles, delays and reorders: no packet is lost by them, no epoch without
agreement (:meth:`World.check_agreement` looks at every one)."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import pytest

from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments
from qvpn.tunnel.keys import EpochState
from qvpn.wire.messages import Mode
from tests.simnet.carriers import over_each
from tests.simnet.world import World

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
RUNS, REKEYS = (20, 500) if LONG else (10, 100)
OVER_QUIC = REKEYS if LONG else 40
"""Rekeys in a run over QUIC, which costs three times as much of the processor."""


def bad_network(chance: random.Random) -> Impairments:
    return Impairments(
        loss=chance.choice([0.0, 0.01, 0.05, 0.1]),
        duplicate=chance.choice([0.0, 0.02, 0.1]),
        delay=chance.uniform(0.001, 0.06),
        jitter=chance.uniform(0.0, 0.06),
        reorder=chance.choice([0.0, 0.01, 0.1]),
    )


@pytest.mark.timeout(1800 if LONG else 120)
@over_each
@pytest.mark.parametrize("seed", range(RUNS))
def test_rekeys_lose_nothing_and_agree(seed: int, carrier: str) -> None:
    """10,000 rekeys over each carrier in the long run, in the usual one 1,000 over UDP."""
    chance, rekeys = random.Random(seed), REKEYS if carrier == "udp" else OVER_QUIC
    suites = chance.choice([(1,), (2,)])
    bad, psk = bad_network(chance), chance.choice([None, b"p" * 32])
    world = World(seed, impairments=bad, carrier=carrier, rekey=10.0, suites=suites, psk=psk)
    world.begin()
    assert world.run(60, world.up)
    world.traffic(0.5)
    nonces: set[bytes] = set()
    repeated: list[bytes] = []

    def note(source: Address, destination: Address, data: bytes) -> None:
        if data[0] == 0x10:
            (repeated.append if data[4:16] in nonces else nonces.add)(data[4:16])

    world.network.look = note
    assert world.run(20.0 * rekeys, lambda: len(world.a.log.confirmed) > rekeys)
    world.quiet()
    dropped = [site.plane.stats(site.other).drops for site in world.sites]
    assert world.lost() == world.network.data_lost, (dropped, [site.plane.drops.nonzero() for site in world.sites])
    assert [set(drops) - {"replay"} for drops in dropped] == [set(), set()]
    assert len(nonces) > 30 * rekeys
    assert repeated == [], "receive index and counter, so the nonce under one key, came twice"
    assert world.network.data_lost <= world.network.counts["lost"] + world.given_up()
    assert world.a.log.chain_broken == world.b.log.chain_broken == []
    assert world.a.log.alarms == world.b.log.alarms == []
    for site in world.sites:
        numbers = [event.number for _, event in site.log.confirmed]
        assert numbers == sorted(numbers) and len(numbers) - len(set(numbers)) <= rekeys // 10
        assert {event.state for _, event in site.log.confirmed} == {EpochState.QKD}
        key_ids = [event.key.key_id for _, event in site.log.confirmed if event.key]
        assert len(set(key_ids)) == len(key_ids) == len(numbers)


@over_each
@pytest.mark.parametrize("seed", range(40 if LONG else 8))
def test_a_hopeless_network_loses_only_what_it_loses_itself(seed: int, carrier: str) -> None:
    """A third of all datagrams lost and a rekey each second: epochs run out, but every packet is accounted for."""
    hopeless = Impairments(loss=0.33, delay=0.03, jitter=0.03)
    world = World(seed, impairments=hopeless, carrier=carrier, rekey=1.0).begin()
    world.traffic(0.2)
    world.run(200)
    world.network.impair_all(Impairments(delay=0.01))
    assert world.run(40, world.up)
    world.quiet()
    blocked = sum(
        site.plane.stats(site.other).drops.get("no_key", 0)
        + site.plane.stats(site.other).drops.get("expired", 0)
        + site.plane.stats(site.other).drops.get("send_failed", 0)  # no connection, or a full queue
        + site.plane.drops.nonzero().get("unknown_index", 0)
        for site in world.sites
    )
    # some of those drops are of control records or duplicates
    assert world.network.data_lost <= world.lost() <= world.network.data_lost + blocked


@over_each
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("level", [3, 5])
def test_every_mode_and_level_rekeys(mode: Mode, level: int, carrier: str) -> None:
    suites = (3,) if level == 5 else (1,)
    world = World(3, carrier=carrier, rekey=5.0, mode=mode, level=level, suites=suites).begin()
    assert world.run(10, world.up)
    world.traffic(0.1)
    world.run(30)
    world.quiet()
    assert world.lost() == 0
    expected = EpochState.PQC if mode is Mode.PQC_ONLY else EpochState.QKD
    assert {event.state for _, event in world.a.log.confirmed} == {expected}
    assert len(world.a.log.confirmed) >= 6
    if mode is Mode.PQC_ONLY:
        assert world.a.log.needs == world.b.log.needs == 0


def test_limit_of_aead_calls_asks_for_a_rekey_now() -> None:
    world = World(4, rekey=3600.0).begin()
    assert world.run(10, world.up)
    before = world.a.sending
    assert before is not None
    world.a.on_limit("b", before.receive_index)
    assert world.run(5, lambda: world.up() and world.a.sending is not before)


def test_who_starts() -> None:
    """The preferred peer starts the rekeys; with ``always`` and ``never`` it is the one that is told to."""
    from qvpn.handshake.events import Role
    from qvpn.handshake.parameters import Initiate

    for a, b, starter in (
        (Initiate.AUTO, Initiate.AUTO, "a"),
        (Initiate.NEVER, Initiate.ALWAYS, "b"),
        (Initiate.ALWAYS, Initiate.NEVER, "a"),
    ):
        world = World(5, rekey=5.0, a={"initiate": a}, b={"initiate": b}).begin()
        assert world.run(10, world.up)
        world.run(60)
        roles = [event.role for _, event in world.a.log.confirmed[1:]]
        assert roles == [Role.INITIATOR if starter == "a" else Role.RESPONDER] * len(roles) and len(roles) > 9
        times = [at for at, _ in world.a.log.confirmed]
        gaps = [later - earlier for earlier, later in pairwise(times[1:])]
        assert all(4.4 < gap < 5.2 for gap in gaps), gaps
