"""``qvpn alarm`` at a running pair of daemons, the warning of a dry stock, and the status of a source's parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keysource.alarm import with_alarm
from qvpn.handshake.parameters import KeyMaterial
from qvpn.wire.messages import WireOrigin
from tests.unit.daemon.conftest import BoxSource

Play = Callable[..., None]


def armed(world: Any, folder: Path) -> None:
    world.make("alice", source=with_alarm(BoxSource(world.box, "alice"), "box", folder))


def test_an_operators_alarm_blocks_at_once_and_its_end_heals(play: Play, tmp_path: Path) -> None:
    async def story(world: Any) -> None:
        armed(world, tmp_path)
        await world.start()
        await world.up()
        world.daemons["alice"].order_alarm({"source": "box", "active": True, "reason": "QBER at the box"})
        await world.until(lambda: world.state("alice") == "blocked", within=1.0)
        assert await world.send("alice", 5) == 0
        [source] = world.status("alice")["key_sources"]
        assert (source["ready"], source["alarm"]) == (False, "raised by the operator: QBER at the box")
        await asyncio.sleep(60)
        assert world.state("alice") == "blocked"
        world.daemons["alice"].order_alarm({"source": "box", "active": False})
        await world.up(within=60)
        assert await world.send("alice", 5) == 5

    play(story, more='on_alarm = "block-now"')


def test_a_key_held_from_before_an_alarm_is_not_offered_after_it(play: Play, tmp_path: Path) -> None:
    async def story(world: Any) -> None:
        armed(world, tmp_path)
        await world.start()
        await world.up()
        [agent] = world.daemons["alice"].agents.values()
        keys, held = agent.machine._core.keys, KeyMaterial("held", WireOrigin.QKD, 0, bytearray(b"h" * 32))
        keys.hold_drawn(held, agent._clock())
        await asyncio.sleep(1)
        world.daemons["alice"].order_alarm({"source": "box", "active": True, "reason": "x"})
        await asyncio.sleep(1)
        assert keys.take_drawn(agent._clock()) is None
        assert not any(held.material)

    play(story)


def test_with_finish_epoch_it_ends_at_the_hard_end(play: Play, tmp_path: Path) -> None:
    async def story(world: Any) -> None:
        armed(world, tmp_path)
        await world.start()
        await world.up()
        world.daemons["alice"].order_alarm({"source": "box", "active": True, "reason": "x"})
        await asyncio.sleep(5)
        assert world.state("alice") == "qkd"
        await asyncio.sleep(35)
        assert world.state("alice") == "blocked"

    play(story)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"source": "nobody", "active": True, "reason": "x"},
        {"source": "box", "active": "yes", "reason": "x"},
        {"source": "box", "active": True},
        {"source": "box", "active": True, "reason": "a\nb"},
    ],
)
def test_a_wrong_order_is_refused_with_a_sentence(play: Play, tmp_path: Path, request_: dict[str, object]) -> None:
    async def story(world: Any) -> None:
        armed(world, tmp_path)
        await world.start()
        with pytest.raises(ValueError, match=r"no such key source|active|printable"):
            world.daemons["alice"].order_alarm(request_)

    play(story)


def test_a_stock_that_runs_dry_is_warned_of_once(play: Play) -> None:
    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        source = world.sources["alice"]
        whole = source.status

        async def few(peer_sae: str) -> Any:
            return replace(await whole(peer_sae), stored_keys=7)

        source.status = few
        await asyncio.sleep(60)
        [warning] = world.events("alice", "keys run out")
        assert (warning["source"], warning["stored"], warning["lasts_seconds"]) == ("box", 7, 70)
        assert world.status("alice")["key_sources"][0]["lasts"] == 70

    play(story)


def short_of_keys(world: Any, site: str, left: int) -> None:
    """From now on the source says that this many keys are left, and that none comes."""
    source = world.sources[site]
    [feed] = world.daemons[site]._feeds.values()
    whole = source.status

    async def few(peer_sae: str) -> Any:
        return replace(await whole(peer_sae), stored_keys=left - feed.drawn, key_rate=0.0)

    source.status = few


@pytest.mark.parametrize("short", [(), ("alice",), ("alice", "bob")], ids=["plenty", "one end", "both ends"])
def test_epochs_move_apart_while_keys_are_short(play: Play, short: tuple[str, ...]) -> None:
    """hard_end = 60 s lets a rekey of 10 s become one of 28.5 s, and an end that has keys steps in for the other."""

    async def story(world: Any) -> None:
        await world.start()
        await world.up()
        for site in short:
            short_of_keys(world, site, 40)
        await asyncio.sleep(30)
        before = world.peer("alice")["epochs"]
        await asyncio.sleep(300)
        made = world.peer("alice")["epochs"] - before
        assert world.state("alice") == "qkd"
        assert made in {0: range(28, 36), 1: range(24, 36), 2: range(9, 13)}[len(short)]

    play(story, more='hard_end = "60s"')
