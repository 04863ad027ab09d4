"""How Cascade's passes arrange a key: public, the same at both ends, worked out from the block's seed.

The key is a table of *words*: bit b stands in word ``b // lanes`` at lane ``b % lanes``.  The lanes are frames that
are corrected in lock-step under the same orders: what is done to a word is done to up to 64 frames at once, so an
order or a tree of parities costs a 64th of what it would cost bit by bit.  Errors in different lanes have nothing to
do with each other, so each lane is corrected as well as if it had orders of its own.

A *laned* pass puts the words into an order of its own and cuts it into blocks.  Each block is the root of a tree that
halves it down to single words; a *node* of the tree at one lane is an interval of one frame.  A block of a length
that is no power of two is spread over the leaves of the next one, so its halves are as equal as they can be.

A *subset* is half of the whole key, all lanes together, chosen at random; its tree halves it in the key's own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill.bits import Bits
from keysource.qkd.optics.settings import keystream

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
MOST_LANES = 64
LEAST_WORDS, LEAST_BLOCKS = 8192, 16
"""Of a lane.  Short frames are corrected with more leakage: two errors of one block share a block of the next pass
the more often, the fewer blocks it has."""


def lanes_of(bits: int, longest: int) -> int:
    """How many frames a key of this length is, whose longest block is ``longest`` bits of one."""
    least, lanes = max(LEAST_WORDS, LEAST_BLOCKS * longest), 1
    while lanes < MOST_LANES and bits // (2 * lanes) >= least:
        lanes *= 2
    return lanes


def orders(length: int, seed: bytes, passes: int) -> list[Places]:
    """The order of each pass: the first as the key stands, the others by sorting an AES keystream.

    The low bits of each word are its place, so the words are sorted themselves, which is several times quicker than
    sorting places by them, and equal words have one order.
    """
    result: list[Places] = [np.arange(length, dtype=np.int64)]
    mask = np.uint64((1 << max(1, (length - 1).bit_length())) - 1)
    for number in range(1, passes):
        words = _stream(seed, number, length)
        words &= ~mask
        words |= result[0].view(np.uint64)
        words.sort()
        words &= mask
        result.append(words.view(np.int64))
    return result


def _stream(seed: bytes, number: int, length: int) -> Words:
    """Keystream of pass ``number``."""
    first = np.uint64(number) << np.uint64(40)
    return keystream(seed, np.arange((length + 1) // 2, dtype=np.uint64) + first).reshape(-1)[:length]


@dataclass(frozen=True, slots=True)
class Trees:
    """One laned pass.  Nodes are numbered from ``base``, leaves first: ``rows[t] + q`` is node q of those that span
    ``2^t`` leaves; the blocks are the last row."""

    size: int
    """Bits of a block in one lane."""
    blocks: int
    base: int
    rows: Places
    leaves: Places
    """Of each word of the pass's order: its leaf, counted from 0."""
    order: Places

    @property
    def levels(self) -> int:
        """Of a block: it spans ``2^levels`` leaves."""
        return len(self.rows) - 1

    @property
    def end(self) -> int:
        """The number after the last node."""
        return int(self.rows[-1]) + self.blocks

    @property
    def tops(self) -> Places:
        """The blocks' nodes."""
        return np.arange(self.rows[-1], self.end, dtype=np.int64)

    def grow(self, words: Words) -> Words:
        """The parities of all nodes, lane by lane, from the key's words."""
        level = np.zeros(self.blocks << self.levels, dtype=np.uint64)
        level[self.leaves] = words[self.order]
        grown: Words = _halved(level, self.levels, np.bitwise_xor)
        return grown

    def filled(self) -> npt.NDArray[np.bool_]:
        """Which nodes have any word below them."""
        level = np.zeros(self.blocks << self.levels, dtype=bool)
        level[self.leaves] = True
        found: npt.NDArray[np.bool_] = _halved(level, self.levels, np.logical_or)
        return found


def _halved(level: npt.NDArray[Any], levels: int, join: np.ufunc) -> npt.NDArray[Any]:
    """All rows of trees over these leaves."""
    rows = [level]
    for _ in range(levels):
        rows.append(join(rows[-1][0::2], rows[-1][1::2]))
    return np.concatenate(rows)


