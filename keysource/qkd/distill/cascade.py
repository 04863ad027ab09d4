"""Error correction by Cascade with sub-block reuse.  Sans-IO; Alice's key is the reference.

Each pass reads the key in an order of its own (public, from a seed drawn for the block) and cuts it into blocks.
Bob asks for *prefix parities*: the parity of the first p bits in the order of a pass.  Two prefixes give the parity
of what lies between, so every answer is one new cut in that pass, costs one bit of key, and is kept: after a
correction the smallest known interval around the bit is odd in every pass, and bisection goes on there.  All odd
intervals of one pass are disjoint, so they are bisected in lock-step, one message for all.

Bob works on differences only: ``odd`` of an interval is Alice's parity xor his own.
Brassard/Salvail, Eurocrypt '93; sub-block reuse as in Martinez-Mateo et al., arXiv:1407.3257.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill.bits import Bits
from keysource.qkd.errors import BadFrame
from keysource.qkd.optics.settings import keystream

Order = npt.NDArray[np.int64]
Cuts = npt.NDArray[np.int64]
SCHEDULES = ("original", "optimised")


def block_sizes(bits: int, error_ratio: float, schedule: str = "optimised") -> list[int]:
    """Block length of each pass, for a key of ``bits`` bits and the *design* error ratio (never the data's own).

    ``original``: 0.73/Q, doubled in each of four passes, and six passes over halves that find what is left: few
    messages (50 to 90), f about 1.12.  ``optimised``: powers of two as in option (8) of arXiv:1407.3257, f about
    1.04 with hundreds of messages.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    ratio = min(max(error_ratio, 1e-4), 0.25)
    half = bits // 2 + 1
    if schedule == "original":
        first = math.ceil(0.73 / ratio)
        sizes = [first << number for number in range(4)] + [half] * 6
    else:
        exponent = math.log2(1.0 / ratio)
        first, second = 2 ** math.ceil(exponent - 0.5), 2 ** math.ceil((exponent + 11.5) / 2.0)
        sizes = [first, second, 4096] + [half] * 11
    return [min(size, half) for size in sizes]


def orders(bits: int, seed: bytes, passes: int) -> list[Order]:
    """The order of each pass: the first as the key stands, the others by sorting an AES keystream.

    The low bits of each word are its place, so the words are sorted themselves, which is several times quicker than
    sorting places by them, and equal words have one order.
    """
    result: list[Order] = [np.arange(bits, dtype=np.int64)]
    mask = np.uint64((1 << max(1, (bits - 1).bit_length())) - 1)
    for number in range(1, passes):
        first = np.uint64(number) << np.uint64(40)
        words = keystream(seed, np.arange((bits + 1) // 2, dtype=np.uint64) + first).reshape(-1)[:bits]
        words &= ~mask
        words |= result[0].view(np.uint64)
        words.sort()
        words &= mask
        result.append(words.view(np.int64))
    return result


def prefix_parities(bits: Bits, order: Order) -> Bits:
    """Element p: parity of the first p bits in that order; length n + 1."""
    prefix = np.zeros(len(bits) + 1, dtype=np.uint8)
    np.bitwise_xor.accumulate(bits[order], out=prefix[1:])
    return prefix


@dataclass(frozen=True, slots=True)
class Question:
    """Bob asks for the prefix parities of one pass, positions strictly ascending in 1..n."""

    number: int
    positions: npt.NDArray[np.uint32]


class Reference:
    """Alice's side: answers questions, each prefix once."""

    def __init__(self, bits: Bits, seed: bytes, passes: int) -> None:
        self._bits = bits
        self._seed = seed
        self._orders = orders(len(bits), seed, passes)
        self._prefix: list[Bits | None] = [None] * passes  # worked out when first asked
        self._asked = [np.zeros(len(bits) + 1, dtype=bool) for _ in range(passes)]

    def answer_untrusted(self, question: Question) -> Bits:
        """Raises :class:`BadFrame` for a question that an honest Bob does not ask."""
        where = question.positions.astype(np.int64)
        if question.number >= len(self._orders) or not len(where):
            raise BadFrame("a parity question for no pass or no position")
        ascending = bool((np.diff(where) > 0).all())
        if not ascending or where[0] < 1 or where[-1] > len(self._bits):
            raise BadFrame("a parity question whose positions do not ascend inside the key")
        asked = self._asked[question.number]
        if asked[where].any():
            raise BadFrame("a parity question for a position that was answered before")
        asked[where] = True
        prefix = self._prefix[question.number]
        if prefix is None:
            prefix = prefix_parities(self._bits, self._orders[question.number])
            self._prefix[question.number] = prefix
        return prefix[where]


class _Pass:
    """Bob's knowledge of one pass: cuts, and for each interval between them whether the parities differ.

    ``opened`` is his prefix parity when the pass began, ``fixed`` the places that he corrected since, ascending.  The
    difference of the prefixes at a cut is then ``base ^ (corrections below it)``.
    """

    def __init__(self, order: Order, bits: Bits) -> None:
        self.order = order
        self.place = np.empty_like(order)
        self.place[order] = np.arange(len(order))
        self.opened = prefix_parities(bits, order)
        self.fixed: Order = np.empty(0, dtype=np.int64)
        self.cuts: Cuts = np.array([0, len(order)], dtype=np.int64)
        self.base: Bits = np.zeros(2, dtype=np.uint8)
        self.odd: Bits = np.zeros(1, dtype=np.uint8)

    def open(self, cuts: Cuts, answers: Bits, total: int) -> None:
        """First cuts; ``total`` is the parity difference of the whole key."""
        inner = answers ^ self.opened[cuts]
        self.cuts = np.concatenate([[0], cuts, [len(self.order)]]).astype(np.int64)
        self.base = np.concatenate([[0], inner, [total]]).astype(np.uint8)
        self.odd = self.base[1:] ^ self.base[:-1]

    def flip(self, key_positions: Order) -> None:
        """Bits of the key were corrected: the interval around each changes."""
        places = np.sort(self.place[key_positions])
        np.bitwise_xor.at(self.odd, np.searchsorted(self.cuts, places, side="right") - 1, np.uint8(1))
        self.fixed = np.insert(self.fixed, np.searchsorted(self.fixed, places), places)

    def split(self, odd: Order, middle: Cuts, answers: Bits) -> None:
        """Halve the odd intervals numbered ``odd`` at ``middle``."""
        base = answers ^ self.opened[middle]
        low = self.base[odd] ^ self._fixed_below(self.cuts[odd])
        left = base ^ self._fixed_below(middle) ^ low
        self.odd[odd] = np.uint8(1) ^ left
        self.odd = np.insert(self.odd, odd, left)
        self.cuts = np.insert(self.cuts, odd + 1, middle)
        self.base = np.insert(self.base, odd + 1, base)

    def _fixed_below(self, cuts: Cuts) -> Bits:
        return (np.searchsorted(self.fixed, cuts) & 1).astype(np.uint8)


class Corrector:
    """Bob's side.  ``run`` yields questions and is sent the answers; ``bits`` ends up corrected.

    It raises :class:`BadFrame` for answers that cannot all be true: without that they would keep Bob busy for ever.
    """

    def __init__(self, bits: Bits, seed: bytes, sizes: list[int]) -> None:
        self.bits = bits.copy()
        self._corrected = np.zeros(len(bits), dtype=bool)
        self._sizes = sizes
        self._orders = orders(len(bits), seed, len(sizes))
        self._passes: list[_Pass] = []

    def run(self) -> Generator[Question, Bits, None]:
        for number, size in enumerate(self._sizes):
            yield from self._open(number, size)
            while (found := self._shortest_odd()) is not None:
                yield from self._step(*found)

    def _open(self, number: int, size: int) -> Generator[Question, Bits, None]:
        """Ask for the blocks of a new pass; the parity of everything is asked once, in the first."""
        bits, entry = len(self.bits), _Pass(self._orders[number], self.bits)
        cuts = np.arange(size, bits, size, dtype=np.int64)
        if number == 0:
            answers = yield Question(0, np.append(cuts, bits).astype(np.uint32))
            entry.open(cuts, answers[:-1], int(answers[-1] ^ entry.opened[bits]))
        else:
            answers = yield Question(number, cuts.astype(np.uint32))
            entry.open(cuts, answers, int(np.bitwise_xor.reduce(self._passes[0].odd)))
        self._passes.append(entry)

    def _shortest_odd(self) -> tuple[int, Order] | None:
        """The pass that holds the shortest odd interval, and its odd intervals."""
        best: tuple[int, int, Order] | None = None
        for number, entry in enumerate(self._passes):
            odd = np.flatnonzero(entry.odd)
            if len(odd):
                shortest = int((entry.cuts[odd + 1] - entry.cuts[odd]).min())
                if best is None or shortest < best[0]:
                    best = (shortest, number, odd)
        return None if best is None else best[1:]

    def _step(self, number: int, odd: Order) -> Generator[Question, Bits, None]:
        """Those of length 1 are errors; if there are none, halve them all."""
        entry = self._passes[number]
        low, high = entry.cuts[odd], entry.cuts[odd + 1]
        single = high - low == 1
        if single.any():
            wrong = entry.order[low[single]]
            if self._corrected[wrong].any():  # each correction is Alice's own bit: honest answers never undo it
                raise BadFrame("parities that contradict each other")
            self._corrected[wrong] = True
            self.bits[wrong] ^= np.uint8(1)
            for each in self._passes:
                each.flip(wrong)
            return
        middle = (low + high) // 2
        answers = yield Question(number, middle.astype(np.uint32))
        entry.split(odd, middle, answers)
