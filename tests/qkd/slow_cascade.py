"""Cascade one bit and one interval at a time: sets of key positions, every parity counted anew, no tables.

It has both keys, so it needs nobody to ask; what it says Bob asks, and in what order, is what the quick one must ask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from keysource.qkd.distill.layout import Layout, orders

Asked = tuple[int, list[int]]
"""(number of the pass, positions)."""


@dataclass(eq=False)
class Interval:
    """A node of a pass at one lane."""

    number: int
    level: int
    place: int
    lane: int
    size: float
    words: list[int]
    left: Interval | None = None
    right: Interval | None = None

    def name(self, first: dict[int, int], lanes: int) -> int:
        """As a question has it: nodes are counted level by level, leaves first."""
        return (first[self.level] + self.place) * lanes + self.lane


@dataclass
class SlowBob:
    alice: list[int]
    bits: list[int]
    seed: bytes
    sizes: list[int]
    lanes: int
    asked: list[Asked] = field(default_factory=list)
    known: list[Interval] = field(default_factory=list)
    """Intervals with a known parity that are not halved."""

    def run(self) -> None:
        self.words = -(-len(self.bits) // self.lanes)
        laned = [min(size, self.words) for size in self.sizes if size]
        self.firsts: list[dict[int, int]] = []
        for number, (size, order) in enumerate(zip(laned, orders(self.words, self.seed, len(laned)), strict=True)):
            self._open(number, size, order.tolist())
            self._settle()
        if len(laned) < len(self.sizes):
            self._subsets(len(laned))

    def odd(self, words: list[int], lane: int) -> int:
        places = [word * self.lanes + lane for word in words]
        return sum(self.alice[p] ^ self.bits[p] for p in places if p < len(self.bits)) & 1

    def _open(self, number: int, size: int, order: list[int]) -> None:
        levels = 0
        while 2**levels < size:
            levels += 1
        blocks = [order[at : at + size] for at in range(0, self.words, size)]
        self.firsts.append({})
        for level in range(levels + 1):
            self.firsts[number][level] = sum(len(blocks) * 2 ** (levels - lower) for lower in range(level))
        opened = [
            self._grown(number, levels, place, lane, size / 2**levels, self._spread(block, size, levels))
            for place, block in enumerate(blocks)
            for lane in range(self.lanes)
        ]
        asked = opened if number == 0 else opened[: -self.lanes]
        if asked:
            self.asked.append((number, [each.name(self.firsts[number], self.lanes) for each in asked]))
        self.known += opened

    def _spread(self, block: list[int], size: int, levels: int) -> list[int | None]:
        leaves: list[int | None] = [None] * 2**levels
        for inside, word in enumerate(block):
            leaves[inside * 2**levels // size] = word
        return leaves

    def _grown(
        self, number: int, level: int, place: int, lane: int, unit: float, leaves: list[int | None]
    ) -> Interval:
        words = [word for word in leaves if word is not None]
        grown = Interval(number, level, place, lane, unit * 2**level, words)
        if level:
            half = len(leaves) // 2
            grown.left = self._grown(number, level - 1, 2 * place, lane, unit, leaves[:half])
            grown.right = self._grown(number, level - 1, 2 * place + 1, lane, unit, leaves[half:])
        return grown

    def _settle(self) -> None:
        while True:
            odd = [each for each in self.known if self.odd(each.words, each.lane)]
            if not odd:
                return
            best = min(odd, key=lambda each: (each.size, each.number))
            chosen = [each for each in odd if each.number == best.number]
            single = [each for each in chosen if each.level == 0]
            for each in single:
                self.bits[each.words[0] * self.lanes + each.lane] ^= 1
            if not single:
                self._halve(chosen)

    def _halve(self, chosen: list[Interval]) -> None:
        first = self.firsts[chosen[0].number]
        asked = [each.left.name(first, self.lanes) for each in chosen if each.left.words and each.right.words]
        if asked:
            self.asked.append((chosen[0].number, sorted(asked)))
        for each in chosen:
            self.known.remove(each)
            self.known += [each.left, each.right]

    def _subsets(self, number: int) -> None:
        """The masks and spans are the layout's: the tests hold those against words of their own."""
        layout = Layout(len(self.bits), self.seed, self.sizes, self.lanes)
        heard: set[int] = set()
        self.asked.append((number, [layout.position(subset, 1) for subset in range(layout.subsets)]))
        while True:
            late = [s for s in range(layout.subsets) if self._differs(layout.members(number, layout.position(s, 1)))]
            if not late:
                return
            node = 1
            while node < 1 << layout.depth:
                left, right = (layout.members(number, layout.position(late[0], 2 * node + half)) for half in (0, 1))
                node *= 2
                place = layout.position(late[0], node)
                if len(left) and len(right) and place not in heard:
                    heard.add(place)
                    self.asked.append((number, [place]))
                node += not self._differs(left)
            (wrong,) = layout.members(number, layout.position(late[0], node)).tolist()
            self.bits[wrong] ^= 1
            self._settle()

    def _differs(self, members: np.ndarray) -> bool:
        return bool(sum(self.alice[p] ^ self.bits[p] for p in members.tolist()) & 1)