def _plant(size: int, order: Places, base: int) -> Trees:
    blocks, levels = -(-len(order) // size), (size - 1).bit_length()
    widths = [blocks << (levels - level) for level in range(levels)]
    rows = base + np.cumsum([0, *widths], dtype=np.int64)
    block, inside = np.divmod(np.arange(len(order), dtype=np.int64), size)
    return Trees(size, blocks, base, rows, (block << levels) + (inside << levels) // size, order)


class Layout:
    """Everything public about the passes of one block."""

    def __init__(self, bits: int, seed: bytes, sizes: Sequence[int], lanes: int | None = None) -> None:
        """``sizes``: block length of each pass, in bits of a lane; 0 is a subset, and subsets come last.  ``lanes``:
        another number of frames than :func:`lanes_of` says, a power of two up to 64.

        Raises:
            ValueError: a schedule that no key can have.
        """
        self.bits, self.lanes = bits, lanes or lanes_of(bits, max(sizes, default=0))
        self.words = -(-bits // self.lanes)
        self.shift = self.lanes.bit_length() - 1
        laned = [min(size, self.words) for size in sizes if size > 0]
        self.subsets = len(sizes) - len(laned)
        if bits < 1 or not laned or min(sizes) < 0 or 0 in sizes[: len(laned)]:
            raise ValueError("a schedule of Cascade has laned passes and then subsets")
        self.depth = (self.words - 1).bit_length() + self.shift
        """Levels of a subset's tree, down to single bits."""
        if max(1, self.subsets) << (self.depth + 1) > 1 << 32:
            raise ValueError(f"a key of {bits} bits is too long to be corrected in one piece")
        self._seed = seed
        self.trees: list[Trees] = []
        for size, order in zip(laned, orders(self.words, seed, len(laned)), strict=True):
            self.trees.append(_plant(size, order, self.trees[-1].end if self.trees else 0))

    @property
    def nodes(self) -> int:
        """Of all laned passes together."""
        return self.trees[-1].end

    # Keys as words

    def pack(self, bits: Bits) -> Words:
        """Lane l is bit l of each word; the last word is filled up with zeros."""
        table = np.zeros((self.words, self.lanes), dtype=np.uint8)
        table.reshape(-1)[: self.bits] = bits
        octets = np.packbits(table if self.lanes < 8 else table.reshape(-1), axis=-1, bitorder="little")
        return octets.reshape(-1).view(f"<u{max(1, self.lanes // 8)}").astype(np.uint64)

    def unpack(self, words: Words) -> Bits:
        octets = words.astype(f"<u{max(1, self.lanes // 8)}").view(np.uint8)
        if self.lanes < 8:
            table = np.unpackbits(octets.reshape(-1, 1), axis=1, bitorder="little")[:, : self.lanes]
            return np.ascontiguousarray(table).reshape(-1)[: self.bits]
        return np.unpackbits(octets, bitorder="little")[: self.bits]

    # Subsets

    @cached_property
    def masks(self) -> Words:
        """Shape (subsets, words): which bits belong to each."""
        lanes, first = np.uint64((1 << self.lanes) - 1), len(self.trees)
        masks = np.empty((self.subsets, self.words), dtype=np.uint64)
        for number, row in enumerate(masks):
            np.bitwise_and(_stream(self._seed, first + number, self.words), lanes, out=row)
        rest = self.bits - (self.words - 1) * self.lanes  # the last word may end early
        masks[:, -1] &= np.uint64((1 << rest) - 1)
        return masks

    def position(self, subset: int, node: int) -> int:
        """How a question names a node of a subset's tree: 1 is all of it, 2 h and 2 h + 1 are the halves of h."""
        return subset << (self.depth + 1) | node

    def node(self, position: int) -> tuple[int, int]:
        """(subset, node) of a position."""
        return position >> (self.depth + 1), position & ((2 << self.depth) - 1)

    def span(self, node: int) -> tuple[int, int, int]:
        """What a node of a subset's tree spans: (first word, word after the last, lanes as a mask).  Below a single
        word its lanes are halved."""
        level, of_words = node.bit_length() - 1, self.depth - self.shift
        if level <= of_words:
            width = 1 << (of_words - level)
            first = (node - (1 << level)) * width
            return min(first, self.words), min(first + width, self.words), (1 << self.lanes) - 1
        inside = level - of_words
        word, width = (node >> inside) - (1 << of_words), self.lanes >> inside
        some = ((1 << width) - 1) << (width * (node & ((1 << inside) - 1)))
        return min(word, self.words), min(word + 1, self.words), some

    # What a position of a question stands for

    def members(self, number: int, position: int) -> Places:
        """The key's bits whose parity that position of pass ``number`` is, ascending."""
        if number < len(self.trees):
            bits = self._under(self.trees[number], position >> self.shift) * self.lanes
            bits += position & (self.lanes - 1)
        else:
            subset, node = self.node(position)
            first, last, some = self.span(node)
            words = self.masks[subset, first:last] & np.uint64(some)
            table = (words[:, None] >> np.arange(self.lanes, dtype=np.uint64)) & np.uint64(1)
            bits = np.flatnonzero(table.reshape(-1)).astype(np.int64) + first * self.lanes
        found: Places = np.sort(bits[bits < self.bits])
        return found

    def _under(self, trees: Trees, node: int) -> Places:
        """Words below a node, which is counted from 0 in its pass."""
        level = int(np.searchsorted(trees.rows - trees.base, node, side="right")) - 1
        place = node - int(trees.rows[level] - trees.base)
        found: Places = trees.order[(trees.leaves >> level) == place]
        return found
