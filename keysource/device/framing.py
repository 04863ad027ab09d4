"""The device socket: what a QKD device (or its simulation) says to whoever stores or uses its keys.  Sans-IO.

An ``AF_UNIX`` stream socket, mode 0600, opened by the device; both sides check ``SO_PEERCRED``.  A vendor's driver
that speaks this is a key source; nothing of it is specific to the simulated link.

**Frame**::

    u32 big-endian  n      bytes that follow, 4 <= n <= 4 MiB
    u32 big-endian  h      bytes of the header, 2 <= h <= 64 KiB, h <= n - 4
    h bytes                JSON object, UTF-8, with "op"
    n - 4 - h bytes        raw trailer: key bytes, never inside the JSON, so that they can be wiped

**Client to device** (each is answered by a frame with the same ``op``, or by ``error``):

=============  ==========================================  ==================================================
op             fields                                      answer
=============  ==========================================  ==================================================
``hello``      ``version`` = 1                             ``version, device, link, end, owner, origin, hops,
                                                           key_bits`` = 256
``status``     --                                          ``state`` (``starting | up | aborted | down``),
                                                           ``reason``, ``qber`` (0..1 or null), ``key_rate``
                                                           (keys/s or null), ``alarm`` (text or null),
                                                           ``next_block``, ``blocks_held``
``subscribe``  ``from``: first block wanted                ``from``; then a ``block`` event for each block held
                                                           or made later with number >= ``from``, in order
``ack``        ``block``: all up to here are safe          ``block``; the device erases them
``get``        ``key_id``                                  ``key_id``, trailer = 32 bytes; the key is gone from
                                                           the device afterwards
``discard``    ``before``: erase blocks below              ``before``
=============  ==========================================  ==================================================

**Device to client, unasked**:

=============  ==========================================  ==================================================
op             fields                                      meaning
=============  ==========================================  ==================================================
``block``      ``block``, ``count``; trailer = count x 32  new keys: key ``i`` has the key_ID
                                                           ``derive_key_id(link, block, i)`` and the owner
                                                           ``owner.of(i)``.  May have ``origin``, ``hops`` and
                                                           ``paths`` (lists of node names) where the block differs
                                                           from ``hello``: relayed keys do
``void``       ``before``                                  the other end does not have blocks below this number:
                                                           erase what is unused of them
``alarm``      ``active``, ``kind`` (``qber | monitor |    raised or cleared; while active the device delivers
               authentication | device``), ``detail``      nothing new
=============  ==========================================  ==================================================

Both ends of a link deliver identical blocks in ascending order, each at most once per subscription; numbers may be
skipped (an aborted block) and never come back, also after a restart.  A block's key ``i`` is owned by
``owner.of(i)`` (even: end a, odd: end b, where ``owner`` is ``alternate``).

``error``: ``code`` (``bad-request | unknown-op | unknown-id | exhausted | not-authorised | device-fault``),
``message``, ``retry_after`` (seconds).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

from keysource.errors import BadAnswer

MAX_FRAME = 4 * 1024 * 1024
MAX_HEADER = 64 * 1024
VERSION = 1
_LENGTHS = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Frame:
    """One message.  ``header["op"]`` is always a string."""

    header: dict[str, Any]
    trailer: bytearray = field(default_factory=bytearray, repr=False)

    @property
    def op(self) -> str:
        return str(self.header["op"])


def encode(header: dict[str, Any], trailer: bytes | bytearray = b"") -> bytearray:
    """The bytes of one frame.  Raises ``ValueError`` where it would be over the limits."""
    text = json.dumps(header, separators=(",", ":")).encode()
    total = 4 + len(text) + len(trailer)
    if len(text) > MAX_HEADER or total > MAX_FRAME:
        raise ValueError(f"device frame of {total} bytes with a header of {len(text)} is over the limit")
    out = bytearray(_LENGTHS.pack(total, len(text)))
    out += text
    out += trailer
    return out


class Decoder:
    """Bytes in, frames out.  Raises :class:`BadAnswer` once and then for good: close the connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed_untrusted(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Frames that ``data`` completes, in order."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= _LENGTHS.size:
            total, header_length = _LENGTHS.unpack_from(self._buffer)
            if not 4 <= total <= MAX_FRAME or not 2 <= header_length <= min(MAX_HEADER, total - 4):
                raise BadAnswer(f"device frame with lengths {total} and {header_length}")
            if len(self._buffer) < 4 + total:
                break
            start, end = _LENGTHS.size + header_length, 4 + total
            try:
                header = json.loads(self._buffer[_LENGTHS.size : start])
            except (ValueError, RecursionError):
                raise BadAnswer("device frame whose header is not JSON") from None
            if not isinstance(header, dict) or not isinstance(header.get("op"), str):
                raise BadAnswer('device frame whose header is not an object with "op"')
            frames.append(Frame(header, self._buffer[start:end]))
            self._buffer[:end] = bytes(end)  # key bytes do not linger in the buffer
            del self._buffer[:end]
        return frames
