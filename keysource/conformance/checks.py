"""What every key source must do, with nothing but its two ends."""

from __future__ import annotations

import asyncio
import uuid

from keysource.base import Claiming, Key, SaePair
from keysource.conformance.pairs import (
    AT_ONCE,
    DRAWS,
    NotConforming,
    Pair,
    PairFactory,
    draw_many,
    hides,
    is_a_key,
    is_a_status,
    refused,
    refused_when_closed,
    require,
    same,
    still_works,
)
from keysource.errors import BadAnswer, KeySourceError

STRANGE_NAMES = ("", "x" * 300, "no/such?peer#%", "\0", "\ud800", "s\u00e4e")
CALL_LIMIT = 5.0
"""Seconds after which a call must have answered, whatever it was asked."""


async def both_ends_have_equal_keys(pair_factory: PairFactory) -> None:
    """What one end draws the other fetches by its key_ID, with the same bytes, origin and hops."""
    async with pair_factory() as pair:
        issued = 0
        for end in pair.ends():
            seen: list[bytes] = []
            for _ in range(3):
                if (key := await end.draw()) is None:
                    break
                issued += 1
                is_a_key(key)
                require(bytes(key.material) not in seen, "two draws gave the same bytes")
                seen.append(bytes(key.material))
                same(key, await end.other.fetch(key.key_id))
        require(issued >= 3, "neither end issues keys")


async def a_key_is_given_once(pair_factory: PairFactory) -> None:
    """A second fetch fails, and so does fetching by key_ID at the end that drew."""
    async with pair_factory() as pair:
        for end in pair.ends():
            if (key := await end.draw()) is None:
                continue
            await refused(end, key.key_id, "the end that drew a key gave it again by its key_ID")
            await end.other.fetch(key.key_id)
            await refused(end.other, key.key_id, "a key was fetched twice")
            await refused(end, key.key_id, "a key came back at the end that drew it")


async def unknown_key_ids_are_refused(pair_factory: PairFactory) -> None:
    """``UnknownKeyID`` and nothing worse, and the source goes on."""
    async with pair_factory() as pair:
        await still_works(pair)
        for end in pair.ends():
            for key_id in (str(uuid.uuid4()), "0", "no such key", "../../etc/passwd", "Z" * 64):
                await refused(end, key_id, "a key for a key_ID that nobody drew")
        await still_works(pair)


