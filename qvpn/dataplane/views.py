"""Views into receive buffers, made once and kept.

A slice of a buffer costs as much as a tenth of opening a record, and each record needs three.  Receive buffers are
used again and again, and the length of a connection's records hardly varies, so the slices for one buffer and one
length are kept for the next receive that looks the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qvpn.tunnel.records import CONTROL_BIT, HEADER
from qvpn.tunnel.replay import BLOCK

U64Array = npt.NDArray[np.uint64]

KEPT = 64
"""Pairs of buffer and length whose views are kept: a bind reads into few buffers."""

_PLACES = np.arange(BLOCK + 1, dtype=np.uint64)


class RecordViews:
    """Views into one buffer that holds records of one length, back to back."""

    __slots__ = ("buffer", "counters", "heads", "segment", "slots")

    def __init__(self, buffer: memoryview, segment: int) -> None:
        """``segment`` is at least the length of a record without plaintext."""
        count = (len(buffer) - HEADER) // segment + 1
        self.buffer = buffer
        self.segment = segment
        self.heads: U64Array = np.ndarray((count,), "<u8", buffer, 0, (segment,))
        self.counters: U64Array = np.ndarray((count,), "<u8", buffer, 8, (segment,))
        self.slots: list[tuple[memoryview, memoryview]] = []
        """Of each record: its nonce, its ciphertext and tag."""

    def grow(self, count: int) -> None:
        """Have :attr:`slots` for so many records."""
        for place in range(len(self.slots), count):
            start = place * self.segment
            text = self.buffer[start + HEADER : start + self.segment]
            self.slots.append((self.buffer[start + 4 : start + HEADER], text))

    def is_run(self, count: int) -> bool:
        """True if the first ``count`` records have one index and consecutive data counters of one block."""
        counters = self.counters[:count]
        first = int(counters[0])
        if (first & (BLOCK - 1)) + count > BLOCK or first & CONTROL_BIT:
            return False
        heads = self.heads[:count].tobytes()
        if heads != heads[:8] * count:
            return False
        return bool(counters.tobytes() == (_PLACES[:count] + counters[0]).tobytes())


class ViewCache:
    """The views of the receives seen last."""

    def __init__(self) -> None:
        self._views: dict[tuple[int, int], RecordViews] = {}

    def of(self, buffer: memoryview, segment: int) -> RecordViews:
        key = (id(buffer), segment)
        views = self._views.get(key)
        if views is None or views.buffer is not buffer:
            if len(self._views) >= KEPT:
                self._views.pop(next(iter(self._views)))
            views = self._views[key] = RecordViews(buffer, segment)
        return views
