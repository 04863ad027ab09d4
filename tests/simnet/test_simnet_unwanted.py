"""Every message in every state of a cold handshake: what PROTOCOL.md chapter 8 has no row for is dropped, counted as
``handshake_state``, and changes nothing; what it has one for is looked at, and junk fails there."""

from __future__ import annotations

import os

import pytest

from qvpn.handshake.carrier import Cold
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


def throw(world: World, site: Site, machine: object, kinds: tuple[MessageType, ...], seen: set[object]) -> None:
    """Junk of each kind at one attempt or entry, from the peer's address and with its index."""
    for kind in kinds:
        state, before = machine.state, site.drops.nonzero()  # type: ignore[attr-defined]
        carrier = Cold(world.addresses[site.other], 1, b"\1\1\1\0", machine.index, b"junk")  # type: ignore[attr-defined]
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
    for _ in range(400):
        attempt = world.a.machine._attempt
        if attempt is not None:
            throw(world, world.a, attempt, ANSWERS, seen)
        for entry in list(world.b.machine._answers._entries):
            throw(world, world.b, entry, QUESTIONS, seen)
        if world.up():
            break
        world.run(0.005)
    assert world.up()
    wanted = {(s, k) for s in (InitiatorState.WAIT_M2, InitiatorState.DRAW, InitiatorState.WAIT_M4) for k in ANSWERS}
    wanted |= {(s, k) for s in {ResponderState.HALF_OPEN, ResponderState.FETCH, *states} for k in QUESTIONS}
    assert wanted <= seen, wanted - seen
