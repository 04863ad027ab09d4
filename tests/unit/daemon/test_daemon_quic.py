"""Whole daemons over QUIC, in virtual time over the hostile in-memory network.

Start, rekey, loss, restart, a change of address, and the fall from UDP to QUIC and back.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Callable
from typing import Any

import pytest

from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments
from qvpn.transports.quic.bind import QuicBind
from qvpn.transports.quic.certificate import self_made
from qvpn.transports.quic.settings import parse_peer

Play = Callable[..., None]
QUIC, BOTH = 'transport = "quic"', 'transport = ["udp", "quic"]'
LONG = os.environ.get("QVPN_TEST_LONG") == "1"


def is_plain(datagram: bytes) -> bool:
    return not datagram[0] & 0x40


def carriers(world: Any) -> set[str | None]:
    return {world.peer(site)["carrier"] for site in world.daemons}


@pytest.mark.parametrize("endpoints", [("alice",), ("alice", "bob")], ids=["one dials", "both dial"])
def test_a_tunnel_over_quic_rekeys_without_a_lost_packet_and_sends_nothing_else(
    play: Play, endpoints: tuple[str, ...]
) -> None:
    plain = []

    async def story(world: Any) -> None:
        world.network.tap = lambda source, destination, datagram: (
            plain.append(datagram) if is_plain(datagram) else None
        )
        await world.start()
        await world.up(within=5)
        rounds = 300 if LONG else 60
        for _ in range(rounds):
            assert await world.send("alice", 5) == 5
            assert await world.send("bob", 5) == 5
            await asyncio.sleep(0.3)
        assert min(world.peer(site)["rekeys"] for site in world.daemons) >= rounds / 20
        assert carriers(world) == {"quic"}
        assert not plain
        counts = world.status("bob")["carriers"]["quic"]
        assert counts["up"] <= 2 and counts["connections"] <= 2

    play(story, quic=True, more=QUIC, rekey="4s", endpoints=endpoints)


def test_loss_delays_a_tunnel_over_quic_and_does_not_stop_it(play: Play) -> None:
    async def story(world: Any) -> None:
        world.network.impair_all(Impairments(delay=0.02, loss=0.1, duplicate=0.05, reorder=0.05, jitter=0.01))
        await world.start()
        await world.up(within=40)
        arrived = 0
        for _ in range(40):
            arrived += await world.send("alice", 5)
            await asyncio.sleep(1)
        assert arrived >= 120, arrived
        assert world.peer("alice")["rekeys"] >= 3

    play(story, quic=True, more=QUIC, rekey="8s", endpoints=("alice",))


def test_a_restarted_listener_is_found_again(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        assert await world.send("alice", 3) == 3
        world.kill("bob")
        await asyncio.sleep(1)
        await world.start("bob")
        took = await world.until(lambda: world.state("bob") == "qkd", 40)
        assert await world.send("alice", 3) == await world.send("bob", 3) == 3
        assert took < 35  # the dead-peer time of rekey = 10 s, and a handshake

    play(story, quic=True, more=QUIC, endpoints=("alice",))


def test_a_change_of_address_is_followed_in_one_round_trip(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        assert await world.send("alice", 3) == 3
        opened = world.status("alice")["carriers"]["quic"]["opened"]
        elsewhere = Address(ipaddress.ip_address("192.0.2.77"), 4433)
        world.binds["alice"].rebind(elsewhere)
        assert await world.send("alice", 1) == 1  # her first packet tells bob's QUIC where she is
        assert await world.send("bob", 3) == 3
        assert await world.send("alice", 30) == 30
        await world.until(lambda: world.peer("bob")["endpoint"] == str(elsewhere), 5)
        assert world.status("alice")["carriers"]["quic"]["opened"] == opened
        assert carriers(world) == {"quic"}

    play(story, quic=True, more=QUIC, endpoints=("alice",))


@pytest.mark.parametrize("endpoints", [("alice",), ("alice", "bob")], ids=["one dials", "both dial"])
def test_udp_that_stops_passing_is_left_for_quic_and_taken_again(play: Play, endpoints: tuple[str, ...]) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        assert carriers(world) == {"udp"}
        await asyncio.sleep(20)
        assert carriers(world) == {"udp"} and world.peer("alice")["carrier_changes"] == 0
        world.network.swallow = is_plain
        await world.until(lambda: carriers(world) == {"quic"}, 12)
        assert await world.send("alice", 5) == await world.send("bob", 5) == 5
        await asyncio.sleep(40)
        assert carriers(world) == {"quic"}
        assert await world.send("alice", 5) == await world.send("bob", 5) == 5
        world.network.swallow = lambda datagram: False
        await world.until(lambda: carriers(world) == {"udp"}, 20)
        assert await world.send("alice", 5) == await world.send("bob", 5) == 5
        await asyncio.sleep(30)
        assert carriers(world) == {"udp"}
        assert all(world.peer(site)["carrier_changes"] == 2 for site in world.daemons)  # no to and fro

    play(story, quic=True, more=BOTH, endpoints=endpoints)


def test_where_udp_never_passes_a_tunnel_comes_up_over_quic(play: Play) -> None:
    async def story(world: Any) -> None:
        world.network.swallow = is_plain
        await world.start()
        await world.up(within=15)
        assert carriers(world) == {"quic"}
        assert await world.send("alice", 5) == await world.send("bob", 5) == 5

    play(story, quic=True, more=BOTH, endpoints=("alice",))


def test_a_narrow_path_is_found_without_a_stand_still(play: Play) -> None:
    async def story(world: Any) -> None:
        world.network.impair_all(Impairments(delay=0.005, path_payload=1252))
        await world.start()
        await world.up(within=10)
        await world.until(lambda: world.peer("alice")["path"]["found"] == "probe", 20)
        path = world.peer("alice")["path"]
        assert path["mtu"] == 1280 and path["inner_mtu"] == 1180
        for _ in range(30):
            assert await world.send("alice", 5) == 5
            await asyncio.sleep(0.5)
        assert world.peer("alice")["failures"] == 0 and world.peer("alice")["rekeys"] >= 3

    play(story, quic=True, more=QUIC, rekey="4s", endpoints=("alice",))


def test_nothing_falls_back_that_is_not_told_to(play: Play) -> None:
    async def story(world: Any) -> None:
        world.make("alice", more=QUIC)
        world.make("bob", more='transport = "udp"')
        await world.start()
        await asyncio.sleep(30)
        assert {world.state(site) for site in world.daemons} == {"blocked"}
        assert world.peer("bob")["drops"]["handshake_carrier"] > 0

    play(story, quic=True, endpoints=("alice",))


def test_strangers_over_quic_move_nothing_and_leave_nothing(play: Play) -> None:
    """An outsider opens connections and sends whatever he likes in them, also what he recorded."""

    async def story(world: Any) -> None:
        recorded: list[bytes] = []
        await world.start()
        world.network.tap = lambda source, destination, data: recorded.append(data) if is_plain(data) else None
        await world.up()
        assert await world.send("alice", 5) == 5
        world.network.tap = None
        place = Address(ipaddress.ip_address("203.0.113.9"), 443)
        loop = asyncio.get_running_loop()
        stranger = QuicBind(world.network.bind(place), self_made("x"), lambda: world.network.now, loop.call_later)
        stranger.on_readable(lambda: stranger.receive_batch(16))
        bob = parse_peer(world.binds["bob"].local, {})
        for data in [*recorded[:200], b"", b"\x20", b"\x20\x00\x00\x01x", b"\xff" * 900, bytes(1170)]:
            stranger.send_batch([memoryview(data[:1370])], bob)
            await asyncio.sleep(0.02)
        assert world.status("bob")["carriers"]["quic"]["connections"] >= 1
        await asyncio.sleep(50)
        assert carriers(world) == {"udp"} and world.peer("bob")["carrier_changes"] == 0
        assert world.peer("bob")["endpoint"] == str(world.binds["alice"].local)
        assert await world.send("alice", 5) == await world.send("bob", 5) == 5
        assert world.status("bob")["carriers"]["quic"]["connections"] == 0
        stranger.close()

    play(story, quic=True, more=BOTH)
