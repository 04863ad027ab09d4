"""Longest prefix match: the rules, and that the cost does not grow."""

from __future__ import annotations

import ipaddress
import random

import pytest

from qvpn.tunnel import allowedips
from qvpn.tunnel.allowedips import AllowedIPs, PrefixTaken


def raw(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def table(**peers: str) -> AllowedIPs[str]:
    allowed: AllowedIPs[str] = AllowedIPs()
    for peer, prefixes in peers.items():
        allowed.add(peer, [ipaddress.ip_network(prefix) for prefix in prefixes.split()])
    return allowed


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("10.1.2.3", "longest"),
        ("10.1.2.4", "middle"),
        ("10.1.3.3", "shortest"),
        ("10.255.255.255", "shortest"),
        ("11.0.0.0", "rest"),
        ("255.255.255.255", "rest"),
        ("0.0.0.0", "rest"),
        ("fd00::1", "middle"),
        ("fd00::2", "longest"),
        ("2001:db8::1", None),
        ("::ffff:10.1.2.3", None),
    ],
)
def test_the_longest_prefix_wins(address: str, peer: str | None) -> None:
    allowed = table(
        shortest="10.0.0.0/8",
        middle="10.1.2.0/24 fd00::/64",
        longest="10.1.2.3/32 fd00::2/127",
        rest="0.0.0.0/0",
    )
    for _ in range(2):  # the second time from the cache
        assert allowed.lookup(raw(address)) == peer


def test_both_families_have_a_default_route_of_their_own() -> None:
    allowed = table(four="0.0.0.0/0", six="::/0")
    assert allowed.lookup(raw("192.0.2.1")) == "four"
    assert allowed.lookup(raw("2001:db8::1")) == "six"


def test_a_change_is_seen_at_once_although_the_answer_was_cached() -> None:
    allowed = table(wide="10.0.0.0/8")
    assert allowed.lookup(raw("10.1.2.3")) == "wide"
    allowed.add("narrow", [ipaddress.ip_network("10.1.0.0/16")])
    assert allowed.lookup(raw("10.1.2.3")) == "narrow"
    allowed.remove("narrow")
    assert allowed.lookup(raw("10.1.2.3")) == "wide"
    allowed.remove("wide")
    assert allowed.lookup(raw("10.1.2.3")) is None


def test_a_prefix_belongs_to_one_peer_and_a_refused_peer_gets_nothing() -> None:
    allowed = table(bob="10.0.0.0/8")
    with pytest.raises(PrefixTaken, match=r"10\.0\.0\.0/8 of peer carol already belong to peer bob"):
        allowed.add("carol", [ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("10.0.0.0/8")])
    assert allowed.lookup(raw("192.0.2.1")) is None
    allowed.add("bob", [ipaddress.ip_network("10.0.0.0/8")])


@pytest.mark.parametrize("address", [b"", b"\x0a", bytes(5), bytes(15), bytes(17)])
def test_what_is_no_address_belongs_to_nobody(address: bytes) -> None:
    assert table(all="0.0.0.0/0 ::/0").lookup(address) is None


def test_the_cache_is_bounded() -> None:
    allowed = table(all="::/0")
    for number in range(allowedips.CACHE_ENTRIES + 10):
        assert allowed.lookup(number.to_bytes(16, "big")) == "all"
    assert len(allowed._cache) <= allowedips.CACHE_ENTRIES


class CountingDict(dict[int, str]):
    """Counts how often it is asked."""

    asked = 0

    def get(self, key: int, default: object = None) -> str | None:  # type: ignore[override]
        CountingDict.asked += 1
        return super().get(key)


@pytest.mark.parametrize(("peers", "prefixes"), [(1, 1), (10, 1000), (100, 10_000)])
def test_accesses_of_one_lookup_do_not_grow_with_peers_or_prefixes(peers: int, prefixes: int) -> None:
    allowed: AllowedIPs[str] = AllowedIPs()
    generator = random.Random(1)
    for number in range(prefixes):
        network = ipaddress.ip_network((number << 8, 24))
        allowed.add(f"peer{number % peers}", [network])
    four = allowed._tables[4]
    four._by_length = {length: CountingDict(found) for length, found in four._by_length.items()}
    addresses = [generator.randrange(prefixes << 8).to_bytes(4, "big") for _ in range(100)]
    CountingDict.asked = 0
    for address in addresses:
        assert allowed.lookup(address) is not None
    assert CountingDict.asked <= 100
