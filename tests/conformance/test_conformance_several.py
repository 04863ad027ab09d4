"""``failover`` and ``combine``: the suite over pairs of them, and what they do when members fail."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, hmac
from hypothesis import given
from hypothesis import strategies as st

from keysource.base import Hop, KeySource, Origin, SaePair, SourceContext, SourceStatus
from keysource.base import Key as SourceKey
from keysource.conformance import CHECKS, Check, Pair, concurrent_draws_share_no_key
from keysource.errors import BadAnswer, BadSettings, Exhausted, NotOwner, RolledBack, Unavailable, UnknownKeyID
from keysource.file.format import write_pair
from keysource.file.source import FileSource
from keysource.several.combine import CombineSource
from keysource.several.failover import FailoverSource
from keysource.several.keyids import pack, unpack

TOTAL_DRAWS = 10_000 if os.environ.get("QVPN_TEST_LONG") else 1_000
KINDS: dict[str, type[CombineSource] | type[FailoverSource]] = {"combine": CombineSource, "failover": FailoverSource}


class Memory:
    """One end of a pair in memory whose answers a test orders."""

    def __init__(self, shared: dict[tuple[str, str], bytes], name: str, other: str, origin: Origin) -> None:
        self.shared, self.name, self.other, self.origin = shared, name, other, origin
        self.error: Exception | None = None
        self.alarm: str | None = None
        self.hang = False
        self.hop, self.hops, self.said_origin = Hop.LOCAL, 0, True
        self.draws = 0
        self.made = lambda: str(uuid.uuid4())

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    def sae_pair(self, peer_sae: str) -> SaePair:
        return SaePair(self.name, self.other)

    async def status(self, peer_sae: str) -> SourceStatus:
        reason = self.alarm or (str(self.error) if self.error else "")
        harvested = self.hop is Hop.CLASSICAL_TLS
        origin = self.origin if self.said_origin else None
        return SourceStatus(
            not reason, reason, origin, self.hop, stored_keys=7, alarm=self.alarm, survives_harvest=not harvested
        )

    async def get_key(self, peer_sae: str) -> SourceKey:
        assert peer_sae == self.other
        await self._fail()
        self.draws += 1
        key_id, material = self.made(), os.urandom(32)
        self.shared[self.other, key_id] = material
        return SourceKey(key_id, bytearray(material), self.origin, self.hops)

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> SourceKey:
        await self._fail()
        material = self.shared.pop((self.name, key_id), None)
        if material is None:
            raise UnknownKeyID("no such key")
        return SourceKey(key_id, bytearray(material), self.origin)

    async def _fail(self) -> None:
        await asyncio.sleep(30 if self.hang else 0)
        if self.error or self.alarm:
            raise self.error or Unavailable("alarm", answered=True)


class Lab:
    """Both ends of one ``kind`` over memory members, the first of origin qkd, the second external."""

    def __init__(self, kind: str, count: int = 2) -> None:
        self.now = 1000.0
        self.parts: list[tuple[Memory, Memory]] = []
        for origin in (Origin.EXTERNAL, Origin.QKD, Origin.SIMULATED)[:count]:
            shared: dict[tuple[str, str], bytes] = {}
            self.parts.append((Memory(shared, "a", "b", origin), Memory(shared, "b", "a", origin)))
        self.a, self.b = (self._end(kind, end) for end in range(2))

    def _end(self, kind: str, end: int) -> CombineSource | FailoverSource:
        members: dict[str, KeySource] = {f"m{place}": part[end] for place, part in enumerate(self.parts)}
        context = SourceContext("both", Path(), Path(), "ab"[end], other=members.__getitem__)
        return KINDS[kind]({"sources": list(members), "sae": "ab"[end]}, context, clock=lambda: self.now)

    async def start(self) -> Lab:
        await self.a.start()
        await self.b.start()
        return self


@asynccontextmanager
async def memory_pair(kind: str, count: int = 2) -> AsyncIterator[Pair]:
    lab = await Lab(kind, count).start()
    yield Pair(lab.a, lab.b, "a", "b")


@asynccontextmanager
async def file_pair(kind: str, folder: Path) -> AsyncIterator[Pair]:
    """Two key files: members with claims and owners."""
    ends, started = [], []
    for site in "ab":
        (folder / site / "state").mkdir(parents=True, mode=0o700)
    for name in ("one", "two"):
        write_pair(folder / "a" / name, folder / "b" / name, 300)
    for site in "ab":
        place = SourceContext(site, folder / site, folder / site / "state", site)
        members = {name: FileSource({"path": name, "end": site}, place) for name in ("one", "two")}
        context = SourceContext("both", place.base, place.state, site, other=members.__getitem__)
        whole = KINDS[kind]({"sources": ["one", "two"], "sae": site}, context)
        for source in (*members.values(), whole):
            await source.start()
            started.append(source)
        ends.append(whole)
    yield Pair(*ends, "a", "b")
    for source in started:
        await source.aclose()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
async def test_several_conform(kind: str, check: Check, tmp_path: Path) -> None:
    await check(partial(memory_pair, kind))
    await check(partial(memory_pair, kind, 3))
    await check(partial(file_pair, kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
async def test_many_draws_from_both_sides_at_once(kind: str) -> None:
    await concurrent_draws_share_no_key(partial(memory_pair, kind), TOTAL_DRAWS)


# combine


async def test_the_combined_key_is_hkdf_over_all_keys_and_takes_the_weakest_origin() -> None:
    lab = await Lab("combine").start()
    key = await lab.a.get_key("b")
    assert key.origin is Origin.EXTERNAL
    parts = unpack(key.key_id, 2)
    k1, k2 = (part[0].shared["b", key_id] for part, key_id in zip(lab.parts, parts, strict=True))

    def mac(secret: bytes, data: bytes) -> bytes:
        context = hmac.HMAC(secret, hashes.SHA256())
        context.update(data)
        return context.finalize()

    texts = ["a", "b", parts[0], "external", "0", parts[1], "qkd", "0"]
    info = b"".join(len(text).to_bytes(2, "big") + text.encode() for text in texts)
    assert key.material == mac(mac(b"qvpn combine v1", k1 + k2), info + b"\x01")  # RFC 5869, one block
    assert (await lab.b.get_key_with_id("a", key.key_id)).material == key.material


async def test_one_source_that_lies_changes_the_key() -> None:
    lab = await Lab("combine").start()
    key = await lab.a.get_key("b")
    shared = lab.parts[1][0].shared
    for place in shared:
        shared[place] = bytes(32)
    assert (await lab.b.get_key_with_id("a", key.key_id)).material != key.material


async def test_what_was_drawn_in_vain_is_used_next_for_a_minute_and_by_the_same_peer_only() -> None:
    lab = await Lab("combine").start()
    first, second = lab.parts[0][0], lab.parts[1][0]
    second.error = Exhausted("no key left")
    for _ in range(5):
        with pytest.raises(Exhausted):
            await lab.a.get_key("b")
    assert first.draws == 1
    second.error = None
    key = await lab.a.get_key("b")
    assert (first.draws, second.draws) == (1, 1)
    assert (await lab.b.get_key_with_id("a", key.key_id)).material == key.material
    second.error = Exhausted("no key left")
    with pytest.raises(Exhausted):
        await lab.a.get_key("b")
    second.error, lab.now = None, lab.now + 61
    await lab.a.get_key("b")
    assert first.draws == 3


async def test_a_fetch_that_is_half_there_gives_nothing_and_is_not_to_be_repeated() -> None:
    lab = await Lab("combine").start()
    key = await lab.a.get_key("b")
    lab.parts[1][1].error = Unavailable("not now", answered=True)
    with pytest.raises(Unavailable) as error:
        await lab.b.get_key_with_id("a", key.key_id)
    assert not error.value.answered
    lab.parts[1][1].error = None
    with pytest.raises(UnknownKeyID):
        await lab.b.get_key_with_id("a", key.key_id)


async def test_a_combined_key_promises_nothing_that_one_part_does_not_keep() -> None:
    lab = await Lab("combine", 3).start()
    assert (await lab.a.get_key("b")).origin is Origin.SIMULATED
    hops = (Hop.LOCAL, Hop.CLASSICAL_TLS, Hop.ZONE)
    for (member, _other), hop in zip(lab.parts, hops, strict=True):
        member.hop, member.hops = hop, 3 * (hop is Hop.ZONE)
    status = await lab.a.status("b")
    assert (status.origin, status.hop, status.survives_harvest) == (Origin.SIMULATED, Hop.CLASSICAL_TLS, False)
    assert (await lab.a.get_key("b")).hops == 3
    lab.parts[1][0].said_origin = False  # nobody knows yet: then the whole does not either
    assert (await lab.a.status("b")).origin is None


async def test_a_key_kept_from_before_an_alarm_is_burnt() -> None:
    lab = await Lab("combine").start()
    first, second = lab.parts[0][0], lab.parts[1][0]
    second.error = Exhausted("no key left")
    with pytest.raises(Exhausted):
        await lab.a.get_key("b")
    second.error, first.alarm = None, "qber"
    with pytest.raises(Unavailable):
        await lab.a.get_key("b")
    first.alarm = None
    key = await lab.a.get_key("b")
    assert first.draws == 2
    assert (await lab.b.get_key_with_id("a", key.key_id)).material == key.material


async def test_combine_is_ready_when_all_are() -> None:
    lab = await Lab("combine").start()
    assert (await lab.a.status("b")).origin is Origin.EXTERNAL
    lab.parts[1][0].error = Unavailable("box is off")
    status = await lab.a.status("b")
    assert (status.ready, status.reason) == (False, "m1: box is off")


# failover


async def test_failover_takes_the_first_then_the_next_and_comes_back() -> None:
    lab = await Lab("failover").start()
    first, second = lab.parts[0][0], lab.parts[1][0]
    assert (await lab.a.get_key("b")).origin is Origin.EXTERNAL
    first.error = Unavailable("off")
    for _ in range(3):
        key = await lab.a.get_key("b")
        assert key.origin is Origin.QKD
        assert (await lab.b.get_key_with_id("a", key.key_id)).material == key.material
    assert (first.draws, second.draws) == (1, 3)
    assert (await lab.a.status("b")).ready
    first.error, lab.now = None, lab.now + 1.5
    assert (await lab.a.status("b")).origin is Origin.EXTERNAL
    assert (await lab.a.get_key("b")).origin is Origin.EXTERNAL


async def test_failover_does_not_wait_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keysource.several.failover.PATIENCE", 0.05)
    lab = await Lab("failover").start()
    lab.parts[0][0].hang = True
    assert (await lab.a.get_key("b")).origin is Origin.QKD


async def test_failover_goes_by_what_the_peer_has() -> None:
    lab = await Lab("failover").start()
    lab.parts[0][1].error = Unavailable("off")
    await lab.b.status("a")
    assert isinstance(lab.a, FailoverSource)
    assert isinstance(lab.b, FailoverSource)
    lab.a.check_claim(lab.b.claim())
    key = await lab.a.get_key("b")
    assert key.origin is Origin.QKD
    assert lab.parts[0][0].draws == 0
    assert (await lab.b.get_key_with_id("a", key.key_id)).material == key.material


async def test_failover_says_why_when_all_fail() -> None:
    lab = await Lab("failover").start()
    lab.parts[0][0].error = Unavailable("off", answered=True)
    lab.parts[1][0].error = Exhausted("empty")
    with pytest.raises(Unavailable, match=r"off; empty|empty; off") as error:
        await lab.a.get_key("b")
    assert error.value.answered
    status = await lab.a.status("b")
    assert (status.ready, status.reason) == (False, "m0: off; m1: empty")
    for part in lab.parts:
        part[0].error = NotOwner("theirs")
    with pytest.raises(NotOwner):
        await lab.a.get_key("b")


async def test_an_alarm_of_the_member_in_use_shows_and_then_gives_way() -> None:
    lab = await Lab("failover").start()
    await lab.a.get_key("b")
    lab.parts[0][0].alarm = "qber"
    status = await lab.a.status("b")
    assert (status.ready, status.alarm) == (True, "qber")
    lab.now += 11
    assert (await lab.a.status("b")).alarm is None
    lab.parts[1][0].alarm = "monitor"
    status = await lab.a.status("b")
    assert (status.ready, status.alarm) == (False, "qber")


async def test_a_member_with_a_restored_backup_is_left_out(tmp_path: Path) -> None:
    async with file_pair("failover", tmp_path) as pair:
        assert isinstance(pair.a, FailoverSource)
        assert isinstance(pair.b, FailoverSource)
        ready, (one, two) = pair.b._split_claim(pair.b.claim())
        ahead = one[:-4] + (50).to_bytes(4, "big")
        claim = bytes([0xF1, ready, len(ahead)]) + ahead + bytes([len(two)]) + two
        pair.a.check_claim(claim)
        key = await pair.a.get_key("b")
        assert key.key_id.startswith("1:")
        assert (await pair.b.get_key_with_id("a", key.key_id)).material == key.material
        both = bytes([0xF1, ready]) + 2 * (bytes([len(ahead)]) + ahead)
        with pytest.raises((RolledBack, BadAnswer)):
            pair.a.check_claim(both)


# the table


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": ["m0"]}, "sources: "),
        ({"sources": ["m0", "m0"]}, "sources: each source stands there once"),
        ({"sources": ["m0", "nobody"]}, "sources: there is no key source 'nobody'"),
        ({"sources": ["m0", "both"]}, "sources: 'both' cannot be a part of itself"),
        ({"peer_sae": {"m7": "x"}}, "peer_sae: 'm7' is none of the sources"),
        ({"sae": ""}, "sae: "),
        ({"colour": 1}, "colour: no such key"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_table_is_one_sentence(kind: str, change: dict[str, object], said: str) -> None:
    member = Memory({}, "a", "b", Origin.QKD)

    def other(name: str) -> KeySource:
        if name not in ("m0", "m1"):
            raise BadSettings(f"there is no key source {name!r}")
        return member

    table = {"sources": ["m0", "m1"], "sae": "a", **change}
    with pytest.raises(BadSettings, match=said):
        KINDS[kind](table, SourceContext("both", Path(), Path(), "a", other=other))


# key_IDs

key_ids = (
    st.uuids().map(str)
    | st.binary(min_size=16, max_size=16).map(bytes.hex)
    | st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 + 9)).map(lambda x: f"{x[0].hex()}:{x[1]}")
    | st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=12)
)


@given(st.lists(key_ids, min_size=2, max_size=3))
def test_key_ids_survive_packing(wanted: list[str]) -> None:
    try:
        text = pack(wanted)
    except ValueError:
        assert sum(map(len, wanted)) > 40
        return
    assert len(text) <= 64
    assert all("!" <= letter <= "~" for letter in text)
    assert unpack(text, len(wanted)) == wanted


@given(st.text(max_size=64) | st.text("uhst0123456789abcdef", max_size=64), st.integers(2, 3))
def test_unpacking_raises_only_value_error(text: str, count: int) -> None:
    with suppress(ValueError):
        assert pack(unpack(text, count)) == text
