"""The next block's pulses fly while this one is distilled, with a seed that is never used for two flights."""

from __future__ import annotations

import asyncio

import pytest

from keysource.qkd.engine.ahead import Ahead
from keysource.qkd.engine.frontends import Flown
from keysource.qkd.errors import LinkError, PeerLost


class Fibre:
    """A front end whose flights a test ends by hand."""

    pace, trouble, run, ready, looks_ahead = None, "", b"", True, True

    def __init__(self) -> None:
        self.flights: dict[int, asyncio.Future[None]] = {}
        self.seeds: list[bytes] = []
        self.cancelled: list[int] = []

    def start(self) -> None: ...
    async def aclose(self) -> None: ...

    async def fly(self, block: int, pulses: int, seed: bytes, patience: float | None) -> Flown:
        self.seeds.append(seed)
        self.flights[block] = asyncio.get_running_loop().create_future()
        try:
            await self.flights[block]
        except asyncio.CancelledError:
            self.cancelled.append(block)
            raise
        return None


async def begin(ahead: Ahead, fibre: Fibre, block: int) -> tuple[bytes, asyncio.Task[Flown]]:
    seed = await ahead.seed(block)
    task = asyncio.create_task(ahead.fly(block, 100, seed, 0.2))
    for _ in range(5):
        await asyncio.sleep(0)
    return seed, task


async def test_a_block_flies_while_the_one_before_it_is_distilled() -> None:
    fibre = Fibre()
    ahead = Ahead(fibre, lambda: True)
    _seed, task = await begin(ahead, fibre, 0)
    assert list(fibre.flights) == [0], "one at a time"
    fibre.flights[0].set_result(None)
    await task
    await asyncio.sleep(0)
    assert list(fibre.flights) == [0, 1], "block 1 flies, nobody has asked for it"
    fibre.flights[1].set_result(None)
    seed, task = await begin(ahead, fibre, 1)
    await task
    assert fibre.seeds[1] == seed and len(fibre.seeds) == 3, "no second flight of block 1; block 2 has begun"
    assert len(set(fibre.seeds)) == 3
    await ahead.aclose()
    assert fibre.cancelled == [2]


async def test_where_nothing_may_fly_ahead_nothing_does() -> None:
    fibre = Fibre()
    ahead = Ahead(fibre, lambda: False)
    _seed, task = await begin(ahead, fibre, 0)
    fibre.flights[0].set_result(None)
    await task
    await asyncio.sleep(0)
    assert list(fibre.flights) == [0]


async def test_a_flight_that_comes_to_nothing_takes_its_seed_with_it() -> None:
    fibre = Fibre()
    ahead = Ahead(fibre, lambda: True)
    _seed, task = await begin(ahead, fibre, 0)
    fibre.flights[0].set_result(None)
    await task
    await asyncio.sleep(0)
    old = fibre.seeds[1]
    seed, task = await begin(ahead, fibre, 2)
    assert seed != old and fibre.seeds[-1] == seed and len(fibre.seeds) == 3
    fibre.flights[2].set_result(None)
    await task
    await ahead.aclose()


async def test_a_flight_ahead_that_failed_ends_the_session() -> None:
    """The other end's settings of that block may have flown: no second try under this session's name."""
    fibre = Fibre()
    ahead = Ahead(fibre, lambda: True)
    _seed, task = await begin(ahead, fibre, 0)
    fibre.flights[0].set_result(None)
    await task
    await asyncio.sleep(0)
    fibre.flights[1].set_exception(PeerLost("gone"))
    await asyncio.sleep(0)
    with pytest.raises(LinkError, match="lost on the way"):
        await ahead.seed(1)
    assert len(fibre.seeds) == 2


async def test_a_flight_ahead_that_never_ends_is_given_up_after_the_patience() -> None:
    fibre = Fibre()
    ahead = Ahead(fibre, lambda: True)
    _seed, task = await begin(ahead, fibre, 0)
    fibre.flights[0].set_result(None)
    await task
    _seed, task = await begin(ahead, fibre, 1)
    with pytest.raises(LinkError, match="did not finish block 1"):
        await task
    await ahead.aclose()
    assert fibre.cancelled == [1]
