"""Is it a key source?  A suite for any :class:`~keysource.base.KeySource`, ours and yours.

Write a *pair factory*: an asynchronous context manager that gives both ends of a fresh pair, started, and closes
them afterwards.  Then, with pytest::

    @asynccontextmanager
    async def my_pair(folder):
        ...
        yield Pair(left, right, "sae-left", "sae-right")

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_my_source(check, tmp_path):
        await check(partial(my_pair, tmp_path))

or without: ``asyncio.run(run_all(my_pair))``.  A check raises :class:`NotConforming` with a sentence.  Each end must
be able to issue at least ``DRAWS`` keys (the check of concurrent draws takes ``draws`` as an argument); keys may
come while the check runs.  Where all keys belong to one end, the other raises ``NotOwner`` and the suite goes by
that.
"""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from keysource.base import KEY_BYTES, Claiming, Hop, Key, KeySource, Origin, SaePair, SourceStatus
from keysource.errors import BadAnswer, KeySourceError, NotOwner, Unauthorized, Unavailable, UnknownKeyID

DRAWS = 40
AT_ONCE = 50
"""Calls of one end that wait at the same time."""
PATIENCE = 10.0
"""Seconds that a key may take to arrive at an end."""


class NotConforming(AssertionError):
    """What the source did and should not."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Both ends, started.  ``sae_a`` is how b's configuration calls a."""

    a: KeySource
    b: KeySource
    sae_a: str = "sae-a"
    sae_b: str = "sae-b"

    def ends(self) -> list[End]:
        left, right = End(self.a, self.sae_b), End(self.b, self.sae_a)
        left.other, right.other = right, left
        return [left, right]


PairFactory = Callable[[], AbstractAsyncContextManager[Pair]]
Check = Callable[[PairFactory], Awaitable[None]]


class End:
    """One end with patience: a key may still be on its way."""

    other: End

    def __init__(self, source: KeySource, peer: str) -> None:
        self.source, self.peer = source, peer

    async def draw(self) -> Key | None:
        """A key, or None where the other end issues all of them."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while True:
            try:
                return await self.source.get_key(self.peer)
            except NotOwner:
                return None
            except Unavailable as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise NotConforming(f"no key within {PATIENCE} s: {error}") from None
            await asyncio.sleep(0.02)

    async def fetch(self, key_id: str) -> Key:
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while True:
            try:
                return await self.source.get_key_with_id(self.peer, key_id)
            except (UnknownKeyID, Unavailable) as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise NotConforming(f"a key that one end drew is not at the other: {error}") from None
            await asyncio.sleep(0.02)


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
                _is_a_key(key)
                _require(bytes(key.material) not in seen, "two draws gave the same bytes")
                seen.append(bytes(key.material))
                _same(key, await end.other.fetch(key.key_id))
        _require(issued >= 3, "neither end issues keys")


async def a_key_is_given_once(pair_factory: PairFactory) -> None:
    """A second fetch fails, and so does fetching by key_ID at the end that drew."""
    async with pair_factory() as pair:
        for end in pair.ends():
            if (key := await end.draw()) is None:
                continue
            await _refused(end, key.key_id, "the end that drew a key gave it again by its key_ID")
            await end.other.fetch(key.key_id)
            await _refused(end.other, key.key_id, "a key was fetched twice")
            await _refused(end, key.key_id, "a key came back at the end that drew it")


async def unknown_key_ids_are_refused(pair_factory: PairFactory) -> None:
    """``UnknownKeyID`` and nothing worse, and the source goes on."""
    async with pair_factory() as pair:
        await _still_works(pair)
        for end in pair.ends():
            for key_id in (str(uuid.uuid4()), "0", "no such key", "../../etc/passwd", "Z" * 64):
                await _refused(end, key_id, "a key for a key_ID that nobody drew")
        await _still_works(pair)


async def concurrent_draws_share_no_key(pair_factory: PairFactory, draws: int = 2 * DRAWS) -> None:
    """``draws`` draws in all, both ends at once: no key_ID and no key twice, all equal at the other end."""
    async with pair_factory() as pair:
        halves = await asyncio.gather(*(_draw_many(end, draws // 2) for end in pair.ends()))
        keys = [key for half in halves for key in half]
        _require(len(keys) >= draws // 2, f"{len(keys)} keys of {draws}")
        _require(len({key.key_id for key in keys}) == len(keys), "one key_ID was drawn twice")
        _require(len({bytes(key.material) for key in keys}) == len(keys), "two key_IDs have the same bytes")
        for end, half in zip(pair.ends(), halves, strict=True):
            for first in range(0, len(half), AT_ONCE):
                some = half[first : first + AT_ONCE]
                fetched = await asyncio.gather(*(end.other.fetch(key.key_id) for key in some))
                for key, copy in zip(some, fetched, strict=True):
                    _same(key, copy)


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
            _require(len({key.key_id for key in given}) == len(given), "a cancelled draw put its key back")
            for key in given:
                _same(key, await end.other.fetch(key.key_id))
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
                await _refused(end.other, key.key_id, "a key was fetched twice, the first time beside a cancel")
    await _still_works(pair)


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
            _hides(material, texts)
            key.wipe()
            _require(not any(key.material), "wipe() leaves the key")


async def status_tells_and_consumes_nothing(pair_factory: PairFactory) -> None:
    """The right types, both ends' SAE names mirrored, and asking costs nothing."""
    async with pair_factory() as pair:
        await _still_works(pair)
        left, right = pair.a.sae_pair(pair.sae_b), pair.b.sae_pair(pair.sae_a)
        _require(left == SaePair(right.remote, right.local), "the ends do not mirror each other's SAE names")
        for end in pair.ends():
            first = await end.source.status(end.peer)
            for _ in range(5):
                status = await end.source.status(end.peer)
                _is_a_status(status)
            _require(status.ready, f"not ready although it gives keys: {status.reason}")
            if first.stored_keys is not None and status.stored_keys is not None:
                _require(status.stored_keys >= first.stored_keys, "asking for the status consumed keys")
            if key := await end.draw():
                _require(status.origin in (None, key.origin), "status and key tell different origins")


