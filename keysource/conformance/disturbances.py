"""What a key source does when it is restarted and when what it rests on is gone: for pairs that can show it."""

from __future__ import annotations

import asyncio

from keysource.base import Claiming, Key
from keysource.conformance.pairs import (
    PATIENCE,
    End,
    NotConforming,
    NotTested,
    Pair,
    PairFactory,
    is_a_key,
    is_a_status,
    refused,
    require,
    same,
    still_works,
)
from keysource.errors import KeySourceError

CALL_LIMIT = 5.0
"""Seconds after which a call must have answered while there is an outage."""


async def a_restart_gives_no_key_again(pair_factory: PairFactory) -> None:
    """Either end restarted: nothing that was drawn or fetched before comes again, new keys do."""
    async with pair_factory() as pair:
        seen: dict[str, bytes] = {}
        await _use(pair, seen)
        for end in "ab":
            await _restart(pair, end)
            _exchange_claims(pair)
            for who in pair.ends():
                for key_id in seen:
                    await refused(who, key_id, "a key of before the restart was given again")
            await _use(pair, seen)


async def an_outage_is_said_and_heals(pair_factory: PairFactory) -> None:
    """While it lasts: keys not seen before or ``KeySourceError``, in bounded time.  Afterwards: keys, none twice."""
    async with pair_factory() as pair:
        if pair.outage is None:
            raise NotTested("the pair has no outage()")
        seen: dict[str, bytes] = {}
        await _use(pair, seen)
        await pair.outage(True)
        for end in pair.ends():
            for _ in range(3):
                _note(await _draw_in_outage(end), seen)
                is_a_status(await end.source.status(end.peer))
        await pair.outage(False)
        await _until_both_ready(pair)
        _exchange_claims(pair)
        await _use(pair, seen)
        await still_works(pair)


async def _use(pair: Pair, seen: dict[str, bytes]) -> None:
    for end in pair.ends():
        for _ in range(3):
            key = await end.draw()
            if key is None:
                break
            _note(key, seen)
            same(key, await end.other.fetch(key.key_id))


def _note(key: Key | None, seen: dict[str, bytes]) -> None:
    if key is None:
        return
    require(key.key_id not in seen, "a key_ID was drawn twice")
    require(bytes(key.material) not in seen.values(), "two draws gave the same bytes")
    seen[key.key_id] = bytes(key.material)


async def _restart(pair: Pair, end: str) -> None:
    if pair.restart is None:
        raise NotTested("the pair has no restart()")
    if end == "a":
        pair.a = await pair.restart(pair.a)
    else:
        pair.b = await pair.restart(pair.b)
    await _until_both_ready(pair)


async def _until_both_ready(pair: Pair) -> None:
    deadline = asyncio.get_running_loop().time() + 2 * PATIENCE
    for end in pair.ends():
        while not (status := await end.source.status(end.peer)).ready:
            if asyncio.get_running_loop().time() > deadline:
                raise NotConforming(f"not ready again within {2 * PATIENCE:g} s: {status.reason}")
            await asyncio.sleep(0.05)


def _exchange_claims(pair: Pair) -> None:
    """As the handshake would do before the next draw."""
    for end in pair.ends():
        mine, theirs = end.source, end.other.source
        if isinstance(mine, Claiming) and isinstance(theirs, Claiming) and (claim := theirs.claim()):
            mine.check_claim(claim)


async def _draw_in_outage(end: End) -> Key | None:
    try:
        async with asyncio.timeout(CALL_LIMIT):
            key = await end.source.get_key(end.peer)
    except KeySourceError:
        return None
    except TimeoutError:
        raise NotConforming(f"no answer within {CALL_LIMIT:g} s during an outage") from None
    except Exception as error:
        raise NotConforming(f"{type(error).__name__} instead of a KeySourceError during an outage") from error
    is_a_key(key)
    return key
