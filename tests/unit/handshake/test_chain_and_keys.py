"""The chain's pair, held and used keys, the bucket, cookies, indexes and quotas."""

from __future__ import annotations

import ipaddress
import random
from dataclasses import dataclass

import pytest

from qvpn.handshake import timers
from qvpn.handshake.chain import Chain, Link, next_link
from qvpn.handshake.cookie import RENEW, CookieJar, address_bytes
from qvpn.handshake.keyring import REMEMBERED, Keyring, UsedKeys
from qvpn.handshake.parameters import KeyMaterial
from qvpn.handshake.port import (
    ANSWERS_TOTAL,
    ATTEMPT,
    ENTRY,
    EPOCH,
    HALF_OPEN_PER_SOURCE,
    HALF_OPEN_TOTAL,
    Port,
    source_prefix,
)
from qvpn.wire.messages import NO_CHAIN, WireOrigin


@dataclass(frozen=True)
class Where:
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int = 51840


def link(number: int) -> Link:
    return Link(bytes([number]) * 48, number)


def key(number: int) -> KeyMaterial:
    return KeyMaterial(f"key-{number}", WireOrigin.QKD, 0, bytearray(number.to_bytes(32, "big")))


# chain


def test_a_new_chain_offers_nothing_and_expects_nothing() -> None:
    chain = Chain()
    assert chain.offer().ids == (NO_CHAIN, NO_CHAIN)
    assert not chain.expected
    assert chain.select(NO_CHAIN, NO_CHAIN) == (0, None)


def test_the_pair_is_the_newest_and_what_its_own_handshake_selected() -> None:
    chain, second = Chain(), link(2)
    chain.advance(link(1), None)
    chain.confirmed(link(1))
    chain.advance(second, link(1))
    assert chain.offer().ids == (link(2).id, link(1).id)
    assert chain.select(link(2).id, NO_CHAIN) == (1, link(2))
    assert chain.select(link(9).id, link(1).id) == (2, link(1))
    assert chain.select(link(9).id, link(8).id) == (0, None)
    chain.confirmed(second)
    assert chain.offer().ids == (link(2).id, NO_CHAIN)


def test_an_unconfirmed_epoch_does_not_cost_the_common_chain() -> None:
    """I accepted 2 on 1, R never heard of it and still has 1 only."""
    ours, theirs = Chain(), Chain()
    for chain in (ours, theirs):
        chain.advance(link(1), None)
        chain.confirmed(link(1))
    ours.advance(link(2), link(1))
    which, selected = theirs.select(*ours.offer().ids)
    assert ours.offer().selected(which) == selected == link(1)


def test_an_older_record_does_not_erase_the_newer_pair() -> None:
    chain = Chain()
    chain.advance(link(1), None)
    chain.advance(link(2), link(1))
    chain.confirmed(link(1))
    assert chain.offer().ids == (link(2).id, link(1).id)


def test_an_offer_is_a_copy() -> None:
    chain = Chain()
    chain.advance(link(1), None)
    offer = chain.offer()
    chain.advance(link(2), None)
    assert offer.selected(1) == link(1) and offer.selected(2) is None and offer.selected(0) is None


def test_a_link_without_a_fresh_key_holds_what_the_one_before_held() -> None:
    old = Link(b"o" * 48, 4, 17.0, WireOrigin.RELAYED)
    new = next_link(b"n" * 48, old, 5)
    assert (new.epoch, new.qkd_at, new.qkd_origin, new.secret) == (5, 17.0, WireOrigin.RELAYED, b"n" * 48)
    assert next_link(b"n" * 48, None, 0).qkd_at is None
    assert "nnn" not in repr(new)


# keys


def test_a_drawn_key_is_held_for_sixty_seconds_and_taken_once() -> None:
    ring, one = Keyring(), key(1)
    ring.hold_drawn(one, 100.0)
    held = ring.take_drawn(100.0 + timers.HELD_KEY - 0.1)
    assert held is not None and held.key is one and held.since == 100.0
    assert ring.take_drawn(101.0) is None
    ring.hold_drawn(one, 100.0)
    assert ring.take_drawn(100.0 + timers.HELD_KEY) is None
    assert not any(one.material) and ring.used.has_id("key-1")


