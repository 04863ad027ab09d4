"""The links of a KME: several may lead to one other KME, two fibres for redundancy, and each has a stock of its own.

A *stock* is the name under which a link's units lie in the store: that of the other KME, and where it has more than
one link, of those with a ``name`` the KME's name with theirs.  On the wire a link goes by the name that its devices
say; how a site calls it is its own matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from keysource.kme.config import KmeConfig
from keysource.kme.records import LinkRow


@dataclass(slots=True)
class LinkState:
    """What is known of a link and its device now."""

    peer: str
    """The KME at the other end."""
    stock: str
    row: LinkRow | None = None
    """None before the device has ever said hello."""
    connected: bool = False
    trouble: str = "the device was not reached yet"
    alarms: dict[str, str] = field(default_factory=dict)
    qber: float | None = None
    key_rate: float | None = None
    hops: int = 0
    """Of the last block."""
    paths: tuple[tuple[str, ...], ...] = ()
    """Of the last block, where it was relayed."""

    @property
    def alarm(self) -> str:
        """Empty where there is none."""
        return "; ".join(f"{kind}: {detail}" if detail else kind for kind, detail in self.alarms.items())


def links_of(config: KmeConfig) -> dict[str, LinkState]:
    """By stock.  A KME without a link has one all the same, whose device never says anything."""
    found = {link.stock: LinkState(link.peer_kme, link.stock) for link in config.link}
    for peer in config.peer_kme:
        if not any(link.peer == peer.id for link in found.values()):
            found[peer.id] = LinkState(peer.id, peer.id)
    return found


def links_to(links: dict[str, LinkState], peer: str) -> list[LinkState]:
    """Those to one KME."""
    return [link for link in links.values() if link.peer == peer]


def link_named(links: dict[str, LinkState], peer: str, name: str) -> LinkState | None:
    """Which link the other KME means: the one whose device says that name, or one whose device said nothing yet."""
    mine = links_to(links, peer)
    known = next((link for link in mine if link.row is not None and link.row.name == name), None)
    return known or next((link for link in mine if link.row is None), None)


def shared_out(free: dict[str, int], number: int) -> dict[str, int]:
    """Of which stock how many keys: of the fullest what it has, then of the next; none where all have too few."""
    parts: dict[str, int] = {}
    for stock in sorted(free, key=lambda stock: (-free[stock], stock)):
        if part := min(number, free[stock]):
            parts[stock], number = part, number - part
    return {} if number else parts
