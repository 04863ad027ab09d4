"""The in-memory stock: owner rule, exactly once, void, bounds, rate, wiping; against a slow model."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.errors import Exhausted, NotOwner, UnknownKeyID
from keysource.stock import Stock


def stocks(owner: Owner = Owner.ALTERNATE, capacity: int = 100) -> tuple[Stock, Stock]:
    a, b = (Stock("l", end, owner, Origin.SIMULATED, 2, capacity=capacity) for end in End)
    return a, b


def feed(block: int, count: int, *ends: Stock, now: float = 0.0) -> bytes:
    keys = os.urandom(32 * count)
    for end in ends:
        end.add_block(block, bytearray(keys), now)
    return keys


def test_draw_gives_the_oldest_own_key_and_the_other_end_has_it() -> None:
    a, b = stocks()
    keys = feed(0, 4, a, b) + feed(3, 4, a, b)
    for block, position in ((0, 0), (0, 2), (3, 0), (3, 2)):
        key = a.draw()
        start = 32 * (position + (4 if block else 0))
        assert (key.key_id, bytes(key.material)) == (derive_key_id("l", block, position), keys[start : start + 32])
        assert (key.origin, key.hops) == (Origin.SIMULATED, 2)
        assert b.fetch(key.key_id) == key
        with pytest.raises(UnknownKeyID):
            b.fetch(key.key_id)
    with pytest.raises(Exhausted):
        a.draw()
    assert b.drawable == 4


def test_own_keys_cannot_be_fetched_nor_others_drawn() -> None:
    a, b = stocks()
    feed(0, 2, a, b)
    with pytest.raises(UnknownKeyID):
        a.fetch(derive_key_id("l", 0, 0))
    assert a.draw().key_id != b.draw().key_id


@pytest.mark.parametrize("owner", [Owner.A, Owner.B])
def test_one_owner(owner: Owner) -> None:
    a, b = stocks(owner)
    feed(0, 3, a, b)
    issuing, other = (a, b) if owner is Owner.A else (b, a)
    with pytest.raises(NotOwner):
        other.draw()
    assert [other.fetch(issuing.draw().key_id).key_id for _ in range(3)]


def test_a_block_comes_once_and_its_bytes_are_wiped() -> None:
    a, _b = stocks()
    keys = bytearray(os.urandom(64))
    assert a.add_block(5, keys, 0.0) == 2
    assert not any(keys)
    again = bytearray(os.urandom(64))
    assert a.add_block(5, again, 0.0) == 0
    assert a.add_block(4, bytearray(64), 0.0) == 0
    assert not any(again)
    assert (a.drawable, a.fetchable, a.next_block) == (1, 1, 6)


def test_void_takes_unused_keys_and_blocks_still_on_their_way() -> None:
    a, _b = stocks()
    feed(0, 4, a)
    feed(1, 4, a)
    a.draw()
    assert a.void(1) == 3
    assert a.draw().key_id == derive_key_id("l", 1, 0)
    assert a.void(9) == 3
    feed(8, 4, a)
    assert a.drawable == a.fetchable == 0
    feed(9, 4, a)
    assert a.drawable == 2


def test_full_needs_both_kinds_and_one_unused_kind_never_stops_the_link() -> None:
    a, b = stocks(capacity=4)
    for block in range(30):
        feed(block, 4, a, b)
        while b.drawable:
            b.draw()
        while a.fetchable:  # all that b drew
            a._others.popitem()
        assert not a.full
    assert (a.drawable, b.fetchable) == (8, 16)
    key = a.draw()
    assert b.fetch(key.key_id) == key  # what a still issues, b still has
    feed(99, 8, a)
    assert a.full


@pytest.mark.parametrize("owner,end", [(Owner.A, End.A), (Owner.A, End.B)])
def test_full_with_one_owner_looks_at_the_kind_that_exists(owner: Owner, end: End) -> None:
    stock = Stock("l", end, owner, Origin.QKD, capacity=4)
    assert not stock.full
    feed(0, 4, stock)
    assert stock.full


def test_rate_is_measured_over_the_window() -> None:
    a, _b = stocks()
    assert a.key_rate(0.0) is None
    a.started(100.0)
    assert a.key_rate(110.0) == 0.0
    feed(0, 40, a, now=110.0)
    assert a.key_rate(120.0) == pytest.approx(2.0)
    assert a.key_rate(165.0) == pytest.approx(40 / 60)
    assert a.key_rate(171.0) == 0.0


def test_wipe_overwrites() -> None:
    a, _b = stocks()
    feed(0, 4, a)
    held = [material for keys in (a._own, a._others) for _block, material in keys.values()]
    a.wipe()
    assert len(held) == 4
    assert not any(any(material) for material in held)
    assert a.drawable == a.fetchable == 0


def test_repr_hides_keys() -> None:
    a, _b = stocks()
    keys = feed(0, 2, a)
    assert keys[:32].hex() not in repr(a) + repr(a.draw())


@given(st.sampled_from(list(Owner)), st.lists(st.sampled_from(["block", "a", "b", "late", "void"]), max_size=60))
def test_two_ends_never_issue_one_key_twice(owner: Owner, steps: list[str]) -> None:
    a, b = stocks(owner, capacity=1000)
    issued: list[str] = []
    waiting: list[tuple[Stock, str]] = []
    block = 0
    for step in steps:
        match step:
            case "block":
                feed(block, 3, a, b)
                block += 2
            case "void":
                a.void(block - 1)
                b.void(block - 1)
                waiting.clear()
            case "late":
                for stock, key_id in waiting:
                    assert stock.fetch(key_id).key_id == key_id
                waiting.clear()
            case end:
                try:
                    key = (a if end == "a" else b).draw()
                except (Exhausted, NotOwner):
                    continue
                issued.append(key.key_id)
                waiting.append((b if end == "a" else a, key.key_id))
    assert len(set(issued)) == len(issued)