def test_a_second_held_key_burns_the_first() -> None:
    ring, one, two = Keyring(), key(1), key(2)
    ring.hold_drawn(one, 0.0)
    ring.hold_drawn(two, 1.0)
    assert not any(one.material) and any(two.material)


def test_a_fetched_key_serves_until_it_is_confirmed_or_old() -> None:
    ring, one = Keyring(), key(1)
    ring.hold_fetched(one, 0.0)
    held = ring.fetched("key-1", 59.9)
    assert held is not None and held.key is one
    assert ring.fetched("key-2", 1.0) is None
    ring.confirm(one)
    assert ring.fetched("key-1", 1.0) is None and ring.used.has_id("key-1") and ring.consumed == 1
    assert not any(one.material)
    two = key(2)
    ring.hold_fetched(two, 0.0)
    ring.expire(timers.HELD_KEY)
    assert ring.fetched("key-2", timers.HELD_KEY) is None and not any(two.material)


def test_after_an_alarm_no_key_from_before_it_is_offered_or_taken() -> None:
    ring, drawn, fetched = Keyring(), key(1), key(2)
    ring.hold_drawn(drawn, 10.0)
    ring.hold_fetched(fetched, 10.0)
    ring.distrust(11.0)
    assert ring.fetched("key-2", 12.0) is None and any(fetched.material)  # an unconfirmed epoch may rest on it
    ring.confirm(fetched)
    assert ring.take_drawn(12.0) is None and not any(drawn.material)
    ring.hold_drawn(drawn := key(3), 10.9)  # of an attempt that was under way
    assert ring.take_drawn(13.0) is None and not any(drawn.material)
    ring.hold_drawn(key(4), 12.0)
    ring.hold_fetched(key(5), 12.0)
    assert ring.take_drawn(13.0) is not None and ring.fetched("key-5", 13.0) is not None


def test_clear_wipes_everything() -> None:
    ring, one, two = Keyring(), key(1), key(2)
    ring.hold_drawn(one, 0.0)
    ring.hold_fetched(two, 0.0)
    ring.clear()
    assert not any(one.material) and not any(two.material)


def test_used_keys_are_remembered_by_id_and_by_bytes_up_to_a_bound() -> None:
    used = UsedKeys()
    for number in range(REMEMBERED + 10):
        used.add(key(number))
    assert not used.has_id("key-9") and used.has_id("key-10") and used.has_id(f"key-{REMEMBERED + 9}")
    same_bytes = KeyMaterial("another", WireOrigin.QKD, 0, bytearray((10).to_bytes(32, "big")))
    assert used.has_key(same_bytes) and not used.has_id("another")
    assert len(used._ids) == len(used._keys) == REMEMBERED


def test_key_material_stays_out_of_reprs() -> None:
    one = KeyMaterial("id", WireOrigin.QKD, 0, bytearray(b"\xcd" * 32))
    ring = Keyring()
    ring.hold_drawn(one, 0.0)
    assert "xcd" not in repr(one) and "xcd" not in repr(ring._drawn)


# timers


@pytest.mark.parametrize(
    ("rekey", "overlap", "resend", "backoff", "alive", "dead"),
    [(1, 1, 1, 1, 1, 2), (8, 8, 8, 8, 8, 16), (60, 10, 8, 60, 10, 30), (3600, 10, 8, 60, 10, 30)],
)
def test_times_follow_from_rekey(
    rekey: float, overlap: float, resend: float, backoff: float, alive: float, dead: float
) -> None:
    assert timers.overlap(rekey) == overlap
    assert timers.resend_cap(rekey) == resend
    assert timers.backoff_cap(rekey) == backoff
    assert timers.keepalive(rekey) == alive
    assert timers.dead_peer(rekey) == dead
    assert timers.rekey_after(rekey, True, 0.0) == rekey
    assert timers.rekey_after(rekey, True, 1.0) == pytest.approx(0.9 * rekey)
    assert timers.rekey_after(rekey, False, 0.0) == pytest.approx(rekey * 7 / 6)
    assert timers.rekey_after(rekey, False, 1.0) > timers.rekey_after(rekey, True, 0.0)
    assert timers.spread(rekey, 0.0) == 0.75 * rekey and timers.spread(rekey, 1.0) == 1.25 * rekey


