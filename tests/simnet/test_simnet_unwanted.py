"""Every message in every state of a handshake, cold or inside an epoch: what PROTOCOL.md chapter 8 has no row for is
dropped, counted as ``handshake_state``, and changes nothing; what it has one for is looked at, where junk fails."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from qvpn.handshake.carrier import Cold, Inner
from qvpn.handshake.state import InitiatorState, ResponderState
from qvpn.netio.memory import Impairments
from qvpn.wire.messages import MessageType, Mode
from tests.simnet.world import Site, World

LOOKED_AT = {
    (InitiatorState.WAIT_M2, MessageType.M2),
    (InitiatorState.WAIT_M4, MessageType.M4),
    (ResponderState.HALF_OPEN, MessageType.M3),
    (ResponderState.RETRY, MessageType.M3R),
    (ResponderState.CONFIRM, MessageType.M3R),
}
ANSWERS = (MessageType.M2, MessageType.M4, MessageType.RETRY)
QUESTIONS = (MessageType.M3, MessageType.M3R)


def astray(world: World, site: Site, machine: object) -> Cold | Inner:
    """The way by which the peer's next message to this attempt or entry will come."""
    index = machine.index  # type: ignore[attr-defined]
    began = machine.inner if hasattr(machine, "inner") else machine.carrier  # type: ignore[attr-defined]
    if began is None or isinstance(began, Cold):
        return Cold(world.addresses[site.other], 1, b"\1\1\1\0", index, b"junk")
    return Inner(began.receive_index, 1, index)


def throw(world: World, site: Site, machine: object, kinds: tuple[MessageType, ...], seen: set[object]) -> None:
    """Junk of each kind at one attempt or entry, from the peer's address and with its index."""
    for kind in kinds:
        state, before = machine.state, site.drops.nonzero()  # type: ignore[attr-defined]
        carrier = astray(world, site, machine)
        site._count(site.machine.receive(kind, os.urandom(5000), carrier, world.now))
        site.pump()
        after = site.drops.nonzero()
        counted = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
        assert sum(counted.values()) == 1, (state, kind, counted)
        assert (list(counted) == ["handshake_state"]) is ((state, kind) not in LOOKED_AT), (state, kind, counted)
        assert machine.state is state  # type: ignore[attr-defined]
        seen.add((state, kind))


@pytest.mark.parametrize(
    ("mode", "fault", "states"),
    [
        (Mode.REQUIRE_QKD, "", {ResponderState.CONFIRM}),
        (Mode.PREFER_QKD, "unauthorised", {ResponderState.RETRY, ResponderState.CONFIRM_NONE}),
    ],
)
def test_junk_of_every_kind_in_every_state(mode: Mode, fault: str, states: set[ResponderState]) -> None:
    world = World(91, mode=mode, impairments=Impairments(delay=0.02), b={"has_endpoint": False})
    world.keys.latency = 0.03
    seen: set[object] = set()
    world.begin()
    world.keys.fault["b"] = fault
    pelt(world, seen, world.up)
    assert world.up()
    assert everything(states) <= seen, everything(states) - seen


def pelt(world: World, seen: set[object], until: Callable[[], object]) -> None:
    """Junk at whatever attempt or entry there is, every 5 ms for 2 s."""
    for _ in range(400):
        attempt = world.a.machine._attempt
        if attempt is not None:
            throw(world, world.a, attempt, ANSWERS, seen)
        for entry in list(world.b.machine._answers._entries):
            throw(world, world.b, entry, QUESTIONS, seen)
        if until():
            break
        world.run(0.005)


def everything(states: set[ResponderState]) -> set[object]:
    """A question draws from its source in each handshake; what the answer comes to is in ``states``."""
    wanted = {(s, k) for s in (InitiatorState.WAIT_M2, InitiatorState.DRAW, InitiatorState.WAIT_M4) for k in ANSWERS}
    return wanted | {(s, k) for s in {ResponderState.HALF_OPEN, ResponderState.FETCH, *states} for k in QUESTIONS}


def test_junk_of_every_kind_in_every_state_of_a_rekey() -> None:
    """Inside the epoch, where only the peer can speak: its own junk changes nothing, and no packet is lost."""
    world = World(92, impairments=Impairments(delay=0.02), b={"has_endpoint": False}).begin()
    assert world.run(5, lambda: world.up() and world.a.machine._inner_epoch())
    first = world.a.sending
    world.keys.latency = 0.03
    world.traffic(0.01)
    seen: set[object] = set()
    world.a.machine.rekey(world.now)
    world.a.pump()
    assert world.a.machine._attempt is not None
    assert world.a.machine._attempt.inner is not None
    pelt(world, seen, lambda: world.up() and world.a.sending is not first)
    world.quiet()
    assert world.a.sending is not first
    assert world.lost() == 0
    assert everything({ResponderState.CONFIRM}) <= seen, everything({ResponderState.CONFIRM}) - seen


def test_junk_at_a_handshake_that_was_refused() -> None:
    """The refused one stays what it is until it expires, and the next handshake is none the worse."""
    world = World(93, impairments=Impairments(delay=0.02), a={"allow_simulated": True}, b={"has_endpoint": False})
    world.begin()
    world.keys.fault["a"] = "simulated"  # good enough for a, not for b
    seen: set[object] = set()
    refused = {(ResponderState.REFUSED, kind) for kind in QUESTIONS}
    pelt(world, seen, lambda: refused <= seen)
    assert refused <= seen
    assert not world.up()
    world.keys.fault["a"] = ""
    assert world.run(20, world.up)
