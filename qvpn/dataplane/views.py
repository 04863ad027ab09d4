"""Views into receive buffers, made once and kept.

A slice of a buffer costs as much as a tenth of opening a record, and each record needs three.  Receive buffers are
used again and again, and the length of a connection's records hardly varies, so the slices for one buffer and one
length are kept for the next receive that looks the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qvpn.tunnel.records import CONTROL_BIT, HEADER
from qvpn.tunnel.replay import BLOCK

KEPT = 64
"""Pairs of buffer and length whose views are kept: a bind reads into few buffers.  As many places in each."""

CONTROL_BYTE = CONTROL_BIT >> 56
"""What the last byte of the counter has at least in a control record."""

_HEADER = np.dtype("<c16")
"""Sixteen bytes that numpy copies as one."""

_BYTES = [bytes((value,)) for value in range(256)]


class RecordViews:
    """Views into one buffer that holds records of one length, back to back."""

    __slots__ = ("_headers", "buffer", "nonces", "segment", "texts")

    def __init__(self, buffer: memoryview, segment: int) -> None:
        """``segment`` is at least the length of a record without plaintext."""
        self.buffer = buffer
        self.segment = segment
        self._headers: dict[tuple[int, int], npt.NDArray[np.complex128]] = {}
        self.nonces: list[memoryview] = []
        self.texts: list[memoryview] = []
        """Of each record: its ciphertext and tag."""

    def grow(self, count: int) -> None:
        """Have :attr:`nonces` and :attr:`texts` of so many records."""
        for place in range(len(self.texts), count):
            start = place * self.segment
            self.nonces.append(self.buffer[start + 4 : start + HEADER])
            self.texts.append(self.buffer[start + HEADER : start + self.segment])

    def is_run(self, first: int, count: int) -> bool:
        """True if ``count`` records from number ``first`` on have one index and consecutive data counters of a block.

        Inside a block only the lowest byte of the counter changes, by one: the headers are compared as a whole with
        what they must be then.
        """
        headers = self._headers.get((first, count))
        if headers is None:
            if len(self._headers) >= KEPT:
                self._headers.clear()
            start = first * self.segment
            headers = np.ndarray((count,), _HEADER, self.buffer, start, (self.segment,))
            self._headers[first, count] = headers
        seen = headers.tobytes()
        lowest = seen[8]
        if (lowest & (BLOCK - 1)) + count > BLOCK or seen[15] >= CONTROL_BYTE:
            return False
        head, rest = seen[:8], seen[9:HEADER]
        return seen == head + (rest + head).join(_BYTES[lowest : lowest + count]) + rest

    def split(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Those records as runs: (number of the first, how many).

        Those of a run have equal first eight bytes and consecutive data counters in one block; a handshake datagram
        and a control record are runs of one.
        """
        start, begin = first * self.segment, 0
        heads: list[int] = np.ndarray((count,), "<u8", self.buffer, start, (self.segment,)).tolist()
        counters: list[int] = np.ndarray((count,), "<u8", self.buffer, start + 8, (self.segment,)).tolist()
        for here in range(1, count + 1):
            joins = (
                here < count
                and heads[here] == heads[begin]
                and counters[here] == counters[here - 1] + 1
                and counters[here] & (BLOCK - 1)
                and not counters[here] & CONTROL_BIT
            )
            if not joins:
                yield first + begin, here - begin
                begin = here


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
