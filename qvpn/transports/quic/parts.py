"""Records that are longer than a DATAGRAM frame on a narrow path travel as two.

A part is ``0x20 | number of the part (0 or 1) | id (2 bytes, big-endian) | bytes``.  Both parts together are one
datagram of ours.  No datagram of ours begins with 0x20.  Nothing here is authenticated, nor need it be: what parts
of a forger make is a record that does not verify.
"""

from __future__ import annotations

import struct
from collections import OrderedDict

HEAD = struct.Struct(">BBH")
PART = 0x20
WAITING = 32
"""Halves that wait for the other one; the oldest is forgotten first."""
PARTS = 2
MAX_JOINED = 2800
"""Bytes of the longest datagram that two parts make."""


class Splitter:
    """Numbers what it cuts."""

    def __init__(self) -> None:
        self._next = 0

    def split(self, datagram: bytes) -> list[bytes]:
        """Two parts of about equal length."""
        self._next = (self._next + 1) & 0xFFFF
        middle = (len(datagram) + 1) // 2
        return [
            HEAD.pack(PART, 0, self._next) + datagram[:middle],
            HEAD.pack(PART, 1, self._next) + datagram[middle:],
        ]


class Joiner:
    """Puts the parts of one connection together again; memory is bounded."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, tuple[int, bytes]] = OrderedDict()

    def join(self, part: bytes) -> bytes | None:
        """The whole datagram, when this part was the last; None while it is not, or when it is no part."""
        if len(part) <= HEAD.size or len(part) > MAX_JOINED:
            return None
        _, number, name = HEAD.unpack_from(part)
        if number >= PARTS:
            return None
        body = part[HEAD.size :]
        other = self._waiting.pop(name, None)
        if other is None or other[0] == number:
            self._waiting[name] = (number, body)
            if len(self._waiting) > WAITING:
                self._waiting.popitem(last=False)
            return None
        whole = body + other[1] if number == 0 else other[1] + body
        return whole if len(whole) <= MAX_JOINED else None
