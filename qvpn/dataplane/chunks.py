"""Superpackets out: each becomes chunks, sealed one by one without copying the payload.

The superpacket lies in the arena as TUN gave it: header, then payload.  The plaintext of chunk ``k`` is the header
and the ``k``-th slice of the payload, contiguous.  It gets so by writing the header over the bytes *before* that
slice - which are the end of slice ``k - 1``, sealed already.  The views for one shape of superpacket (header length,
segment size) are made once and kept: a shape stays the same for the life of a TCP connection.
"""

from __future__ import annotations

import struct

import numpy as np

from qvpn.netio import offload
from qvpn.netio.offload import Superpacket
from qvpn.tunnel.records import HEADER, OVERHEAD, TAG, Sealer
from qvpn.tunnel.replay import BLOCK

SHAPES = 16
"""Shapes whose views are kept."""

_U64 = struct.Struct("<Q")
_PLACES = np.arange(BLOCK, dtype=np.uint64)


class _Shape:
    """Views into arena and output for superpackets at the start of the arena with this header and segment size."""

    __slots__ = ("counters", "heads", "record", "slots")

    def __init__(self, arena: memoryview, out: memoryview, header: int, segment: int, chunks: int) -> None:
        record = self.record = OVERHEAD + header + segment
        self.heads = np.ndarray((chunks,), "<u8", out, 0, (record,))
        self.counters = np.ndarray((chunks,), "<u8", out, 8, (record,))
        self.slots = [
            (
                arena[place * segment : place * segment + header],
                arena[place * segment : place * segment + header + segment],
                out[place * record + 4 : place * record + HEADER],
                out[place * record + HEADER : (place + 1) * record],
            )
            for place in range(chunks)
        ]
        """Of each chunk: where its header goes, its plaintext, its nonce, its ciphertext and tag."""

    def number(self, head: bytes, counter: int, count: int) -> None:
        """Write the records' headers: ``head`` into all, and so many counters."""
        self.heads[:count] = _U64.unpack(head)[0]
        np.add(_PLACES[:count], counter, out=self.counters[:count])


class ChunkSealer:
    """Seals superpackets that stand at the start of ``arena`` into ``out``."""

    def __init__(self, arena: memoryview, out: memoryview) -> None:
        self._arena = arena
        self._out = out
        self._shapes: dict[tuple[int, int], _Shape] = {}

    def seal(self, sealer: Sealer, packet: Superpacket, chunks: int, head: bytes) -> tuple[memoryview, int]:
        """Seal a superpacket of at most 64 chunks, which is destroyed; ``head`` is its header.

        Returns the records, back to back, and the length of each but the last.  Raises
        :class:`~qvpn.tunnel.records.Refused` with ``limit``.
        """
        shape = self._shape(packet, chunks)
        shape.number(sealer.head, sealer.take_block(chunks), chunks)
        last = packet.payload - (chunks - 1) * packet.segment
        encrypt, slots = sealer.encrypt, shape.slots
        whole = chunks if last == packet.segment else chunks - 1
        for place, plaintext, nonce, sealed in slots if whole == len(slots) else slots[:whole]:
            place[:] = head
            encrypt(nonce, plaintext, None, sealed)
        if whole < chunks:
            place, plaintext, nonce, sealed = slots[whole]
            place[:] = head
            length = packet.header + last
            encrypt(nonce, plaintext[:length], None, sealed[: length + TAG])
        return self._out[: whole * shape.record + (OVERHEAD + packet.header + last) * (chunks - whole)], shape.record

    def _shape(self, packet: Superpacket, chunks: int) -> _Shape:
        key = (packet.header, packet.segment)
        shape = self._shapes.get(key)
        if shape is None or len(shape.slots) < chunks:
            if len(self._shapes) >= SHAPES:
                self._shapes.pop(next(iter(self._shapes)))
            shape = self._shapes[key] = _Shape(self._arena, self._out, packet.header, packet.segment, chunks)
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
