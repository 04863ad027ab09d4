"""A peer, or somebody with its session secrets, who breaks the protocol after the tags are right."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from qvpn.crypto import labels
from qvpn.handshake import initiator, responder
from qvpn.handshake.events import NeedKey, Role
from qvpn.handshake.parameters import Initiate, KeyMaterial
from qvpn.tunnel.keys import EpochState
from qvpn.wire.messages import Mode, Outcome, WireOrigin
from tests.simnet.test_simnet_secrets import watched
from tests.simnet.world import World


def lying(monkeypatch: pytest.MonkeyPatch, module: Any, label: bytes) -> None:
    """Signatures of one label are random bytes from now on."""
    honest = module.sign
    monkeypatch.setattr(
        module,
        "sign",
        lambda identity, used, data: (
            os.urandom(len(honest(identity, used, data))) if used == label else honest(identity, used, data)
        ),
    )


def test_m2_without_rs_signatures_costs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    lying(monkeypatch, responder, labels.SIGN_RESPONDER)
    world = World(81).begin()
    assert not world.run(40, world.up)
    assert sum(world.keys.drawn.values()) == sum(world.keys.fetched.values()) == 0
    assert world.a.drops.nonzero()["handshake_authentication"] > 0


def test_m3_without_is_signatures_costs_no_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    lying(monkeypatch, initiator, labels.SIGN_INITIATOR)
    world = World(82, b={"has_endpoint": False}).begin()
    assert not world.run(40, world.up)
    assert sum(world.keys.fetched.values()) == 0 and world.b.log.needs == 0
    assert world.b.drops.nonzero()["handshake_authentication"] > 0
    assert not world.b.installed


def test_m3r_without_is_signatures_changes_nothing_at_r(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsigned, it would let whoever broke the key exchange strip the key of the source (see tests/formal)."""
    world = World(83, mode=Mode.PREFER_QKD, b={"has_endpoint": False})
    world.keys.fault["b"] = "unauthorised"
    honest, count = initiator.sign, []

    def first_only(identity: Any, label: bytes, data: bytes) -> bytes:
        count.append(label)
        return honest(identity, label, data) if len(count) == 1 else os.urandom(64 + 3309)

    monkeypatch.setattr(initiator, "sign", first_only)
    world.begin()
    world.run(20)
    assert len(count) == 2
    assert world.b.machine.snapshot(world.now).answering == ("RETRY",)
    assert not world.a.installed and not world.b.installed and world.b.log.needs == 1


