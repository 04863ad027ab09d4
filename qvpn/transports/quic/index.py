"""How connections are found: by connection ID when a packet comes, by the other end's address to send something."""

from __future__ import annotations

from collections.abc import Iterator

from qvpn.netio.base import Address
from qvpn.transports.quic.link import Link


class Index:
    """All connections of one port."""

    def __init__(self) -> None:
        self.by_cid: dict[bytes, Link] = {}
        self.at: dict[Address, Link] = {}
        """By the other end's UDP address: the connection that leads there."""
        self.accepted: dict[int, Link] = {}
        """Those that were opened to us, by number."""
        self.last: tuple[Address | None, Link | None] = (None, None)
        """What the last look for an address found; of no meaning after any change."""
        self._all: dict[int, Link] = {}

    def __iter__(self) -> Iterator[Link]:
        """From the oldest on."""
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, link: Link) -> bool:
        return self._all.get(id(link)) is link

    def add(self, link: Link, cids: set[bytes]) -> None:
        """A new connection, which is also found by these names."""
        link.cids |= cids
        self._all[id(link)] = link
        if not link.client:
            self.accepted[link.address.via] = link
        self.register(link)

    def register(self, link: Link) -> None:
        """Enter it under its connection IDs and its address.  A connection that was there before keeps its IDs."""
        for cid in [cid for cid, owner in self.by_cid.items() if owner is link and cid not in link.cids]:
            del self.by_cid[cid]
        for cid in link.cids:
            self.by_cid.setdefault(cid, link)
        there = self.at.get(link.place)
        if there is None or there.ended or not there.up or (link.up and link.rank >= there.rank):
            self.at[link.place] = link
        link.listed, link.renamed = link.up, False
        self.last = (None, None)

    def follow(self, link: Link) -> None:
        """Its other end may have moved, or been told new names."""
        moved = link.moved()
        if moved or link.renamed:
            self.register(link)
        if moved:
            here = {link.place, *link.aliases}
            for gone in [each for each, owner in self.at.items() if owner is link and each not in here]:
                del self.at[gone]

    def lead(self, place: Address, link: Link) -> None:
        """What is to go to that address goes by this connection from now on."""
        self.at[place] = link
        self.last = (None, None)

    def remove(self, link: Link) -> bool:
        """It is not to be found any more; others with its address may be.  False if there was none."""
        if self._all.pop(id(link), None) is None:
            return False
        self.accepted.pop(link.address.via, None)
        for cid in [cid for cid, owner in self.by_cid.items() if owner is link]:
            del self.by_cid[cid]
        for place in [place for place, owner in self.at.items() if owner is link]:
            del self.at[place]
            for other in self:
                if other.place == place:
                    self.register(other)
        self.last = (None, None)
        return True
