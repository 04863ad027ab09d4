"""Every fault of a key manager x policy mode x side, as a table: what the tunnel rests on meanwhile, who is alarmed,
what it costs, and that it heals by itself."""

from __future__ import annotations

import os
import random

import pytest

from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import EpochState
from qvpn.wire.messages import Mode
from tests.simnet.carriers import over_each
from tests.simnet.world import World

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
QKD, PQC, BLOCKED = EpochState.QKD, EpochState.PQC, EpochState.BLOCKED

# fault: (state under require-qkd, state under prefer-qkd, alarm or None) with the fault at one end, all the time
TABLE = {
    "down": (BLOCKED, PQC, None),
    "503": (BLOCKED, PQC, None),
    "empty": (BLOCKED, PQC, None),
    "silent": (BLOCKED, PQC, None),
    "unauthorised": (BLOCKED, PQC, "unauthorised"),
    "repeat-refused": (BLOCKED, PQC, "key_repeated"),
    "wrong-length": (BLOCKED, PQC, None),
    "wrong-key": (BLOCKED, PQC, "key_mismatch"),
    "wrong-origin": (BLOCKED, PQC, "origin"),
    "rolled-back": (BLOCKED, PQC, "rolled_back"),
}
"""Cells that hold at either end.  A key manager that is slow or repeats keys differs by side: tests of their own."""

cells = pytest.mark.parametrize("fault", TABLE)
sides = pytest.mark.parametrize("side", ["a", "b"])


def faulty(fault: str, side: str, mode: Mode, **settings: object) -> World:
    """Up, then the fault for so long that every older epoch is over."""
    world = World(21, mode=mode, rekey=10.0, **settings).begin()  # type: ignore[arg-type]
    assert world.run(10, world.up)
    world.keys.fault[side] = fault
    world.traffic(1.0)
    world.run(75)
    world.quiet()
    return world


@over_each
@cells
@sides
def test_require_qkd_blocks_and_nothing_leaves(fault: str, side: str, carrier: str) -> None:
    state, _, alarm = TABLE[fault]
    world = faulty(fault, side, Mode.REQUIRE_QKD, carrier=carrier)
    assert [site.state for site in world.sites] == [state, state]
    assert {event.state for site in world.sites for _, event in site.log.confirmed} == {QKD}
    alarms = {kind for site in world.sites for _, kind in site.log.alarms}
    assert alarm is None or alarm in alarms
    sent = world.network.counts["sent"]
    for site in world.sites:
        before = site.plane.stats(site.other).drops["no_key"]
        site.send_packet()
        assert site.plane.stats(site.other).drops["no_key"] == before + 1
    assert world.network.counts["sent"] == sent
    if fault == "rolled-back":
        return  # an operator must step in
    world.keys.fault[side] = ""
    assert world.run(20, lambda: world.up(QKD)), "it does not heal by itself"


@over_each
@cells
@sides
def test_prefer_qkd_goes_on_without_a_gap_and_says_so(fault: str, side: str, carrier: str) -> None:
    _, state, alarm = TABLE[fault]
    world = faulty(fault, side, Mode.PREFER_QKD, carrier=carrier)
    assert [site.state for site in world.sites] == [state, state]
    assert world.lost() == 0
    assert alarm is None or alarm in {kind for site in world.sites for _, kind in site.log.alarms}
    if fault == "rolled-back":
        return
    world.keys.fault[side] = ""
    assert world.run(25, lambda: world.up(QKD)), "it does not come back to qkd by itself"


@pytest.mark.parametrize("fault", [*TABLE, "slow", "repeated-key"])
@sides
def test_pqc_only_asks_nobody(fault: str, side: str) -> None:
    world = faulty(fault, side, Mode.PQC_ONLY)
    assert [site.state for site in world.sites] == [PQC, PQC]
    assert world.lost() == 0
    assert world.a.log.needs == world.b.log.needs == 0


@cells
def test_mixed_modes_take_the_stricter(fault: str) -> None:
    world = faulty(fault, "b", Mode.PREFER_QKD, a={"mode": Mode.REQUIRE_QKD})
    assert [site.state for site in world.sites] == [BLOCKED, BLOCKED]
    assert {event.state for site in world.sites for _, event in site.log.confirmed} == {QKD}


def test_require_qkd_and_pqc_only_never_meet() -> None:
    world = World(22, a={"mode": Mode.REQUIRE_QKD}, b={"mode": Mode.PQC_ONLY}).begin()
    assert not world.run(60, world.up)
    assert not world.a.installed or not any(event for _, event in world.a.log.confirmed)


