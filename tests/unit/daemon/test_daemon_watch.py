"""What a daemon does about the world around it: clocks, copies, alarms, late keys, silence in one direction."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any

import pytest

from qvpn.control.clockwatch import ClockWatch
from qvpn.netio.base import Address
from qvpn.netio.vmclock import Generation

Play = Callable[..., None]


class Host:
    """Alice's machine, as her daemon's watch sees it."""

    def __init__(self, world: Any, shows: bool = True) -> None:
        self.ahead = 1.7e9
        self.mark = Generation(1, 1)
        world.make("alice")
        world.daemons["alice"]._watch = ClockWatch(
            lambda: world.network.now,
            lambda: world.network.now + self.ahead,
            [lambda: self.mark] if shows else [],
        )


def test_a_copied_machine_seals_nothing_more_under_its_old_keys(play: Play) -> None:
    async def story(world: Any) -> None:
        host = Host(world)
        await world.start()
        await world.up()
        daemon = world.daemons["alice"]
        old = {epoch.receive_index for epoch in daemon._plane.stats("bob").epochs}
        host.mark = Generation(2, 1)
        await world.until(
            lambda: world.events("alice", "this virtual machine was copied: every epoch is erased"), 1.0
        )
        assert not old & {epoch.receive_index for epoch in daemon._plane.stats("bob").epochs}
        await world.until(lambda: world.state("alice") == "qkd", 5)
        assert await world.send("alice", 5) == 5
        assert await world.send("bob", 5) == 5
        assert len(world.events("alice", "this virtual machine was copied: every epoch is erased")) == 1

    play(story, rekey="60s")


@pytest.mark.parametrize("step", [6.0, -3600.0])
def test_a_jump_of_the_wall_clock_makes_a_handshake_and_loses_no_packet(play: Play, step: float) -> None:
    async def story(world: Any) -> None:
        host = Host(world, shows=False)
        await world.start()
        await world.up()
        before = world.peer("alice")["epochs"]
        host.ahead += step
        assert await world.send("alice", 300) == 300
        assert world.peer("alice")["epochs"] == before + 1
        warnings = world.events("alice", "the wall clock jumped: new handshakes beside the epochs")
        assert [entry["seconds"] for entry in warnings] == [step]
        assert len([entry for entry in world.logs["alice"] if "does not show copies" in entry["event"]]) == 1

    play(story, rekey="60s")


def test_block_now_blocks_until_the_source_says_that_it_is_ready_again(play: Play) -> None:
    """Bob's source is fine, and his handshakes are refused all the same: Alice's alarm is hers."""

    async def story(world: Any) -> None:
        world.make("alice", more='policy = "prefer-qkd"\non_alarm = "block-now"')
        world.make("bob", more='policy = "prefer-qkd"')
        await world.start()
        await world.up()
        world.sources["alice"].alarm = "QBER 12%"
        await world.until(lambda: world.state("alice") == "blocked", 5)
        for _ in range(200):
            assert await world.send("alice") == await world.send("bob") == 0
            assert world.state("alice") == "blocked"
        # An answer that never comes is not the end of an alarm.
        world.sources["alice"].alarm, world.sources["alice"].down = None, True
        await asyncio.sleep(60)
        assert world.state("alice") == "blocked"
        world.sources["alice"].down = False
        await world.up(within=30)
        assert await world.send("bob", 5) == 5
        assert world.peer("alice")["alarms"] == 1

    play(story)


def test_an_alarm_that_is_there_before_the_start_blocks_too(play: Play) -> None:
    async def story(world: Any) -> None:
        world.make("alice")
        world.sources["alice"].alarm = "QBER 12%"
        await world.start()
        await asyncio.sleep(30)
        assert world.state("alice") == world.state("bob") == "blocked"
        world.sources["alice"].alarm = None
        await world.up(within=30)

    play(story, more='on_alarm = "block-now"')


def test_silence_under_the_new_epoch_is_noticed_although_the_old_one_is_heard(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        daemon = world.daemons["alice"]
        traffic = daemon._plane.stats("bob")
        heard, _ = daemon._traffic("bob")
        assert heard == traffic.epochs[0].last_received == traffic.last_received
        await asyncio.sleep(5)
        peer = daemon._plane._table["bob"]
        (epoch,) = peer.epochs
        epoch.last_received = 0.001  # as if all that came since had come under another epoch
        assert daemon._traffic("bob")[0] == 0.001 < peer.last_received

    play(story)


def test_the_first_record_of_a_cold_epoch_tells_where_the_peer_is(play: Play) -> None:
    """Bob's file has an old address of Alice's: her handshake comes from elsewhere, and Bob follows at once."""

    async def story(world: Any) -> None:
        old = Address(ipaddress.ip_address("192.0.2.1"), 51840)
        new = Address(ipaddress.ip_address("203.0.113.9"), 4242)
        world.make("bob")
        world.make("alice")
        world.binds["alice"].rebind(new)
        await world.start("bob", "alice")
        await world.up()
        bob = world.daemons["bob"].agents["alice"]
        assert world.events("bob", "endpoint")[0]["address"] == str(old)
        assert bob.endpoint == new
        assert world.events("bob", "peer seen at another address, probing") == []
        assert await world.send("bob", 3) == 3

    play(story)


def test_a_probe_is_answered_only_from_where_it_went(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        agent = world.daemons["bob"].agents["alice"]
        index = world.daemons["bob"]._plane.stats("alice").epochs[0].receive_index
        there, elsewhere = (Address(ipaddress.ip_address(ip), 7) for ip in ("203.0.113.9", "203.0.113.10"))
        before = agent.endpoint
        for late, epoch, source, moves in [
            (0.0, index, elsewhere, False),
            (0.0, index ^ 16, there, False),
            (3.1, index, there, False),
            (2.9, index, there, True),
        ]:
            agent.new_address(index, there)
            challenge = agent._probes[there][0]
            await asyncio.sleep(late)
            agent.control(epoch, bytes([6]) + challenge, source)
            assert (agent.endpoint != before) is moves
        assert agent.endpoint == there

    play(story)


def test_a_keepalive_longer_than_the_usual_is_kept(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        await asyncio.sleep(15)
        sent: list[float] = []
        world.network.tap = lambda *_: sent.append(world.network.now)
        await asyncio.sleep(50)
        assert 4 <= len(sent) <= 6  # both sides, each 20 s
        assert world.state("alice") == "qkd"

    play(story, rekey="2m", more='keepalive = "20s"')


def test_a_late_draw_is_used_by_the_next_attempt(play: Play) -> None:
    """The limit is 2 s, the back-off 0.75 s at least: the key comes in between, and no second one is drawn."""

    async def story(world: Any) -> None:
        world.make("bob")
        world.make("alice")
        source = world.sources["alice"]
        give, slow = source.get_key, [2.5]

        async def late(peer_sae: str) -> Any:
            key = await give(peer_sae)
            if slow:
                await asyncio.sleep(slow.pop())
            return key

        source.get_key = late
        await world.start()
        await world.up(within=30)
        assert world.events("alice", "no key in time, the draw goes on")
        assert world.box.drawn == world.box.fetched == 1

    play(story, endpoints=("alice",))


def test_the_path_to_the_peer_limits_cold_datagrams(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: Any) -> None:
        world.make("alice")
        world.make("bob")
        narrow = {Address(ipaddress.ip_address("192.0.2.2"), 51840): 800}
        bind = world.binds["alice"]
        usual = bind.max_payload
        monkeypatch.setattr(type(bind), "max_payload", lambda self, address: narrow.get(address) or usual(address))
        agent = world.daemons["alice"].agents.get("bob")
        assert agent is None
        sizes: list[int] = []
        alice = bind.local
        world.network.tap = lambda source, _to, data: sizes.append(len(data)) if source == alice else None
        await world.start()
        await world.up()
        handshakes = [size for size in sizes if size > 300]
        assert handshakes and max(handshakes) <= 800

    play(story)


def test_a_deleted_interface_ends_the_daemon_with_a_reason(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        daemon = world.daemons["alice"]
        daemon.on_tun_gone()
        await asyncio.wait_for(daemon.run(), 1)
        assert daemon.failure == (
            f"interface {world.tuns['alice'].name} was deleted by somebody, so no packet can pass any more"
        )

    play(story)
