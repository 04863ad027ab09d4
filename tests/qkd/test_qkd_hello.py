"""The beginning of a connection: who has no pad gets nowhere, other configurations are named, blocks compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysource.base import End
from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.engine.hello import AgreedTerms, Greeting, lost_blocks
from keysource.qkd.errors import BadFrame, Disagreement
from keysource.qkd.pad import Claims

SAID = {
    "link": "l",
    "owner": "alternate",
    "auth_bootstrap": "psk",
    "preset": "demo",
    "efficiency_tests": False,
    "repeatable": False,
    "plan": "ab",
}
TERMS = AgreedTerms(**SAID)
KEY = bytes(32)


def claims(acked: int = -1, held: tuple[int, ...] = (), next_block: int = 9) -> Claims:
    return Claims(1, 0, 1, frozenset(), next_block, acked, frozenset(held))


def pair(key: bytes = KEY, terms: AgreedTerms = TERMS) -> tuple[Greeting, Greeting]:
    a, b = Greeting(End.A, KEY, TERMS), Greeting(End.B, key, terms)
    a.take_hello_untrusted(b.hello())
    b.take_hello_untrusted(a.hello())
    return a, b


def test_both_ends_read_each_others_claims() -> None:
    a, b = pair()
    mine, theirs = claims(3, (4, 5)), claims(2)
    assert b.take_claims_untrusted(a.claims(mine)) == mine
    assert a.take_claims_untrusted(b.claims(theirs)) == theirs


def test_another_pad_a_reflection_and_an_old_connection_prove_nothing() -> None:
    a, b = pair(key=bytes(31) + b"x")
    with pytest.raises(BadFrame, match="pad"):
        a.take_claims_untrusted(b.claims(claims()))
    a, b = pair()
    with pytest.raises(BadFrame, match="pad"):
        a.take_claims_untrusted(a.claims(claims()))
    recorded = b.claims(claims())
    a2, _ = pair()
    with pytest.raises(BadFrame, match="pad"):
        a2.take_claims_untrusted(recorded)


@given(st.data())
def test_no_bit_of_the_claims_can_be_changed(data: st.DataObject) -> None:
    a, b = pair()
    payload = bytearray(b.claims(claims(3, (4,))).payload)
    bit = data.draw(st.integers(0, 8 * len(payload) - 1))
    payload[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadFrame):
        a.take_claims_untrusted(Frame(Kind.CLAIMS, bytes(payload)))


@pytest.mark.parametrize("field", SAID)
def test_a_difference_of_the_configurations_is_named(field: str) -> None:
    other = SAID | {field: "else"}
    a, b = pair(terms=AgreedTerms(**other))
    with pytest.raises(Disagreement, match=field):
        a.take_claims_untrusted(b.claims(claims()))


@pytest.mark.parametrize("frame", [Frame(Kind.PING), Frame(Kind.HELLO), Frame(Kind.HELLO, bytes(32))])
def test_something_else_than_a_hello_is_refused(frame: Frame) -> None:
    with pytest.raises(BadFrame):
        Greeting(End.A, KEY, TERMS).take_hello_untrusted(frame)
    with pytest.raises(Disagreement, match="version"):
        Greeting(End.A, KEY, TERMS).take_hello_untrusted(Frame(Kind.HELLO, b"\x07" + bytes(32)))


@given(st.sets(st.integers(0, 8)), st.integers(-1, 8), st.integers(-1, 8), st.sets(st.integers(0, 8)), st.booleans())
def test_lost_blocks_are_found_and_nothing_else(
    published: set[int], acked_a: int, acked_b: int, forgotten: set[int], at_a: bool
) -> None:
    """A model: both ends published the same blocks; clients took them up to some number; one end crashed and forgot
    blocks that its client had not taken."""
    order = sorted(published)
    acked_a = max((n for n in order if n <= acked_a), default=-1)
    acked_b = max((n for n in order if n <= acked_b), default=-1)
    held_a, held_b = ({n for n in order if n > acked} for acked in (acked_a, acked_b))
    gone = (held_a if at_a else held_b) & forgotten
    # a crash forgets everything from some block on or all of it: the newest that is gone decides
    if gone:
        if at_a:
            held_a = set()
        else:
            held_b = set()
    lost = bool(gone)
    a, b = claims(acked_a, tuple(held_a)), claims(acked_b, tuple(held_b))
    assert lost_blocks(a, b) == lost_blocks(b, a) == lost