def test_prefer_qkd_and_pqc_only_meet_at_pqc() -> None:
    world = World(23, a={"mode": Mode.PREFER_QKD}, b={"mode": Mode.PQC_ONLY}).begin()
    assert world.run(10, lambda: world.up(PQC))
    assert sum(world.keys.drawn.values()) == 0  # b's ready bit is 0


@over_each
@sides
def test_a_slow_key_manager_never_holds_a_handshake_up(side: str, carrier: str) -> None:
    """Its keys come after the 2 s; drawn ones are held for the next attempt, so the tunnel lives on either way."""
    world = faulty("slow", side, Mode.PREFER_QKD, carrier=carrier)
    assert world.lost() == 0
    assert all(state in (QKD, PQC) for state in (world.a.state, world.b.state))


@pytest.mark.parametrize("fault", ["slow", "repeated-key"])
@sides
def test_require_qkd_lives_on_the_other_ends_keys_meanwhile(fault: str, side: str) -> None:
    """Neither fault lets an epoch pass without a key, or with one that was in an epoch before."""
    world = faulty(fault, side, Mode.REQUIRE_QKD)
    assert [site.state for site in world.sites] == [QKD, QKD]
    assert world.lost() == 0
    for site in world.sites:
        assert {event.state for _, event in site.log.confirmed} == {QKD}
        names = [event.key.key_id for _, event in site.log.confirmed if event.key]
        assert len(names) == len(set(names)) == len(site.log.confirmed) >= 4
    if (fault, side) == ("repeated-key", "a"):
        assert "key_repeated" in {kind for _, kind in world.a.log.alarms}
    world.keys.fault[side] = ""
    assert world.run(20, lambda: world.up(QKD))


@sides
def test_a_key_manager_that_repeats_itself_is_found_out(side: str) -> None:
    """The repeated key enters one epoch only; the other end's keys carry the tunnel."""
    world = faulty("repeated-key", side, Mode.PREFER_QKD)
    assert world.lost() == 0
    names = [event.key.key_id for _, event in world.a.log.confirmed if event.key]
    assert len(names) == len(set(names))
    if side == "a":
        assert "key_repeated" in {kind for _, kind in world.a.log.alarms}
        assert world.a.state is PQC


def test_equal_bytes_under_a_new_id_are_refused_too() -> None:
    world = World(24, mode=Mode.PREFER_QKD).begin()
    assert world.run(10, world.up)
    world.keys.random.randbytes = lambda count: b"\x17" * count  # type: ignore[method-assign]
    world.run(60)
    states = [event.state for _, event in world.a.log.confirmed]
    assert states.count(QKD) == 2  # the honest key, and the bytes 17.. once
    assert "key_repeated" in {kind for _, kind in world.a.log.alarms}


@pytest.mark.parametrize(("allow", "state"), [(False, BLOCKED), (True, QKD)])
def test_require_qkd_takes_simulated_keys_only_where_allowed(allow: bool, state: EpochState) -> None:
    world = World(25, allow_simulated=allow)
    world.keys.fault = {"a": "simulated", "b": "simulated"}
    world.begin()
    world.run(30)
    assert [site.state for site in world.sites] == [state, state]
    if allow:
        assert world.a.machine.snapshot(world.now).simulated
    else:
        assert world.network.counts["sent"] and not world.a.installed


@pytest.mark.parametrize("fault", ["down", "503", "silent"])
@pytest.mark.parametrize("mode", [Mode.REQUIRE_QKD, Mode.PREFER_QKD])
def test_an_hour_of_outage_at_r_costs_i_at_most_the_keys_of_one_attempt(fault: str, mode: Mode) -> None:
    """The outage begins at a random moment, also inside a handshake; honest status follows within its interval."""
    for seed in range(24 if LONG else 6):
        chance = random.Random(seed)
        world = World(seed, mode=mode, rekey=10.0).begin()
        assert world.run(10, world.up)
        world.run(chance.choice([chance.uniform(8.8, 10.2), chance.uniform(0, 20)]))
        world.keys.fault["b"] = fault
        before = sum(world.keys.drawn.values())
        world.run((3600 if LONG else 900) if seed == 0 else 40)
        cost = sum(world.keys.drawn.values()) - before
        assert cost <= 3, f"seed {seed}: {cost} keys"
        if seed == 0:
            world.run(30)
            assert sum(world.keys.drawn.values()) - before == cost