async def concurrent_draws_share_no_key(pair_factory: PairFactory, draws: int = 2 * DRAWS) -> None:
    """``draws`` draws in all, both ends at once: no key_ID and no key twice, all equal at the other end."""
    async with pair_factory() as pair:
        halves = await asyncio.gather(*(draw_many(end, draws // 2) for end in pair.ends()))
        keys = [key for half in halves for key in half]
        require(len(keys) >= draws // 2, f"{len(keys)} keys of {draws}")
        require(len({key.key_id for key in keys}) == len(keys), "one key_ID was drawn twice")
        require(len({bytes(key.material) for key in keys}) == len(keys), "two key_IDs have the same bytes")
        for end, half in zip(pair.ends(), halves, strict=True):
            for first in range(0, len(half), AT_ONCE):
                some = half[first : first + AT_ONCE]
                fetched = await asyncio.gather(*(end.other.fetch(key.key_id) for key in some))
                for key, copy in zip(some, fetched, strict=True):
                    same(key, copy)


async def cancelling_returns_no_key(pair_factory: PairFactory) -> None:
    """Draws cancelled at every early moment: what is drawn beside and after them is still drawn once."""
    async with pair_factory() as pair:
        for end in pair.ends():
            given: list[Key] = []
            for turns in range(DRAWS // 4):
                task = asyncio.create_task(end.source.get_key(end.peer))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                beside = await end.draw()
                [result] = await asyncio.gather(task, return_exceptions=True)
                given += [key for key in (result, beside) if isinstance(key, Key)]
            require(len({key.key_id for key in given}) == len(given), "a cancelled draw put its key back")
            for key in given:
                same(key, await end.other.fetch(key.key_id))
        await _cancelled_fetches(pair)


async def _cancelled_fetches(pair: Pair) -> None:
    for end in pair.ends():
        for turns in range(DRAWS // 4):
            if (key := await end.draw()) is None:
                break
            task = asyncio.create_task(end.other.source.get_key_with_id(end.other.peer, key.key_id))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            [first] = await asyncio.gather(task, return_exceptions=True)
            if isinstance(first, Key):
                await refused(end.other, key.key_id, "a key was fetched twice, the first time beside a cancel")
    await still_works(pair)


async def texts_hide_the_key(pair_factory: PairFactory) -> None:
    """No key bytes in ``repr`` or ``str`` of key, source, status and errors, in any usual notation."""
    async with pair_factory() as pair:
        for end in pair.ends():
            if (key := await end.draw()) is None:
                continue
            material = bytes(key.material)
            await end.other.fetch(key.key_id)
            texts: list[object] = [key, end.source, await end.source.status(end.peer), end.source.sae_pair(end.peer)]
            for who in (end, end.other):
                try:
                    await who.source.get_key_with_id(who.peer, key.key_id)
                except KeySourceError as error:
                    texts += [error, error.args, error.__cause__]
            hides(material, texts)
            key.wipe()
            require(not any(key.material), "wipe() leaves the key")


async def status_tells_and_consumes_nothing(pair_factory: PairFactory) -> None:
    """The right types, both ends' SAE names mirrored, and asking costs nothing."""
    async with pair_factory() as pair:
        await still_works(pair)
        left, right = pair.a.sae_pair(pair.sae_b), pair.b.sae_pair(pair.sae_a)
        require(left == SaePair(right.remote, right.local), "the ends do not mirror each other's SAE names")
        for end in pair.ends():
            first = await end.source.status(end.peer)
            for _ in range(5):
                status = await end.source.status(end.peer)
                is_a_status(status)
            require(status.ready, f"not ready although it gives keys: {status.reason}")
            if first.stored_keys is not None and status.stored_keys is not None:
                require(status.stored_keys >= first.stored_keys, "asking for the status consumed keys")
            if key := await end.draw():
                require(status.origin in (None, key.origin), "status and key tell different origins")


async def closing_twice_is_fine_and_final(pair_factory: PairFactory) -> None:
    """After ``aclose`` no more keys, no hang, no other kind of error."""
    async with pair_factory() as pair:
        await still_works(pair)
        for end in pair.ends():
            await end.source.aclose()
            await end.source.aclose()
            await refused_when_closed(end.source.get_key(end.peer))
            await refused_when_closed(end.source.get_key_with_id(end.peer, str(uuid.uuid4())))
            require(not (await end.source.status(end.peer)).ready, "a closed source says that it is ready")


async def claims_fit(pair_factory: PairFactory) -> None:
    """Only for a ``Claiming`` source: the ends accept each other's claims after use, and refuse noise."""
    async with pair_factory() as pair:
        await still_works(pair)
        for end in pair.ends():
            mine, theirs = end.source, end.other.source
            if not isinstance(mine, Claiming) or not isinstance(theirs, Claiming):
                continue
            claim = theirs.claim()
            require(len(claim) <= 64, "a claim of more than 64 bytes")
            mine.check_claim(claim)
            for noise in (b"", bytes(64), claim + b"x", claim[:-1]):
                try:
                    mine.check_claim(noise)
                except BadAnswer:
                    continue
                raise NotConforming("noise was accepted as a claim")


async def strange_arguments_raise_key_source_errors(pair_factory: PairFactory) -> None:
    """A peer or key_ID of any form: a ``KeySourceError`` in bounded time, and the source goes on."""
    async with pair_factory() as pair:
        for end in pair.ends():
            for name in STRANGE_NAMES:
                for call in (
                    end.source.get_key_with_id(end.peer, name),
                    end.source.get_key_with_id(name, str(uuid.uuid4())),
                ):
                    try:
                        async with asyncio.timeout(CALL_LIMIT):
                            await call
                    except KeySourceError:
                        continue
                    except TimeoutError:
                        raise NotConforming(f"no answer within {CALL_LIMIT:g} s to a strange argument") from None
                    except Exception as error:
                        raise NotConforming(f"{type(error).__name__} instead of a KeySourceError") from error
                    raise NotConforming("a key for a strange argument")
        await still_works(pair)
