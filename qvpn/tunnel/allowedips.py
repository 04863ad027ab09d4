"""Which peer owns an inner address: longest prefix match over all peers' allowed IPs, in both directions.

One dictionary per prefix length that occurs, asked from the longest down, with a bounded cache of whole addresses in
front.  So a look-up costs one dictionary access for an address seen lately, and at most one per *distinct length*
otherwise, however many peers and prefixes there are.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

PeerT = TypeVar("PeerT", bound=Hashable)
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

CACHE_ENTRIES = 8192
"""Addresses remembered; at this number the cache starts afresh, so a scan of addresses cannot make it grow."""


class PrefixTaken(ValueError):
    """The same prefix is already another peer's."""


class _Table(Generic[PeerT]):
    """Prefixes of one address family, by length."""

    __slots__ = ("_by_length", "_width")

    def __init__(self, width: int) -> None:
        self._width = width
        self._by_length: dict[int, dict[int, PeerT]] = {}

    def owner(self, prefix: int, length: int) -> PeerT | None:
        return self._by_length.get(length, {}).get(prefix)

    def add(self, prefix: int, length: int, peer: PeerT) -> None:
        if length not in self._by_length:
            self._by_length[length] = {}
            self._by_length = dict(sorted(self._by_length.items(), reverse=True))
        self._by_length[length][prefix] = peer

    def remove(self, peer: PeerT) -> None:
        for length, prefixes in list(self._by_length.items()):
            kept = {prefix: owner for prefix, owner in prefixes.items() if owner != peer}
            if kept:
                self._by_length[length] = kept
            else:
                del self._by_length[length]

    def find(self, address: bytes) -> PeerT | None:
        value = int.from_bytes(address, "big")
        width = self._width
        for length, prefixes in self._by_length.items():
            peer = prefixes.get(value >> (width - length))
            if peer is not None:
                return peer
        return None


class AllowedIPs(Generic[PeerT]):
    """All peers' prefixes.  Addresses are looked up as the 4 or 16 bytes that stand in the packet.

    A *peer* is whatever the caller keeps for one; its text stands in error messages.
    """

    def __init__(self) -> None:
        self._tables: dict[int, _Table[PeerT]] = {4: _Table(32), 16: _Table(128)}
        self._cache: dict[bytes, PeerT | None] = {}

    def add(self, peer: PeerT, networks: Iterable[IPNetwork]) -> None:
        """Give prefixes to a peer, all or none.  Raises :class:`PrefixTaken` if another peer has one of them."""
        wanted = [(_split(network), network) for network in networks]
        for (size, prefix, length), network in wanted:
            owner = self._tables[size].owner(prefix, length)
            if owner is not None and owner != peer:
                raise PrefixTaken(f"allowed IPs {network} of peer {peer} already belong to peer {owner}")
        for (size, prefix, length), _ in wanted:
            self._tables[size].add(prefix, length, peer)
        self._cache.clear()

    def remove(self, peer: PeerT) -> None:
        """Forget a peer."""
        for table in self._tables.values():
            table.remove(peer)
        self._cache.clear()

    def lookup(self, address: bytes) -> PeerT | None:
        """The peer with the longest prefix that holds this address (4 or 16 bytes), or None."""
        cache = self._cache
        try:
            return cache[address]
        except KeyError:
            pass
        table = self._tables.get(len(address))
        peer = table.find(address) if table is not None else None
        if len(cache) >= CACHE_ENTRIES:
            cache.clear()
        cache[address] = peer
        return peer


def _split(network: IPNetwork) -> tuple[int, int, int]:
    """(address bytes, prefix as a number, prefix length)."""
    width = network.max_prefixlen
    return width // 8, int(network.network_address) >> (width - network.prefixlen), network.prefixlen
