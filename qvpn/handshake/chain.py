"""The chain from epoch to epoch (PROTOCOL.md, chapter 5, "Chain")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qvpn.handshake.schedule import chain_id
from qvpn.wire.messages import NO_CHAIN, WireOrigin


@dataclass(frozen=True, slots=True)
class Link:
    """One chain secret and what it holds."""

    secret: bytes = field(repr=False)
    epoch: int
    """Number of the epoch that made it."""
    qkd_at: float | None = None
    """When (draw or fetch) the last key of a source entered it, in seconds of the daemon's clock; None: never."""
    qkd_origin: WireOrigin | None = None

    @property
    def id(self) -> bytes:
        return chain_id(self.secret)


@dataclass(frozen=True, slots=True)
class Offer:
    """The links an attempt offered, newest first; a copy of its own, so that erasure elsewhere does not hurt it."""

    new: Link | None = None
    old: Link | None = None

    @property
    def ids(self) -> tuple[bytes, bytes]:
        return (self.new.id if self.new else NO_CHAIN, self.old.id if self.old else NO_CHAIN)

    def selected(self, which: int) -> Link | None:
        """By chain_sel: 0 none, 1 new, 2 old."""
        return (None, self.new, self.old)[which]


class Chain:
    """The pair a side keeps: C_next of its newest epoch, and the C_prev which that handshake selected."""

    def __init__(self) -> None:
        self._new: Link | None = None
        self._old: Link | None = None

    def offer(self) -> Offer:
        return Offer(self._new, self._old)

    @property
    def expected(self) -> bool:
        """True once there was an epoch: a handshake without a common chain is then worth a word."""
        return self._new is not None

    def select(self, chain_new: bytes, chain_old: bytes) -> tuple[int, Link | None]:
        """R: the first of the offered ids that we have, as (chain_sel, link)."""
        for which, offered in ((1, chain_new), (2, chain_old)):
            if offered == NO_CHAIN:
                continue
            for link in (self._new, self._old):
                if link is not None and link.id == offered:
                    return which, link
        return 0, None

    def advance(self, new: Link, selected: Link | None) -> None:
        """A new epoch: I at M4, R at the first record."""
        self._new, self._old = new, selected

    def confirmed(self, link: Link) -> None:
        """A record of the epoch that made ``link`` has verified: what was before it is erased."""
        if self._new is link:
            self._old = None


def next_link(secret: bytes, selected: Link | None, epoch: int) -> Link:
    """The link of an epoch without a fresh key: what the chain held before, it still holds."""
    if selected is None:
        return Link(secret, epoch)
    return replace(selected, secret=secret, epoch=epoch)
