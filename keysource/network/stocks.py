"""How much key every link of the map has now, as its nodes said last; and which ways to leave alone for a while."""

from __future__ import annotations

from keysource.network.core import Core, LinkState
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
    """The initiator's view; and before a link is used at all, whether our store is behind what its other end saw."""

    def __init__(self, core: Core, *, everybody: bool) -> None:
        self._core, self._everybody = core, everybody
        self._said: dict[str, tuple[float, dict[str, LinkStock]]] = {}
        self._next_ask = float("-inf")
        self._shunned: dict[str | tuple[str, str], float] = {}

    def tick(self, now: float) -> None:
        """An initiator asks everybody all along; every node its neighbours until it has compared."""
        if now < self._next_ask:
            return
        self._next_ask = now + ASK_EVERY
        states = self._core.links.values()
        asked = [state.entry.other(self._core.name) for state in states if not state.compared and not state.behind]
        if self._everybody:
            asked = [node.id for node in self._core.topology.node if node.id != self._core.name]
        for node in asked:
            self._core.send(node, Ask())

    def next_time(self) -> float:
        waiting = any(not state.compared and not state.behind for state in self._core.links.values())
        return self._next_ask if waiting or self._everybody else float("inf")

    def heard(self, sender: str, stock: Stock, now: float) -> None:
        mine = {link.name for link in self._core.topology.links_of(sender)}
        self._said[sender] = now, {link.link: link for link in stock.links if link.link in mine}
        for link in stock.links:
            state = self._core.links.get(link.link)
            if state and not state.compared and not state.behind and state.entry.other(self._core.name) == sender:
                self._compare(state, (link.seen_block, link.seen_position))

    def _compare(self, state: LinkState, seen: tuple[int, int]) -> None:
        name = state.entry.name
        if self._core.store.is_behind(name, seen):
            state.behind = True
            self._core.tell("behind", link=name, reason="the store is older than what the other end saw of it")
        else:
            state.compared = True

    def own(self) -> Stock:
        """What this node says when it is asked."""
        links = []
        for name, state in self._core.links.items():
            units = self._core.store.sendable(name, _MOST_TOLD) if state.compared else 0
            block, position = self._core.store.seen(name)
            links.append(
                LinkStock(
                    link=name,
                    units=units,
                    up=state.up,
                    alarm=bool(state.alarm),
                    seen_block=block,
                    seen_position=position,
                )
            )
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
                    found[(left, right)] = max(end.units, found.get((left, right), 0))
        return found

    def _is_shunned(self, what: str | tuple[str, str], now: float) -> bool:
        return self._shunned.get(what, float("-inf")) > now