@over_each
def test_a_key_that_met_no_m4_serves_in_the_next_attempt(carrier: str) -> None:
    """All M4s are lost for a while: I offers the same key again, R still has it, no second key is drawn."""
    world = World(26, carrier=carrier, rekey=10.0, b={"has_endpoint": False})
    world.network.filter = lambda source, destination, datagram: datagram[0] == 4 and world.now < 32
    world.begin()
    assert not world.run(31, world.up)
    assert world.run(30, lambda: world.up(QKD))
    assert (sum(world.keys.drawn.values()), sum(world.keys.fetched.values())) == (1, 1)


@pytest.mark.parametrize("alarm", [False, True])
def test_a_draw_from_before_an_alarm_that_comes_late_is_not_offered_after_it(alarm: bool) -> None:
    world = World(32, mode=Mode.REQUIRE_QKD, b={"has_endpoint": False})
    world.keys.fault["a"] = "slow"  # 5 s, and the machine waits for 2
    world.begin()
    assert world.run(1, lambda: world.a.log.needs == 1)
    world.keys.fault["a"] = "503"
    world.run(3)
    assert world.a.log.failed, "the attempt still waits for it"
    if alarm:
        world.a.machine.distrust_held_keys(world.now)
    world.run(4)
    assert world.a.log.needs == 1
    held = world.a.machine._core.keys.take_drawn(world.now)
    assert (held is None) == alarm


def test_draws_are_limited_by_the_bucket() -> None:
    """A peer that never confirms a key makes us draw no faster than burst 3 and one per half rekey."""
    world = World(27, rekey=60.0, mode=Mode.REQUIRE_QKD)
    world.keys.fault["b"] = "wrong-key"
    world.begin()
    world.run(300)
    for site in ("a", "b"):
        assert world.keys.drawn[site] <= 3 + 300 / 30 + 1, world.keys.drawn


def test_an_answer_that_ends_at_the_hard_end_ends_once() -> None:
    """No record ever comes, so the epoch at R is over before its 40 s: that is no dropped message."""
    world = World(33, rekey=1.0, b={"has_endpoint": False})
    world.network.filter = lambda source, destination, datagram: datagram[0] == 0x10
    world.begin()
    assert world.run(5, lambda: bool(world.b.installed))
    first = next(iter(world.b.installed))
    world.run(6)
    assert first not in world.b.machine._core.epochs
    assert world.b.drops[DropReason.HANDSHAKE_STATE] == 0


# degraded operation


@over_each
def test_max_degraded_ends_it(carrier: str) -> None:
    world = World(28, carrier=carrier, mode=Mode.PREFER_QKD, rekey=10.0, max_degraded=45.0).begin()
    assert world.run(10, lambda: world.up(QKD))
    world.keys.fault = {"a": "down", "b": "down"}
    assert world.run(30, lambda: world.up(PQC))
    started = world.now
    assert world.run(120, lambda: world.a.sending is None and world.b.sending is None)
    assert 40 < world.now - started <= 46
    world.run(100)
    assert (world.a.sending, world.b.sending) == (None, None)
    world.keys.fault = {"a": "", "b": ""}
    assert world.run(20, lambda: world.up(QKD))


def test_max_qkd_age_lets_require_qkd_live_on_its_chain_for_that_long() -> None:
    world = World(29, rekey=10.0, max_qkd_age=60).begin()
    assert world.run(10, lambda: world.up(QKD))
    world.run(15)
    last = world.now
    world.keys.fault = {"a": "down", "b": "down"}
    assert world.run(20, lambda: world.up(EpochState.CHAINED))
    assert world.run(200, lambda: world.a.sending is None)
    # the last chained epoch began before the key was 60 s old and lived to its hard end
    assert 60 - 10 < world.now - last <= 60 + 30 + 5
    states = {event.state for _, event in world.a.log.confirmed}
    assert states == {QKD, EpochState.CHAINED}
    assert world.lost() == 0


def test_chained_needs_both_sides_to_want_it() -> None:
    world = World(30, rekey=10.0, a={"max_qkd_age": 600}).begin()
    assert world.run(10, lambda: world.up(QKD))
    world.keys.fault = {"a": "down", "b": "down"}
    world.run(60)
    assert [site.state for site in world.sites] == [BLOCKED, BLOCKED]


def test_a_broken_chain_holds_no_key_and_so_no_chained_epoch() -> None:
    world = World(31, rekey=10.0, max_qkd_age=600).begin()
    assert world.run(10, lambda: world.up(QKD))
    world.keys.fault = {"a": "down", "b": "down"}
    assert world.run(20, lambda: world.up(EpochState.CHAINED))
    world.a.crash()
    world.a.begin()
    world.run(60)
    assert [site.state for site in world.sites] == [BLOCKED, BLOCKED]
