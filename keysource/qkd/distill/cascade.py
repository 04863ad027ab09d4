"""Error correction by Cascade with sub-block reuse.  Sans-IO; Alice's key is the reference.

``distill.layout`` says how each pass arranges the key: as many frames side by side as fit a machine word, each pass
with trees of blocks that are halved down to single bits.  Bob asks for parities of *nodes* of those trees.  Each
answer costs one bit of key and is kept: the parity of a node's other half follows, so after a correction the smallest
known interval around the bit is odd in every pass, and bisection goes on there.  All odd intervals of one pass are
disjoint, so they are bisected in lock-step, one message for all frames.

After the laned passes few errors are left.  The parities of some random halves of the whole key find them: all are
asked in one message, and one that differs is bisected.  Alice's parities never change, so what was answered once is
never asked again.

Bob works on differences only: an interval is *odd* where Alice's parity is not his own.
Brassard/Salvail, Eurocrypt '93; sub-block reuse as in Martinez-Mateo et al., arXiv:1407.3257.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill.bits import Bits
from keysource.qkd.distill.layout import Layout, Places, Words
from keysource.qkd.errors import BadFrame

SCHEDULES = ("original", "optimised")
_ONE = np.uint64(1)


def block_sizes(bits: int, error_ratio: float, schedule: str = "optimised") -> list[int]:
    """Block length of each pass (0: a random half of everything), for a key of ``bits`` bits and the *design* error
    ratio, never the data's own.

    ``original``: 0.73/Q, doubled in each of four passes: few messages.  ``optimised``: powers of two as in option (8)
    of arXiv:1407.3257, but the second half as long, which costs little and saves half of the hundreds of messages; f
    about 1.03 in keys of 10^6 bits.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    ratio = min(max(error_ratio, 1e-4), 0.25)
    half = -(-bits // 2)
    if schedule == "original":
        first = math.ceil(0.73 / ratio)
        sizes = [first << number for number in range(4)]
    else:
        exponent = math.log2(1.0 / ratio)
        first, second = 2 ** math.ceil(exponent - 0.5), 2 ** math.ceil((exponent + 9.5) / 2.0)
        sizes = [first, second, 4096]
    return [min(size, half) for size in sizes] + [0] * (10 if bits < 1 << 16 else 14)


@dataclass(frozen=True, slots=True)
class Question:
    """Bob asks for parities of one pass, positions strictly ascending.

    Of a laned pass: a node of its trees, counted from 0, times the lanes, plus the lane.  The number after the last
    laned pass means the subsets: ``Layout.position`` of subset and node.
    """

    number: int
    positions: npt.NDArray[np.uint32]


class Reference:
    """Alice's side: answers questions, each parity once."""

    def __init__(self, bits: Bits, seed: bytes, sizes: Sequence[int], lanes: int | None = None) -> None:
        self._layout = Layout(len(bits), seed, sizes, lanes)
        self._words = self._layout.pack(bits)
        self._grown: list[Words | None] = [None] * len(self._layout.trees)  # worked out when first asked
        self._asked = np.zeros(self._layout.nodes, dtype=np.uint64)
        self._named: set[int] = set()
        self._prefixes: dict[int, Words] = {}

    def answer_untrusted(self, question: Question) -> Bits:
        """Raises :class:`BadFrame` for a question that an honest Bob does not ask."""
        where = question.positions.astype(np.int64)
        passes = len(self._layout.trees)
        if question.number > passes or not len(where):
            raise BadFrame("a parity question for no pass or no position")
        if (np.diff(where) <= 0).any():
            raise BadFrame("a parity question whose positions do not ascend")
        return self._laned(question.number, where) if question.number < passes else self._of_subsets(where)

    def _laned(self, number: int, where: Places) -> Bits:
        layout, trees = self._layout, self._layout.trees[number]
        node, lane = where >> layout.shift, (where & (layout.lanes - 1)).astype(np.uint64)
        if trees.base + node[-1] >= trees.end:
            raise BadFrame("a parity question for a position outside the key")
        asked = self._asked[trees.base : trees.end]
        if ((asked[node] >> lane) & _ONE).any():
            raise BadFrame("a parity question for a position that was answered before")
        np.bitwise_or.at(asked, node, _ONE << lane)
        grown = self._grown[number]
        if grown is None:
            grown = self._grown[number] = trees.grow(self._words)
        answers: Bits = ((grown[node] >> lane) & _ONE).astype(np.uint8)
        return answers

    def _of_subsets(self, where: Places) -> Bits:
        layout, answers = self._layout, list[int]()
        for position in where.tolist():
            subset, node = layout.node(position)
            if subset >= layout.subsets or node < 1:
                raise BadFrame("a parity question for a position outside the key")
            if position in self._named:
                raise BadFrame("a parity question for a position that was answered before")
            self._named.add(position)
            if subset not in self._prefixes:
                self._prefixes[subset] = _prefix(self._words & layout.masks[subset])
            answers.append(_parity(self._prefixes[subset], layout.span(node)))
        return np.array(answers, dtype=np.uint8)


def _prefix(words: Words) -> Words:
    """Element w: the first w words, all added up lane by lane."""
    prefix = np.zeros(len(words) + 1, dtype=np.uint64)
    np.bitwise_xor.accumulate(words, out=prefix[1:])
    return prefix


def _parity(prefix: Words, span: tuple[int, int, int]) -> int:
    first, last, lanes = span
    return (int(prefix[last] ^ prefix[first]) & lanes).bit_count() & 1


class _Paths:
    """From a bit up to its block, in all laned passes at once: tables for :meth:`Corrector._flip`.

    A *row* is one level of one pass; rows follow each other pass by pass, leaves first.
    """

    def __init__(self, layout: Layout) -> None:
        trees = layout.trees
        levels = np.array([tree.levels for tree in trees], dtype=np.int64)
        self.first = np.concatenate([tree.rows for tree in trees])
        self.up = np.concatenate([np.arange(count + 1, dtype=np.int64) for count in levels])
        self.of = np.repeat(np.arange(len(trees), dtype=np.int64), levels + 1)
        self.ends = np.cumsum(levels + 1)
        self.starts = self.ends - (levels + 1)
        self.leaf = np.empty((len(trees), layout.words), dtype=np.int64)
        for number, tree in enumerate(trees):
            self.leaf[number, tree.order] = tree.leaves

    def nodes(self, passes: int, word: Places) -> Places:
        """Shape (rows of the first ``passes`` passes, words): the nodes above each."""
        rows = int(self.ends[passes - 1])
        leaf = self.leaf[:passes, word]
        found: Places = self.first[:rows, None] + (leaf[self.of[:rows]] >> self.up[:rows, None])
        return found


class Corrector:
    """Bob's side.  ``run`` yields questions and is sent the answers; ``bits`` ends up corrected.

    It raises :class:`BadFrame` for answers that cannot all be true: without that they would keep Bob busy for ever.
    An odd interval is known by one number, node x lanes + lane, its *name*.
    """

    def __init__(self, bits: Bits, seed: bytes, sizes: Sequence[int], lanes: int | None = None) -> None:
        self._layout = layout = Layout(len(bits), seed, sizes, lanes)
        self._words = layout.pack(bits)
        self._corrected = np.zeros_like(self._words)
        self._own = np.zeros(layout.nodes, dtype=np.uint64)
        """Bob's parity of each node, in passes that are open."""
        self._split = np.zeros(layout.nodes, dtype=np.uint64)
        """Lanes in which a node's halves are known."""
        self._filled = np.concatenate([trees.filled() for trees in layout.trees])
        self._level = np.empty(layout.nodes, dtype=np.int8)
        self._word = np.zeros(layout.nodes, dtype=np.int64)
        for trees in layout.trees:
            widths = np.diff(trees.rows, append=trees.end)
            self._level[trees.base : trees.end] = np.repeat(np.arange(trees.levels + 1, dtype=np.int8), widths)
            self._word[trees.base + trees.leaves] = trees.order
        self._paths = _Paths(layout)
        self._starts = np.array([trees.base for trees in layout.trees] + [layout.nodes]) << layout.shift
        self._passes = 0
        self._odd: Places = np.empty(0, dtype=np.int64)
        """Names of the odd intervals that are known and not halved, ascending."""
        self._late: Bits | None = None
        """Which subsets are odd, once they were asked for."""
        self._heard: dict[int, int] = {}

    @property
    def bits(self) -> Bits:
        return self._layout.unpack(self._words)

    def run(self) -> Generator[Question, Bits, None]:
        for number in range(len(self._layout.trees)):
            yield from self._open(number)
            yield from self._settle()
        if self._layout.subsets:
            yield from self._search()

    # Laned passes

    def _open(self, number: int) -> Generator[Question, Bits, None]:
        """Ask for the blocks of a new pass.  The first pass tells the parity of every lane, and by now it is even: in
        the others the last block follows."""
        layout, trees = self._layout, self._layout.trees[number]
        self._own[trees.base : trees.end] = trees.grow(self._words)
        self._passes = number + 1
        lanes = np.arange(layout.lanes, dtype=np.int64)
        mine = (self._own[trees.tops][:, None] >> lanes.astype(np.uint64)) & _ONE
        differs = np.zeros(mine.shape, dtype=np.uint8)
        count = trees.blocks - (number > 0)
        if count:
            where = ((trees.tops[:count] - trees.base)[:, None] << layout.shift) + lanes
            answers = yield Question(number, where.reshape(-1).astype(np.uint32))
            differs[:count] = answers.reshape(count, -1) ^ mine[:count].astype(np.uint8)
        if number:
            differs[-1] = np.bitwise_xor.reduce(differs[:-1], axis=0)
        block, lane = np.nonzero(differs)
        self._odd = (trees.tops[block] << layout.shift) + lane

    def _settle(self) -> Generator[Question, Bits, None]:
        """Until no interval that is known is odd."""
        while len(self._odd):
            number, chosen, others = self._shortest()
            node, lane = chosen >> self._layout.shift, (chosen & (self._layout.lanes - 1)).astype(np.uint64)
            single = self._level[node] == 0
            if single.any():
                self._fix(self._word[node[single]], lane[single])
            else:
                halves = yield from self._halve(number, node, lane)
                self._odd = np.concatenate([others, halves])
                self._odd.sort()

    def _shortest(self) -> tuple[int, Places, Places]:
        """(the pass that holds the shortest odd interval, its odd intervals, those of other passes)."""
        cuts = np.searchsorted(self._odd, self._starts[: self._passes + 1]).tolist()
        levels = self._level[self._odd >> self._layout.shift]
        found = []
        for number, (low, high) in enumerate(pairwise(cuts)):
            if low < high:
                trees = self._layout.trees[number]
                length = trees.size * 2.0 ** (int(levels[low:high].min()) - trees.levels)
                found.append((length, number, low, high))
        _length, number, low, high = min(found)
        return number, self._odd[low:high], np.concatenate([self._odd[:low], self._odd[high:]])

    def _halve(self, number: int, node: Places, lane: Words) -> Generator[Question, Bits, Places]:
        """Ask for the left halves; the names of the halves that are odd.  Where only one half has any words there is
        nothing to ask."""
        shift, trees = self._layout.shift, self._layout.trees[number]
        level = self._level[node]
        left = trees.rows[level - 1] + 2 * (node - trees.rows[level])
        odd_left = self._filled[left]
        both = odd_left & self._filled[left + 1]
        asked, of = left[both], lane[both]
        if len(asked):
            where = ((asked - trees.base) << shift) + of.astype(np.int64)
            answers = yield Question(number, where.astype(np.uint32))
            odd_left[both] = ((self._own[asked] >> of) & _ONE).astype(np.uint8) != answers
        np.bitwise_or.at(self._split, node, _ONE << lane)
        halves: Places = ((left + ~odd_left) << shift) + lane.astype(np.int64)
        return halves

    def _fix(self, word: Places, lane: Words) -> None:
        """These bits are wrong."""
        one = _ONE << lane
        if (self._corrected[word] & one).any():  # each correction is Alice's own bit: honest answers never undo it
            raise BadFrame("parities that contradict each other")
        np.bitwise_or.at(self._corrected, word, one)
        np.bitwise_xor.at(self._words, word, one)
        self._odd = _toggled(self._odd, self._flip(word, lane, one))
        if self._late is not None:
            inside = (self._layout.masks[:, word] >> lane) & _ONE
            self._late ^= np.bitwise_xor.reduce(inside, axis=1).astype(np.uint8)

    def _flip(self, word: Places, lane: Words, one: Words) -> Places:
        """Correct Bob's parities of all nodes above; the names of the smallest known intervals around the bits, one
        in each open pass."""
        paths, passes = self._paths, self._passes
        nodes = paths.nodes(passes, word)
        np.bitwise_xor.at(self._own, nodes.reshape(-1), np.broadcast_to(one, nodes.shape).reshape(-1))
        split = ((self._split[nodes] >> lane) & _ONE).astype(np.int64)
        halved = np.add.reduceat(split, paths.starts[:passes], axis=0)
        smallest = np.take_along_axis(nodes, paths.ends[:passes, None] - 1 - halved, axis=0)
        return ((smallest << self._layout.shift) + lane.astype(np.int64)).reshape(-1)

    # Subsets

    def _search(self) -> Generator[Question, Bits, None]:
        """Errors that all laned passes have missed."""
        layout = self._layout
        tops = [layout.position(subset, 1) for subset in range(layout.subsets)]
        answers = yield self._of_subsets(tops)
        sums = np.bitwise_xor.reduce(layout.masks & self._words, axis=1)
        self._late = answers ^ np.array([each.bit_count() & 1 for each in sums.tolist()], dtype=np.uint8)
        while self._late.any():
            word, lane = yield from self._bisect(int(self._late.argmax()))
            self._fix(np.array([word]), np.array([lane], dtype=np.uint64))
            yield from self._settle()

    def _bisect(self, subset: int) -> Generator[Question, Bits, tuple[int, int]]:
        """(word, lane) of a wrong bit of an odd subset."""
        layout, mask, node = self._layout, self._layout.masks[subset], 1
        prefix = _prefix(mask & self._words)

        def anything(span: tuple[int, int, int]) -> bool:
            return bool((mask[span[0] : span[1]] & np.uint64(span[2])).any())

        while node < 1 << layout.depth:
            left, right = layout.span(2 * node), layout.span(2 * node + 1)
            node *= 2
            if not anything(right):
                continue
            if anything(left):
                place = layout.position(subset, node)
                if place not in self._heard:
                    self._heard[place] = int((yield self._of_subsets([place]))[0])
                node += self._heard[place] == _parity(prefix, left)
            else:
                node += 1
        word, _last, lanes = layout.span(node)
        return word, lanes.bit_length() - 1

    def _of_subsets(self, places: list[int]) -> Question:
        return Question(len(self._layout.trees), np.array(places, dtype=np.uint32))


def _toggled(names: Places, changed: Places) -> Places:
    """What is in one of them and not in the other; in ``changed`` one may be several times, and each time counts."""
    every = np.concatenate([names, changed])
    every.sort()
    first = np.flatnonzero(np.diff(every, prepend=-1))
    times = np.diff(first, append=len(every))
    odd: Places = every[first[(times & 1) == 1]]
    return odd
