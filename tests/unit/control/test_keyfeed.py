"""Whatever a key source does, the machine gets one answer in time, and no key is left unwiped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import structlog

from keysource.base import Key, Origin, SaePair, SourceStatus
from keysource.errors import (
    BadAnswer,
    BadSettings,
    Exhausted,
    KeySourceError,
    NotOwner,
    RepeatedKey,
    RolledBack,
    Unauthorized,
    Unavailable,
    UnknownKeyID,
)
from qvpn.control.keyfeed import KeyFeed
from qvpn.handshake.events import NeedKey, Role
from qvpn.handshake.parameters import KeyFault, KeyMaterial
from qvpn.status import key_id_hash
from qvpn.wire.messages import KeyName, WireOrigin

ID = "0b0c1a52-55dc-8d6e-9b1e-1d5b1d2f3a4c"


def key(key_id: str = ID, material: bytes = b"k" * 32, hops: int = 0, origin: Origin = Origin.QKD) -> Key:
    return Key(key_id, bytearray(material), origin, hops)


class Source:
    """Answers with what the test says."""

    def __init__(self, answer: Callable[[], Awaitable[Key]]) -> None:
        self.answer = answer
        self.calls: list[tuple[str, str | None]] = []

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    def sae_pair(self, peer_sae: str) -> SaePair:
        return SaePair("us", peer_sae)

    async def status(self, peer_sae: str) -> SourceStatus:
        await self.answer()
        return SourceStatus(True)

    async def get_key(self, peer_sae: str) -> Key:
        self.calls.append((peer_sae, None))
        return await self.answer()

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        self.calls.append((peer_sae, key_id))
        return await self.answer()


class ClaimingSource(Source):
    def __init__(self, answer: Callable[[], Awaitable[Key]], refuse: Exception | None = None) -> None:
        super().__init__(answer)
        self.refuse = refuse
        self.checked: list[bytes] = []

    def claim(self) -> bytes:
        return b"here"

    def check_claim(self, claim: bytes) -> None:
        self.checked.append(claim)
        if self.refuse is not None:
            raise self.refuse


def gives(value: Key | Exception) -> Callable[[], Awaitable[Key]]:
    async def answer() -> Key:
        if isinstance(value, Exception):
            raise value
        return value

    return answer


async def ask(source: Source, need: NeedKey, limit: float = 2.0) -> tuple[int, KeyMaterial | KeyFault]:
    answered: asyncio.Future[tuple[int, KeyMaterial | KeyFault]] = asyncio.get_running_loop().create_future()
    feed = KeyFeed("kme", source, "sae-bob", lambda *it: answered.set_result(it), structlog.get_logger(), limit=limit)
    feed.ask(need)
    try:
        return await answered
    finally:
        await feed.aclose()


DRAW = NeedKey(7, Role.INITIATOR, None)
FETCH = NeedKey(8, Role.RESPONDER, KeyName("main", ID, WireOrigin.QKD, 0))


async def test_a_drawn_key_becomes_material() -> None:
    source = Source(gives(key(hops=2, origin=Origin.RELAYED)))
    request, answer = await ask(source, DRAW)
    assert (request, source.calls) == (7, [("sae-bob", None)])
    assert answer == KeyMaterial(ID, WireOrigin.RELAYED, 2, bytearray(b"k" * 32))


async def test_a_fetched_key_is_asked_for_by_its_name() -> None:
    source = Source(gives(key()))
    request, answer = await ask(source, FETCH)
    assert (request, source.calls) == (8, [("sae-bob", ID)])
    assert isinstance(answer, KeyMaterial)


@pytest.mark.parametrize("origin", list(Origin))
async def test_every_origin_has_its_number(origin: Origin) -> None:
    _, answer = await ask(Source(gives(key(origin=origin))), DRAW)
    assert isinstance(answer, KeyMaterial)
    assert answer.origin.name.lower() == origin.value


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (Unavailable("timeout"), KeyFault.BROKEN),
        (Unavailable("503", answered=True), KeyFault.UNAVAILABLE),
        (Exhausted("empty"), KeyFault.UNAVAILABLE),
        (NotOwner("theirs"), KeyFault.UNAVAILABLE),
        (UnknownKeyID("gone"), KeyFault.UNKNOWN),
        (Unauthorized("401"), KeyFault.UNAUTHORISED),
        (RolledBack("backup"), KeyFault.ROLLED_BACK),
        (BadAnswer("not JSON"), KeyFault.BROKEN),
        (RepeatedKey("again"), KeyFault.REPEATED),
        (BadSettings("odd"), KeyFault.BROKEN),
        (KeySourceError("else"), KeyFault.BROKEN),
        (ZeroDivisionError("a third party's mistake"), KeyFault.BROKEN),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_becomes_the_fault_that_the_protocol_knows(error: Exception, fault: KeyFault) -> None:
    assert await ask(Source(gives(error)), DRAW) == (7, fault)


@pytest.mark.parametrize(
    "bad",
    [
        key(material=b"k" * 31),
        key(material=b"k" * 33),
        key(material=bytes(32)),
        key(key_id="another"),
        key(key_id=""),
        key(key_id="x" * 65),
        key(key_id="line\nbreak"),
        key(key_id="a space"),
        key(key_id="schl\xfcssel"),
        key(key_id="delete\x7f"),
        key(hops=256),
        key(hops=-1),
    ],
)
async def test_an_unusable_key_is_refused_and_wiped(bad: Key) -> None:
    assert await ask(Source(gives(bad)), FETCH) == (8, KeyFault.BROKEN)
    assert not any(bad.material)


@pytest.mark.parametrize(
    "odd",
    [
        None,
        b"k" * 32,
        Key(ID, b"k" * 32, Origin.QKD),  # type: ignore[arg-type]
        Key(7, bytearray(b"k" * 32), Origin.QKD),  # type: ignore[arg-type]
        Key(ID, bytearray(b"k" * 32), "qkd"),  # type: ignore[arg-type]
        Key(ID, bytearray(b"k" * 32), Origin.QKD, None),  # type: ignore[arg-type]
    ],
    ids=["none", "bytes", "bytes inside", "number", "origin", "hops"],
)
async def test_what_is_no_key_is_answered_all_the_same(odd: Any) -> None:
    """The machine overwrites the bytes of a key: what cannot be overwritten never gets there."""
    assert await ask(Source(gives(odd)), FETCH) == (8, KeyFault.BROKEN)
    assert not isinstance(odd, Key) or not isinstance(odd.material, bytearray) or not any(odd.material)


async def test_a_source_that_is_not_even_asynchronous_is_answered() -> None:
    class Plain(Source):
        def get_key(self, peer_sae: str) -> Any:  # type: ignore[override]
            raise IndexError

    assert await ask(Plain(gives(key())), DRAW) == (7, KeyFault.BROKEN)


async def test_a_source_that_hangs_is_given_up_and_its_late_key_wiped() -> None:
    late = key()
    release = asyncio.Event()

    async def stubborn() -> Key:
        try:
            await release.wait()
        except asyncio.CancelledError:
            await release.wait()  # a source that does not want to be cancelled
        return late

    assert await ask(Source(stubborn), FETCH, limit=0.01) == (8, KeyFault.BROKEN)
    assert any(late.material)
    release.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(late.material)


class Late:
    """A feed whose source answers when the test says so, even if it is cancelled; what the feed delivered."""

    def __init__(self, late: Key | Exception, late_limit: float = 60.0) -> None:
        self.release = asyncio.Event()
        self.delivered: list[tuple[int, KeyMaterial | KeyFault]] = []
        self.said: list[str] = []
        self.late = late
        log = structlog.wrap_logger(None, processors=[self._catch])
        self.feed = KeyFeed(
            "kme", Source(self._give), "sae-bob", self._deliver, log, limit=0.01, late_limit=late_limit
        )

    def _catch(self, _logger: object, _method: str, event: structlog.typing.EventDict) -> str:
        self.said.append(str(event["event"]))
        raise structlog.DropEvent

    def _deliver(self, request: int, answer: KeyMaterial | KeyFault) -> None:
        self.delivered.append((request, answer))

    async def _give(self) -> Key:
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            await self.release.wait()
        if isinstance(self.late, Exception):
            raise self.late
        return self.late

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0)


SLOW = "no key in time, the draw goes on"


async def test_a_draw_that_takes_too_long_goes_on_and_its_key_comes_late() -> None:
    drawn = key()
    late = Late(drawn)
    late.feed.ask(DRAW)
    await late.until(lambda: late.said == [SLOW])
    assert late.delivered == []
    late.release.set()
    await late.until(lambda: late.delivered)
    assert late.delivered == [(7, KeyMaterial(ID, WireOrigin.QKD, 0, bytearray(b"k" * 32)))]
    assert any(drawn.material)
    await late.feed.aclose()


@pytest.mark.parametrize("bad", [key(material=bytes(32)), Unavailable("no")], ids=["zeros", "error"])
async def test_a_late_draw_that_gives_nothing_says_so(bad: Key | Exception) -> None:
    late = Late(bad)
    late.feed.ask(DRAW)
    await late.until(lambda: late.said == [SLOW])
    late.release.set()
    await late.until(lambda: late.delivered)
    assert late.delivered == [(7, KeyFault.BROKEN)]


async def test_a_late_draw_that_is_later_than_every_limit_is_wiped() -> None:
    drawn = key()
    late = Late(drawn, late_limit=0.01)
    late.feed.ask(DRAW)
    await late.until(lambda: late.delivered)
    late.release.set()
    await late.until(lambda: not any(drawn.material))
    assert late.delivered == [(7, KeyFault.BROKEN)]


async def test_a_late_draw_is_wiped_when_the_feed_closes() -> None:
    drawn = key()
    late = Late(drawn)
    late.feed.ask(DRAW)
    await late.until(lambda: late.said == [SLOW])
    await late.feed.aclose()
    late.release.set()
    await late.until(lambda: not any(drawn.material))
    assert late.delivered == []


async def reasons(source: Source, need: NeedKey) -> list[str]:
    """What the log says of one call."""
    said: list[str] = []

    def catch(_logger: object, _method: str, event: structlog.typing.EventDict) -> str:
        said.append(event["reason"])
        raise structlog.DropEvent

    feed = KeyFeed("kme", source, "sae-bob", lambda *it: None, structlog.wrap_logger(None, processors=[catch]))
    feed.ask(need)
    await asyncio.wait(feed._calls)
    return said


async def test_the_log_has_no_key_id_that_a_key_manager_repeats() -> None:
    refusal = UnknownKeyID(f"https://kme: dec_keys answered 400: no key {ID.upper()} for you")
    said = f"https://kme: dec_keys answered 400: no key (key_ID with hash {key_id_hash(ID)}) for you"
    assert await reasons(Source(gives(refusal)), FETCH) == [said]


async def test_a_space_in_a_key_id_is_named_as_the_reason() -> None:
    assert await reasons(Source(gives(key(key_id="a space"))), DRAW) == [
        "kme: the key source gave a key_ID that is not 1 to 64 ASCII characters between 0x21 and 0x7E (no space)"
    ]


async def test_claims_are_checked_before_a_key_is_touched() -> None:
    source = ClaimingSource(gives(key()), RolledBack("they saw us further"))
    assert await ask(source, NeedKey(1, Role.RESPONDER, FETCH.key, b"theirs")) == (1, KeyFault.ROLLED_BACK)
    assert (source.checked, source.calls) == ([b"theirs"], [])
    source = ClaimingSource(gives(key()), IndexError())
    assert await ask(source, NeedKey(1, Role.RESPONDER, FETCH.key, b"odd")) == (1, KeyFault.ROLLED_BACK)
    source = ClaimingSource(gives(key()))
    assert isinstance((await ask(source, NeedKey(1, Role.RESPONDER, FETCH.key, b"good")))[1], KeyMaterial)
    assert source.checked == [b"good"]
    source = ClaimingSource(gives(key()))
    assert isinstance((await ask(source, NeedKey(1, Role.RESPONDER, FETCH.key, None)))[1], KeyMaterial)
    assert source.checked == []


async def test_status_is_bounded_and_never_raises() -> None:
    async def hang() -> Key:
        await asyncio.Event().wait()
        raise AssertionError

    def feed(source: Source) -> KeyFeed:
        return KeyFeed("kme", source, "sae-bob", lambda *it: None, structlog.get_logger(), limit=0.01)

    assert (await feed(Source(gives(key()))).poll()).ready
    assert (await feed(Source(hang)).poll()).reason == "kme: no status within 0.01 s"
    assert (await feed(Source(gives(Unavailable("down")))).poll()).reason == "down"

    class Mute(Source):
        async def status(self, peer_sae: str) -> Any:
            return None

    assert (await feed(Mute(gives(key()))).poll()).reason == "kme: the key source's status is none"
    broken = await feed(Source(gives(ValueError("a secret")))).poll()
    assert (broken.ready, broken.reason) == (False, "kme: the key source broke (ValueError)")
    assert feed(Source(gives(key()))).claim() is None
    assert feed(ClaimingSource(gives(key()))).claim() == b"here"
