"""Two daemons whose path carries less than their links: found by asking, in virtual time, with no ICMP at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from qvpn.netio.memory import Impairments
from qvpn.tunnel.drops import DropReason
from qvpn.wire.messages import ControlType

Play = Callable[..., None]


def narrow(world: Any, payload: int, loss: float = 0.0) -> None:
    world.network.impair_all(Impairments(delay=0.002, path_payload=payload, loss=loss))


def path(world: Any, site: str) -> dict[str, Any]:
    return world.peer(site)["path"]  # type: ignore[no-any-return]


def fitted(world: Any, site: str) -> list[int]:
    """What the daemon wanted its interface's MTU to follow, from now on."""
    wanted: list[int] = []
    world.daemons[site]._fit_mtu = lambda payloads: wanted.append(max(payloads))
    return wanted


def test_a_narrow_path_is_found_and_the_interface_follows(play: Play) -> None:
    async def story(world: Any) -> None:
        narrow(world, 1300)
        for site in ("alice", "bob"):
            world.make(site)
        wanted = fitted(world, "alice")
        await world.start()
        await world.up()
        found = path(world, "alice")
        assert (found["mtu"], found["found"]) == (1500, "link")
        await world.until(lambda: path(world, "alice")["found"] == path(world, "bob")["found"] == "probe", 6)
        found = path(world, "alice")
        assert (found["mtu"], found["inner_mtu"], found["link_mtu"]) == (1328, 1258, 1500)
        assert wanted[0] == 1472 and wanted[-1] == 1300 and 1200 not in wanted
        assert found["probes"] > found["answers"] > 0
        assert (
            not {"send_failed", "too_big"} & set(world.peer("alice")["drops"])
            and world.peer("alice")["sent_packets"] == 0
        )

    play(story)


def test_a_path_that_carries_all_is_known_after_one_round_trip(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        await world.until(lambda: path(world, "alice")["found"] == "probe", 1.0)
        assert (path(world, "alice")["mtu"], path(world, "alice")["probes"]) == (1500, 3)
        assert path(world, "alice")["falls"] == 0

    play(story)


def test_the_path_shrinks_under_traffic_and_heals_again(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        busy = True

        async def talk() -> None:
            while busy:
                await world.send("alice", 2)

        talker = asyncio.create_task(talk())
        await asyncio.sleep(5)
        assert path(world, "alice")["mtu"] == 1500
        narrow(world, 1250)
        await world.until(lambda: path(world, "alice")["mtu"] < 1500, 3.5)
        await world.until(lambda: path(world, "alice")["found"] == "probe", 4)
        assert (path(world, "alice")["mtu"], path(world, "alice")["falls"]) == (1278, 1)
        narrow(world, 1472)
        await world.until(lambda: path(world, "alice")["mtu"] == 1500, 40)
        busy = False
        await talker

    play(story)


def test_a_peer_of_an_older_version_ignores_probes_and_the_links_size_is_used(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        bob = world.daemons["bob"].agents["alice"]
        usual = bob.control

        def older(receive_index: int, payload: bytes, address: Any) -> Any:
            if payload[0] in (ControlType.PATH_PROBE, ControlType.PATH_ACK):
                return bob.machine.control(receive_index, payload, world.network.now)
            return usual(receive_index, payload, address)

        bob.control = older
        await world.up()
        assert await world.send("alice", 20) == 20
        await asyncio.sleep(120)
        assert await world.send("alice", 20) == 20
        assert (path(world, "alice")["mtu"], path(world, "alice")["found"]) == (1500, "link")
        assert world.peer("bob")["drops"][DropReason.CONTROL_MALFORMED] >= path(world, "alice")["probes"]
        assert path(world, "alice")["probes"] < 100

    play(story)


def test_answers_are_smaller_than_probes_and_a_replayed_probe_gets_none(play: Play) -> None:
    async def story(world: Any) -> None:
        alice, bob = (world.make(site) and world.binds[site].local for site in ("alice", "bob"))
        seen: list[tuple[Any, bytes]] = []
        world.network.tap = lambda source, to, data: seen.append((source, data))
        await world.start()
        await world.up()
        await world.until(lambda: path(world, "alice")["found"] == "probe", 1.0)
        probes = [data for source, data in seen if source == alice and data[0] == 0x10 and len(data) in (1200, 1472)]
        assert {len(data) for data in probes} == {1200, 1472}
        assert max(len(data) for source, data in seen if source == bob and data[0] == 0x10 and len(data) < 64) == 39
        before = path(world, "bob")["echoed"]
        for probe in probes * 100:
            world.network.inject(alice, bob, probe)
        await asyncio.sleep(1)
        assert path(world, "bob")["echoed"] == before
        assert world.peer("bob")["drops"][DropReason.REPLAY] == 200

    play(story)


def test_a_configured_mtu_stays_and_nothing_longer_is_tried(play: Play) -> None:
    async def story(world: Any) -> None:
        for site in ("alice", "bob"):
            config = world.make(site).config
            fixed = config.tunnel.model_copy(update={"mtu": 1300})
            world.daemons[site].config = config.model_copy(update={"tunnel": fixed})
        sizes: list[int] = []
        world.network.tap = lambda source, to, data: sizes.append(len(data))
        await world.start()
        await world.up()
        await world.until(lambda: path(world, "alice")["found"] == "probe", 1.0)
        assert path(world, "alice")["inner_mtu"] == 1300
        assert max(sizes) == 1342

    play(story)


def test_on_a_lossy_path_the_size_is_found_too(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        narrow(world, 1372, loss=0.2)
        search = world.daemons["alice"].agents["bob"].path.search
        search.moved(28, world.network.now)
        await world.until(
            lambda: path(world, "alice")["mtu"] == 1400 and path(world, "alice")["found"] == "probe", 90
        )

    play(story)
