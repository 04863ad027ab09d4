"""How much key every link of the map has now, as its nodes said last; and which ways to leave alone for a while."""

from __future__ import annotations

from keysource.network.core import Core
from keysource.network.messages import Ask, LinkStock, Stock

ASK_EVERY = 1.0
STALE = 3.5
"""Who said nothing for so long is not there."""
_MOST_TOLD = 20_000
"""Units; more than any block costs many times over."""
SHUN_LINK = 3.0
SHUN_LATE = 5.0
SHUN_ALTERED = 60.0


class Stocks:
    """The initiator's view."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._said: dict[str, tuple[float, dict[str, LinkStock]]] = {}
        self._next_ask = float("-inf")
        self._shunned: dict[str | tuple[str, str], float] = {}

    def tick(self, now: float) -> None:
        if now >= self._next_ask:
            self._next_ask = now + ASK_EVERY
            for node in self._core.topology.node:
                if node.id != self._core.name:
                    self._core.send(node.id, Ask())

    def next_time(self) -> float:
        return self._next_ask

    def heard(self, sender: str, stock: Stock, now: float) -> None:
        mine = {link.name for link in self._core.topology.links_of(sender)}
        self._said[sender] = now, {link.link: link for link in stock.links if link.link in mine}

    def own(self) -> Stock:
        """What this node says when it is asked."""
        links = []
        for name, state in self._core.links.items():
            units = self._core.store.sendable(name, _MOST_TOLD)
            links.append(LinkStock(link=name, units=units, up=state.up, alarm=bool(state.alarm)))
        return Stock(links=tuple(links))

    def shun_link(self, left: str, right: str, until: float) -> None:
        self._shunned[(left, right)] = self._shunned[(right, left)] = until

    def shun_node(self, node: str, until: float) -> None:
        self._shunned[node] = until

    def capacity(self, now: float, *, only_up: bool) -> dict[tuple[str, str], int]:
        """(from, to) -> units that can go.  ``only_up``: leave out links that live on their stock."""
        known = {node: links for node, (at, links) in self._said.items() if now - at < STALE}
        known[self._core.name] = {link.link: link for link in self.own().links}
        found: dict[tuple[str, str], int] = {}
        for link in self._core.topology.link:
            ends = [known.get(end, {}).get(link.name) for end in link.ends]
            if any(end is None or end.alarm or (only_up and not end.up) for end in ends):
                continue
            for (left, right), end in zip((link.ends, link.ends[::-1]), ends, strict=True):
                if end is not None and not any(self._is_shunned(what, now) for what in (left, right, (left, right))):
                    found[(left, right)] = end.units
        return found

    def _is_shunned(self, what: str | tuple[str, str], now: float) -> bool:
        return self._shunned.get(what, float("-inf")) > now