def test_the_bucket_has_a_burst_of_three_and_one_per_half_rekey() -> None:
    bucket = timers.Bucket(60.0, 0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(29.0)
    assert [bucket.take(60.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(1e6) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(0.0)  # a clock that falls fills nothing


# cookies, indexes, quotas


def test_cookies_live_through_one_renewal() -> None:
    jar = CookieJar(random.Random(1).randbytes, 0.0)
    here, there = Where(ipaddress.ip_address("192.0.2.1")), Where(ipaddress.ip_address("192.0.2.1"), 1)
    cookie = jar.cookie(here, 1.0)
    assert cookie in jar.valid(here, RENEW - 1) and cookie not in jar.valid(there, 1.0)
    assert cookie in jar.valid(here, RENEW + 1)
    assert cookie not in jar.valid(here, 2 * RENEW + 1)
    other = CookieJar(random.Random(1).randbytes, 0.0)
    assert other.cookie(here, 0.0) not in other.valid(here, 10 * RENEW)


def test_an_address_is_one_string_of_bytes() -> None:
    four = Where(ipaddress.ip_address("192.0.2.1"))
    six = Where(ipaddress.ip_address("::ffff:192.0.2.1"))
    assert address_bytes(four) == address_bytes(six) and len(address_bytes(four)) == 18


def test_indexes_are_the_hosts_own_and_have_room_for_lanes() -> None:
    values = iter([bytes(4), b"\0\0\0\x0f", b"\1\2\3\x44", b"\1\2\3\x45", b"\1\2\3\x54"])
    port = Port(lambda count: next(values))
    assert port.allocate("a", ATTEMPT) == b"\1\2\3\x40"
    assert port.allocate("b", ENTRY) == b"\1\2\3\x50"
    assert (port.owner(b"\1\2\3\x40", ATTEMPT), port.owner(b"\1\2\3\x50", ENTRY)) == ("a", "b")
    assert (port.owner(bytes(4), ENTRY), port.owner(b"\1\2\3\x40", ENTRY)) == (None, None)
    port.becomes_epoch(b"\1\2\3\x50")
    assert (port.owner(b"\1\2\3\x50", ENTRY), port.owner(b"\1\2\3\x50", EPOCH)) == (None, "b")
    port.release(b"\1\2\3\x40")
    assert port.owner(b"\1\2\3\x40", ATTEMPT) is None


def test_sources_are_addresses_or_64_prefixes() -> None:
    prefix = [
        source_prefix(ipaddress.ip_address(text)) for text in ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1")
    ]
    assert prefix[0] == prefix[1] != prefix[2]
    four = [source_prefix(ipaddress.ip_address(text)) for text in ("192.0.2.1", "192.0.2.2")]
    assert four[0] != four[1]


def test_half_open_places_per_source_in_all_and_reserved() -> None:
    port = Port(random.Random(2).randbytes)
    assert [port.admit("s", False, 0.0) for _ in range(HALF_OPEN_PER_SOURCE + 1)] == [True] * 4 + [False]
    port.leave("s")
    assert not port.admit("s", False, 0.0)  # a place is free, but it asks too often
    assert port.admit("s", False, 1.0)
    for number in range(HALF_OPEN_TOTAL):
        port.admit(number, False, 2.0 + number)
    assert not port.admit("stranger", False, 1000.0)
    known = [port.admit("known", True, 1000.0) for _ in range(HALF_OPEN_PER_SOURCE + 1)]
    assert known == [True] * HALF_OPEN_PER_SOURCE + [False]


def test_strangers_cause_only_so_many_key_exchanges_a_second() -> None:
    port = Port(random.Random(2).randbytes)
    assert sum(port.admit(number, False, 5.0) for number in range(200)) == ANSWERS_TOTAL
    assert sum(port.admit(number, False, 5.5) for number in range(200, 400)) == ANSWERS_TOTAL / 2
