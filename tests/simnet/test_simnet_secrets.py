"""What is left over: no ephemeral key after M2, no key bytes in a repr, and every source key wiped in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qvpn.handshake.parameters import KeyMaterial
from qvpn.handshake.state import InitiatorState
from qvpn.tunnel.keys import EpochState
from tests.simnet.world import Site, World


def watched(world: World, site: Site) -> list[Any]:
    """Every event that the site's machine gives, kept."""
    seen: list[Any] = []
    original: Callable[[], Any] = site.machine.next_event

    def note() -> Any:
        event = original()
        if event is not None:
            seen.append(event)
        return event

    site.machine.next_event = note  # type: ignore[method-assign]
    return seen


def test_ephemeral_keys_are_gone_before_m3_is_sent() -> None:
    """Forward secrecy needs it: whoever takes the process afterwards finds nothing to decapsulate with."""
    world = World(71)
    world.keys.latency = 0.5
    world.begin()

    def drawing() -> bool:
        attempt = world.a.machine._attempt
        return attempt is not None and attempt.state is InitiatorState.DRAW

    assert world.run(5, drawing)
    attempt = world.a.machine._attempt
    assert attempt is not None and attempt._ephemeral is None
    assert world.run(5, world.up)
    assert not hasattr(attempt, "_kex")


def test_keys_of_the_source_are_wiped_once_their_epoch_is_confirmed() -> None:
    world = World(72, rekey=10.0, b={"has_endpoint": False}).begin()
    handed: list[KeyMaterial] = []
    original = world.keys._deliver

    def deliver(site: str, key_id: str, material: bytes) -> Any:
        wait, answer = original(site, key_id, material)
        if isinstance(answer, KeyMaterial):
            handed.append(answer)
        return wait, answer

    world.keys._deliver = deliver  # type: ignore[method-assign]
    world.run(35)
    assert len(handed) >= 6
    assert not any(any(key.material) for key in handed)
    world.keys.fault["b"] = "unauthorised"
    world.run(30)
    for site in world.sites:
        site.stop()
    assert not any(any(key.material) for key in handed)


def test_no_repr_tells_a_key() -> None:
    world = World(73, rekey=10.0)
    world.begin()
    seen = [*watched(world, world.a), *watched(world, world.b)]
    events = [watched(world, site) for site in world.sites]
    assert world.run(25, lambda: len(world.a.log.confirmed) > 2)
    shown = "\n".join(repr(event) for log in (seen, *events) for event in log)
    shown += repr(world.a.machine.snapshot(world.now)) + repr(world.a.parameters)
    shown += repr(list(world.a.machine._core.epochs.values())) + repr(world.a.machine._core.chain._new)
    assert "Install(" in shown and "Confirmed(" in shown
    secrets = [
        key for site in world.sites for epoch in site.installed.values() for key in (epoch.send, epoch.receive)
    ]
    secrets += [info.link.secret for info in world.a.machine._core.epochs.values()]
    for secret in secrets:
        assert secret.hex() not in shown and repr(secret)[2:-1] not in shown


def test_a_stopped_machine_is_dead() -> None:
    world = World(74, rekey=10.0).begin()
    assert world.run(5, world.up)
    machine = world.a.machine
    world.a.machine.stop(world.now)
    world.a.pump()
    assert machine.next_timer() is None and machine.next_event() is None
    assert machine.snapshot(world.now).state is EpochState.BLOCKED
    machine.handle_timer(world.now + 100)
    machine.stop(world.now)
    assert machine.next_event() is None
    assert world.a.plane.stats("b").epochs == ()
