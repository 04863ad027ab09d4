"""What the two files of crash tests share: where a point is met, and how often."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.network.world import NODES, World

LONG = os.environ.get("QVPN_TEST_LONG") == "1"
KILLS = 50
COST = 48
"""Units of one direction of a link, at most, that a kill may cost: a hop of two keys takes 6, a share is sent four
times, and a second block may be on its way before it is noticed that a node is down."""
WAYS = {
    "block.in-transaction": "b",
    "block.stored": "b",
    "pad.in-transaction": "ab",
    "pad.drawn": "ab",
    "share.sent": "ab",
    "share.asked": "bc",
    "share.in-transaction": "bc",
    "share.spent": "bc",
}
"""Points on the way, and the nodes that come to them."""
ENDS = {
    "proof.made": "c",
    "commit.in-transaction": "c",
    "commit.stored": "c",
    "prepare.in-transaction": "a",
    "prepare.stored": "a",
    "settle.in-transaction": "a",
    "settle.stored": "a",
    "delivered.stored": "ac",
}
"""Points at which the two ends decide, and hand out."""


@asynccontextmanager
async def a_world() -> AsyncIterator[World]:
    """For a whole file: nobody but the victim is started anew between kills."""
    with tempfile.TemporaryDirectory(prefix="qn") as name:  # short: sockets live in it
        world = World(Path(name))
        await world.start()
        try:
            for node in NODES:
                world.boot(node)
            await world.settled()
            yield world
        finally:
            await world.aclose()


async def killed_again_and_again(world: World, point: str, nodes: str) -> None:
    """Each of ``nodes`` in turn dies there, :data:`KILLS` times in all; one of them once in the quick run.

    A node that comes back is armed anew already, so that a kill costs one start; every other time it passes the point
    once before.  So much of the exchange has to work between two kills, and afterwards all of it is looked at.
    """
    for node in nodes if LONG else nodes[-1:]:
        before, kills = world.lost(), KILLS // len(nodes) if LONG else 1
        await world.kill(node)
        for kill in range(kills):
            await world.killed_at(node, point, 1 + kill % 2)
        world.boot(node)
        await world.settled()
        world.check()
        cost = {key: units - before[key] for key, units in world.lost().items()}
        assert max(cost.values()) <= COST * (kills + 1), f"{cost} units lost in {kills + 1} kills"