@pytest.mark.parametrize("outcome", [Outcome.ABSENT, Outcome.CHAINED])
def test_a_degraded_answer_to_a_key_is_refused_even_if_signed(
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(84, mode=Mode.PREFER_QKD, max_qkd_age=600, b={"has_endpoint": False})

    def ignore_the_key(self: responder.Entry, name: Any, claim: Any, now: float) -> None:
        self.state = responder.ResponderState.CONFIRM_NONE
        self._finish(outcome, None, None, now)

    monkeypatch.setattr(responder.Entry, "_fetch", ignore_the_key)
    world.begin()
    world.run(20)
    assert not world.a.installed
    assert world.a.drops.nonzero()["handshake_authentication"] > 0


def test_ok_to_no_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(85, mode=Mode.PREFER_QKD, b={"has_endpoint": False})
    world.keys.fault["a"] = "down"
    monkeypatch.setattr(responder.policy, "decide_none", lambda *arguments: Outcome.OK)
    world.begin()
    world.run(20)
    assert not world.a.installed and world.a.drops.nonzero()["handshake_authentication"] > 0


def test_absent_where_our_policy_forbids_it_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """R says ABSENT (signed) although I, under require-qkd, hoped for CHAINED."""
    world = World(86, mode=Mode.REQUIRE_QKD, rekey=10.0, max_qkd_age=600, b={"has_endpoint": False}).begin()
    assert world.run(10, world.up)
    world.keys.fault = {"a": "down", "b": "down"}
    monkeypatch.setattr(responder.policy, "decide_none", lambda *arguments: Outcome.ABSENT)
    world.run(60)
    assert {event.state for _, event in world.a.log.confirmed} == {EpochState.QKD}
    assert "policy" in {str(event.failure) for _, event in world.a.log.failed}
    assert world.a.sending is None


def test_a_wrong_confirmation_without_a_key_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(87, mode=Mode.PQC_ONLY, b={"has_endpoint": False})
    honest = responder.schedule.qkd_round
    calls = []

    def first_wrong(*arguments: Any) -> Any:
        calls.append(1)
        final = honest(*arguments)
        return replace(final, confirm=bytes(32)) if len(calls) == 1 else final

    monkeypatch.setattr(responder.schedule, "qkd_round", first_wrong)
    world.begin()
    world.run(0.5)
    assert not world.a.installed
    assert [str(event.failure) for _, event in world.a.log.failed] == ["key_mismatch"]
    assert world.run(10, world.up)


def test_a_key_id_of_a_confirmed_epoch_is_never_taken_again() -> None:
    """I's key manager and I together offer an old key: R refuses it without asking its own."""
    world = World(88, rekey=10.0, b={"has_endpoint": False, "initiate": Initiate.NEVER}).begin()
    assert world.run(10, world.up)
    world.run(1)
    name = world.a.log.confirmed[0][1].key
    assert name is not None
    world.a.machine._core.keys.used.__init__()  # type: ignore[misc]  # I has forgotten
    world.keys.draw = lambda site: (  # type: ignore[method-assign]
        0.001,
        KeyMaterial(name.key_id, WireOrigin.QKD, 0, bytearray(32)),
    )
    needs = world.b.log.needs
    world.run(25)
    assert world.b.log.needs == needs
    assert "key_repeated" in {kind for _, kind in world.b.log.alarms}
    assert len({event.number for _, event in world.b.log.confirmed}) == 1


def test_a_policy_that_changes_between_m3_and_m3r_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(89, mode=Mode.PREFER_QKD, b={"has_endpoint": False})
    world.keys.fault["b"] = "unauthorised"
    honest = initiator.codec.encode_p3
    monkeypatch.setattr(
        initiator.codec,
        "encode_p3",
        lambda body: honest(replace(body, policy=replace(body.policy, max_qkd_age=77)) if body.attempt else body),
    )
    world.begin()
    world.run(20)
    assert not world.b.installed and world.b.drops.nonzero()["handshake_authentication"] > 0


def test_a_wrong_attempt_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(90, b={"has_endpoint": False})
    honest = initiator.codec.encode_p3
    monkeypatch.setattr(initiator.codec, "encode_p3", lambda body: honest(replace(body, attempt=body.attempt + 1)))
    world.begin()
    world.run(20)
    assert not world.b.installed and world.b.log.needs == 0


def test_claims_reach_the_other_sides_source_before_it_is_asked() -> None:
    world = World(91, b={"has_endpoint": False})
    world.begin()
    seen_a, seen_b = watched(world, world.a), watched(world, world.b)
    world.a.machine.claim(b"claim of a")
    world.b.machine.claim(b"claim of b")
    assert world.run(10, world.up)
    needs = {event.role: event for event in (*seen_a, *seen_b) if isinstance(event, NeedKey)}
    assert needs[Role.INITIATOR].claim == b"claim of b"
    assert needs[Role.RESPONDER].claim == b"claim of a"
    assert needs[Role.RESPONDER].key is not None and needs[Role.INITIATOR].key is None


def test_more_than_two_m3r_are_refused() -> None:
    """Two sources that never agree under require-qkd: three keys, then it is over."""
    world = World(92, b={"has_endpoint": False})
    world.keys.fault["b"] = "wrong-length"
    world.begin()
    world.run(0.3)
    assert world.keys.drawn["a"] == 3 == world.b.log.needs
    assert [str(event.failure) for _, event in world.a.log.failed] == ["no_key"]


def test_rekey_on_demand() -> None:
    world = World(93, rekey=3600.0).begin()
    assert world.run(10, world.up)
    first = world.a.sending
    for site in world.sites:
        site.machine.rekey(world.now)
        site.pump()
    assert world.run(10, lambda: world.up() and world.a.sending is not first)
    assert world.a.log.chain_broken == world.b.log.chain_broken == []
