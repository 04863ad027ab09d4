"""Time that jumps: a suspended host wakes with dead keys, a stalled one does not run amok."""

from __future__ import annotations

import os

import pytest

from tests.simnet.carriers import over_each
from tests.simnet.world import World

LONG = os.environ.get("QVPN_TEST_LONG") == "1"


@over_each
@pytest.mark.parametrize("jump", [1.0, 9.0, 25.0, 31.0, 500.0, 1e6])
def test_a_suspended_host_wakes_up(jump: float, carrier: str) -> None:
    """CLOCK_BOOTTIME counts on in a suspend: past the hard end nothing is sealed or opened, then it heals."""
    world = World(61, carrier=carrier, rekey=10.0).begin()
    assert world.run(10, world.up)
    world.run(3)
    world.network.now += jump  # nobody's timer ran meanwhile
    if jump > 30:
        assert world.a.sending is None
        world.a.send_packet()
        assert world.a.plane.stats("b").drops == {"no_key": 1}
    assert world.run(45, world.up)
    lost = world.lost()
    world.traffic(0.5)
    world.run(25)
    world.quiet()
    assert world.lost() == lost


@over_each
def test_a_stall_in_every_state_does_not_break_the_next_handshake(carrier: str) -> None:
    for steps in range(1, 60, 1 if LONG or carrier == "udp" else 7):
        world = World(62, carrier=carrier, rekey=10.0)
        world.begin()
        for _ in range(steps):
            arrival = world.network.next_due()
            world.run(0.001 if arrival is None else max(1e-6, arrival - world.now))
        world.network.now += 7.0
        assert world.run(45, world.up), f"after {steps} steps"


def test_next_timer_never_stands_still() -> None:
    """After handle_timer at its own time, next_timer lies later, or there is something new to do: no busy loop."""
    world = World(63, rekey=5.0).begin()
    world.traffic(1.0)
    for _ in range(4000):
        world.run(0.05)
        for site in world.sites:
            due = site.machine.next_timer()
            if due is not None and due <= world.now:
                site.tick()
                after = site.machine.next_timer()
                assert after is None or after > world.now
    assert len(world.a.log.confirmed) > 30
