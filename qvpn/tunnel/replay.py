"""The sliding window that lets each counter of a key pass once (the idea of RFC 6479, with blocks of 64 counters).

``counter = block * 64 + index``.  One Python int per block is a mask of the indices seen; the masks stand in a ring,
so moving the window costs only the blocks that fall out of it.  A run of counters inside one block is checked by one
AND and marked by one OR.

Check before decrypting, mark only after the tag verified: a forger must not be able to move the window.
"""

from __future__ import annotations

INDEX_BITS = 6
BLOCK = 1 << INDEX_BITS
"""Counters in a block."""

WINDOW_BLOCKS = 8192
"""Blocks that the window reaches back, the highest included."""


class ReplayWindow:
    """Which counters have been accepted.  Counters are below 2^63; both methods cost the same for any counter."""

    __slots__ = ("_blocks", "_highest_block", "_masks", "_ring_mask", "highest", "marked")

    def __init__(self, blocks: int = WINDOW_BLOCKS) -> None:
        if blocks < 2 or blocks & (blocks - 1):
            raise ValueError(f"a replay window has a power of two of blocks, not {blocks}")
        self._blocks = blocks
        self._ring_mask = blocks - 1
        self._masks = [0] * blocks
        self._highest_block = 0
        self.highest = -1
        """Highest counter marked, -1 before the first."""
        self.marked = 0
        """How many counters were ever marked: equals the records opened."""

    def fresh(self, counter: int) -> bool:
        """True if this counter is inside or ahead of the window and was not marked."""
        block = counter >> INDEX_BITS
        ahead = block - self._highest_block
        if ahead > 0:
            return True
        if ahead <= -self._blocks:
            return False
        return not self._masks[block & self._ring_mask] >> (counter & (BLOCK - 1)) & 1

    def mark(self, counter: int) -> None:
        """Accept a counter for which :meth:`fresh` is true."""
        block = counter >> INDEX_BITS
        if block == self._highest_block + 1:
            self._highest_block = block
            self._masks[block & self._ring_mask] = 1 << (counter & (BLOCK - 1))
        else:
            if block > self._highest_block:
                self._advance(block)
            self._masks[block & self._ring_mask] |= 1 << (counter & (BLOCK - 1))
        self.marked += 1
        if counter > self.highest:
            self.highest = counter

    def run_fresh(self, block: int, mask: int) -> bool:
        """True if every index of ``mask`` in this block may be accepted."""
        ahead = block - self._highest_block
        if ahead > 0:
            return True
        return ahead > -self._blocks and not self._masks[block & self._ring_mask] & mask

    def mark_run(self, block: int, mask: int, count: int) -> None:
        """Accept ``count`` counters of one block, for which :meth:`run_fresh` is true."""
        if block == self._highest_block + 1:  # as nearly always
            self._highest_block = block
            self._masks[block & self._ring_mask] = mask
        else:
            if block > self._highest_block:
                self._advance(block)
            self._masks[block & self._ring_mask] |= mask
        self.marked += count
        top = (block << INDEX_BITS) + mask.bit_length() - 1
        if top > self.highest:
            self.highest = top

    def _advance(self, block: int) -> None:
        jump = block - self._highest_block
        if jump >= self._blocks:
            self._masks = [0] * self._blocks
        else:
            for passed in range(self._highest_block + 1, block + 1):
                self._masks[passed & self._ring_mask] = 0
        self._highest_block = block
