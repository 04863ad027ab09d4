"""Superpackets out: each becomes chunks, sealed one by one without copying the payload.

The superpacket lies in the arena as TUN gave it: header, then payload.  The plaintext of chunk ``k`` is the header
and the ``k``-th slice of the payload, contiguous.  It gets so by writing the header over the bytes *before* that
slice - which are the end of slice ``k - 1``, sealed already.  The views for one shape of superpacket (header length,
segment size) are made once and kept: a shape stays the same for the life of a TCP connection.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from itertools import repeat
from operator import setitem

import numpy as np

from qvpn.netio import offload
from qvpn.netio.offload import Superpacket
from qvpn.tunnel.records import HEADER, OVERHEAD, TAG, Sealer
from qvpn.tunnel.replay import BLOCK

SHAPES = 16
"""Shapes whose views are kept."""

_U64 = struct.Struct("<Q")
_PLACES = np.arange(BLOCK, dtype=np.uint64)
_WHOLE = slice(None)
_PUT: Callable[[memoryview, slice, bytes], None] = setitem  # type: ignore[assignment]


class _Shape:
    """Views into arena and output for superpackets at the start of the arena with this header and segment size."""

    __slots__ = ("_counters", "_first", "_heads", "_offsets", "heads", "nonces", "record", "sealed", "texts")

    def __init__(self, arena: memoryview, out: memoryview, header: int, segment: int, chunks: int) -> None:
        record = self.record = OVERHEAD + header + segment
        self._heads = np.ndarray((chunks,), "<u8", out, 0, (record,))
        self._counters = np.ndarray((chunks,), "<u8", out, 8, (record,))
        self._offsets, self._first = _PLACES[:chunks], np.zeros((), np.uint64)
        inside, outside = range(0, chunks * segment, segment), range(0, chunks * record, record)
        self.heads = [arena[start : start + header] for start in inside]
        """Where the header of each chunk goes."""
        self.texts = [arena[start : start + header + segment] for start in inside]
        """Its plaintext."""
        self.nonces = [out[start + 4 : start + HEADER] for start in outside]
        self.sealed = [out[start + HEADER : start + record] for start in outside]
        """Its ciphertext and tag."""

    def name(self, head: bytes) -> None:
        """Write the first eight bytes of all records."""
        self._heads[:] = _U64.unpack(head)[0]

    def number(self, counter: int) -> None:
        """Write the counters of all records, of which this is the first."""
        self._first[()] = counter
        np.add(self._offsets, self._first, self._counters)


class ChunkSealer:
    """Seals superpackets that stand at the start of ``arena`` into ``out``, which nobody else writes to."""

    def __init__(self, arena: memoryview, out: memoryview) -> None:
        self._arena = arena
        self._out = out
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._last: _Shape | None = None
        self._head = b""
        """Of the records that stand in ``out`` since the last time, which have this shape."""

    def seal(self, sealer: Sealer, packet: Superpacket, chunks: int, head: bytes) -> tuple[memoryview, int]:
        """Seal a superpacket of at most 64 chunks, which is destroyed; ``head`` is its header.

        Returns the records, back to back, and the length of each but the last.  Raises
        :class:`~qvpn.tunnel.records.Refused` with ``limit``.
        """
        header, segment, payload, _, _ = packet
        shape = self._shape(header, segment, chunks)
        counter, encrypt = sealer.take_block(chunks), sealer.encrypt
        if shape is not self._last or sealer.head != self._head:
            self._last, self._head = shape, sealer.head
            shape.name(sealer.head)
        shape.number(counter)
        last = payload - (chunks - 1) * segment
        whole = chunks if last == segment else chunks - 1
        heads, record = shape.heads, shape.record
        # Loops in C, side by side: a header goes to its place just before its chunk is sealed.
        putting = map(_PUT, heads if whole == len(heads) else heads[:whole], repeat(_WHOLE), repeat(head))
        sealing = map(encrypt, shape.nonces, shape.texts, repeat(None), shape.sealed)
        deque(zip(putting, sealing, strict=False), 0)
        if whole == chunks:
            return self._out[: whole * record], record
        heads[whole][:] = head
        length = header + last
        encrypt(shape.nonces[whole], shape.texts[whole][:length], None, shape.sealed[whole][: length + TAG])
        return self._out[: whole * record + OVERHEAD + length], record

    def _shape(self, header: int, segment: int, chunks: int) -> _Shape:
        shape = self._shapes.get((header, segment))
        if shape is None or len(shape.texts) < chunks:
            if len(self._shapes) >= SHAPES:
                self._shapes.pop(next(iter(self._shapes)))
            shape = self._shapes[header, segment] = _Shape(self._arena, self._out, header, segment, chunks)
        return shape


def blocks(arena: memoryview, packet: Superpacket) -> list[tuple[Superpacket, bytes]]:
    """Cut a superpacket of more than 64 chunks into smaller ones: each as its parsed and its settled header.

    The payloads stay where they are: that of number ``b`` begins at ``header + 64 * b * segment``.
    """
    cut = []
    for first in range(0, packet.chunks, BLOCK):
        payload = min(BLOCK * packet.segment, packet.payload - first * packet.segment)
        head = bytearray(arena[: packet.header])
        offload.settle(memoryview(head), 0, packet, first, payload)
        cut.append((packet._replace(payload=payload), bytes(head)))
    return cut
