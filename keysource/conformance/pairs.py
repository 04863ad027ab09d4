"""A pair of key sources under test, and the questions that every check asks."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from keysource.base import KEY_BYTES, Hop, Key, KeySource, Origin, SourceStatus
from keysource.errors import KeySourceError, NotOwner, Unauthorized, Unavailable, UnknownKeyID

DRAWS = 40
AT_ONCE = 50
"""Calls of one end that wait at the same time."""
PATIENCE = 10.0
"""Seconds that a key may take to arrive at an end."""


class NotConforming(AssertionError):
    """What the source did and should not."""


class NotTested(Exception):
    """The pair gives no means for this check."""


@dataclass(slots=True)
class Pair:
    """Both ends, started.  ``sae_a`` is how b's configuration calls a."""

    a: KeySource
    b: KeySource
    sae_a: str = "sae-a"
    sae_b: str = "sae-b"
    restart: Callable[[KeySource], Awaitable[KeySource]] | None = None
    """Optional.  Close this end as a stopped daemon would, and give a new one, started, over the same settings and
    state.  The pair closes it in the end."""
    outage: Callable[[bool], Awaitable[None]] | None = None
    """Optional.  True: take away what both ends rest on (stop the server, cut the link), False: bring it back."""

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


async def draw_many(end: End, count: int) -> list[Key]:
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


async def still_works(pair: Pair) -> None:
    keys = [(end, key) for end in pair.ends() if (key := await end.draw()) is not None]
    require(bool(keys), "neither end issues keys")
    for end, key in keys:
        same(key, await end.other.fetch(key.key_id))


async def refused(end: End, key_id: str, otherwise: str) -> None:
    try:
        await end.source.get_key_with_id(end.peer, key_id)
    except (UnknownKeyID, Unauthorized):
        return
    raise NotConforming(otherwise)


async def refused_when_closed(call: Awaitable[Key]) -> None:
    try:
        await call
    except KeySourceError:
        return
    raise NotConforming("a closed source gave a key")


def is_a_key(key: Key) -> None:
    require(isinstance(key.material, bytearray), "key.material is not a bytearray: it cannot be wiped")
    require(len(key.material) == KEY_BYTES, f"a key of {len(key.material)} bytes")
    require(any(key.material), "a key of zeros")
    require(1 <= len(key.key_id) <= 64 and key.key_id.isascii() and key.key_id.isprintable(), "a malformed key_ID")
    require(isinstance(key.origin, Origin) and key.hops >= 0, "a key without origin or with negative hops")


def same(drawn: Key, fetched: Key) -> None:
    is_a_key(fetched)
    require(drawn.key_id == fetched.key_id, "the key fetched has another key_ID")
    require(drawn.material == fetched.material, "both ends have different bytes for one key_ID")
    require((drawn.origin, drawn.hops) == (fetched.origin, fetched.hops), "the ends tell different origins or hops")


def is_a_status(status: SourceStatus) -> None:
    require(status.ready is (not status.reason), "status needs a reason exactly where it is not ready")
    require(isinstance(status.hop, Hop), "status.hop is no Hop")
    for name in ("stored_keys", "key_rate", "qber"):
        value = getattr(status, name)
        require(value is None or value >= 0, f"status.{name} is negative")


def hides(material: bytes, texts: Iterable[object]) -> None:
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
            require(not any(part in said or part.lower() in low for part in spellings), "a key stands in a text")


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotConforming(otherwise)