async def closing_twice_is_fine_and_final(pair_factory: PairFactory) -> None:
    """After ``aclose`` no more keys, no hang, no other kind of error."""
    async with pair_factory() as pair:
        await _still_works(pair)
        for end in pair.ends():
            await end.source.aclose()
            await end.source.aclose()
            await _refused_when_closed(end.source.get_key(end.peer))
            await _refused_when_closed(end.source.get_key_with_id(end.peer, str(uuid.uuid4())))
            _require(not (await end.source.status(end.peer)).ready, "a closed source says that it is ready")


async def claims_fit(pair_factory: PairFactory) -> None:
    """Only for a ``Claiming`` source: the ends accept each other's claims after use, and refuse noise."""
    async with pair_factory() as pair:
        await _still_works(pair)
        for end in pair.ends():
            mine, theirs = end.source, end.other.source
            if not isinstance(mine, Claiming) or not isinstance(theirs, Claiming):
                continue
            claim = theirs.claim()
            _require(len(claim) <= 64, "a claim of more than 64 bytes")
            mine.check_claim(claim)
            for noise in (b"", bytes(64), claim + b"x", claim[:-1]):
                try:
                    mine.check_claim(noise)
                except BadAnswer:
                    continue
                raise NotConforming("noise was accepted as a claim")


CHECKS: tuple[Check, ...] = (
    both_ends_have_equal_keys,
    a_key_is_given_once,
    unknown_key_ids_are_refused,
    concurrent_draws_share_no_key,
    cancelling_returns_no_key,
    texts_hide_the_key,
    status_tells_and_consumes_nothing,
    closing_twice_is_fine_and_final,
    claims_fit,
)


async def run_all(pair_factory: PairFactory) -> list[str]:
    """Every check on a fresh pair; gives their names.  Raises :class:`NotConforming` at the first that fails."""
    for check in CHECKS:
        try:
            await check(pair_factory)
        except NotConforming as error:
            raise NotConforming(f"{getattr(check, '__name__', check)}: {error}") from None
    return [getattr(check, "__name__", str(check)) for check in CHECKS]


async def _draw_many(end: End, count: int) -> list[Key]:
    """``count`` draws, :data:`AT_ONCE` at a time, in the order in which they came: a slave follows its master, and a
    source may forget what was drawn thousands of keys ago."""
    keys: list[Key | None] = []

    async def draw_in_turn(share: int) -> None:
        for _ in range(share):
            key = await end.draw()
            keys.append(key)

    shares = [len(range(first, count, AT_ONCE)) for first in range(AT_ONCE)]
    await asyncio.gather(*map(draw_in_turn, shares))
    return [key for key in keys if key is not None]


async def _still_works(pair: Pair) -> None:
    keys = [(end, key) for end in pair.ends() if (key := await end.draw()) is not None]
    _require(bool(keys), "neither end issues keys")
    for end, key in keys:
        _same(key, await end.other.fetch(key.key_id))


async def _refused(end: End, key_id: str, otherwise: str) -> None:
    try:
        await end.source.get_key_with_id(end.peer, key_id)
    except (UnknownKeyID, Unauthorized):
        return
    raise NotConforming(otherwise)


async def _refused_when_closed(call: Awaitable[Key]) -> None:
    try:
        await call
    except KeySourceError:
        return
    raise NotConforming("a closed source gave a key")


def _is_a_key(key: Key) -> None:
    _require(isinstance(key.material, bytearray), "key.material is not a bytearray: it cannot be wiped")
    _require(len(key.material) == KEY_BYTES, f"a key of {len(key.material)} bytes")
    _require(any(key.material), "a key of zeros")
    _require(1 <= len(key.key_id) <= 64 and key.key_id.isascii() and key.key_id.isprintable(), "a malformed key_ID")
    _require(isinstance(key.origin, Origin) and key.hops >= 0, "a key without origin or with negative hops")


def _same(drawn: Key, fetched: Key) -> None:
    _is_a_key(fetched)
    _require(drawn.key_id == fetched.key_id, "the key fetched has another key_ID")
    _require(drawn.material == fetched.material, "both ends have different bytes for one key_ID")
    _require((drawn.origin, drawn.hops) == (fetched.origin, fetched.hops), "the ends tell different origins or hops")


def _is_a_status(status: SourceStatus) -> None:
    _require(status.ready is (not status.reason), "status needs a reason exactly where it is not ready")
    _require(isinstance(status.hop, Hop), "status.hop is no Hop")
    for name in ("stored_keys", "key_rate", "qber"):
        value = getattr(status, name)
        _require(value is None or value >= 0, f"status.{name} is negative")


def _hides(material: bytes, texts: Iterable[object]) -> None:
    spellings = (
        material.hex(),
        base64.b64encode(material).decode(),
        base64.urlsafe_b64encode(material).decode(),
        repr(material)[2:-1],
        str(list(material))[1:-1],
    )
    for text in texts:
        for said in (str(text), repr(text)):
            low = said.lower()
            _require(not any(part in said or part.lower() in low for part in spellings), "a key stands in a text")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotConforming(otherwise)
