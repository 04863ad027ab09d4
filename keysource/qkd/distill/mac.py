"""Wegman-Carter authentication of a block's transcript.

Every frame of a block goes into the transcript with its direction, kind and length.  At the end, before anything is
released, each end sends one tag over all of it: Poly1305 under a one-time key of 32 bytes from the pad, r and s both
fresh.  The bound holds against unlimited computers: a forgery of a message of L bytes passes with probability at
most 8 ceil(L/16) / 2^106 (Bernstein, FSE 2005).

One block has one *ticket* of pad, three tags in a fixed order, so no key ever sees two messages.  Where two ends have
no pad yet, signatures stand in its place (``distill.signed``): an :class:`Authenticator` is either.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Protocol

from cryptography.hazmat.primitives.poly1305 import Poly1305

TAG_BYTES = 16
ONE_TIME_BYTES = 32
TAGS = 3
TICKET_BYTES = TAGS * ONE_TIME_BYTES


class Transcript:
    """What one end has sent and received in a block, in order."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def add(self, direction: bytes, kind: int, payload: bytes) -> None:
        """``direction``: the name of the end that sent it, one byte."""
        self._data += direction + bytes([kind]) + len(payload).to_bytes(8, "big")
        self._data += payload

    def tag(self, one_time_key: bytes) -> bytes:
        """16 bytes.  ``one_time_key`` is never used again."""
        if len(one_time_key) != ONE_TIME_BYTES:
            raise ValueError(f"a one-time key has {ONE_TIME_BYTES} bytes")
        return Poly1305.generate_tag(one_time_key, bytes(self._data))

    def fits(self, one_time_key: bytes, tag: bytes) -> bool:
        """Is this the tag of what we saw?  In constant time."""
        return hmac.compare_digest(self.tag(one_time_key), tag)

    def digest(self) -> bytes:
        """64 bytes (SHA-512), for what signs instead of hashing universally."""
        return hashlib.sha512(self._data).digest()

    def forgery(self) -> float:
        """Probability at most that a forged transcript of this length passes one tag."""
        return float(8 * -(-len(self._data) // 16)) / 2.0**106


class Authenticator(Protocol):
    """What one block is authenticated by: tag 0 is Bob's, 1 Alice's, 2 Bob's commit."""

    number: int

    @property
    def tag_bytes(self) -> int: ...

    def tag(self, index: int, transcript: Transcript) -> bytes: ...

    def fits(self, index: int, transcript: Transcript, tag: bytes) -> bool: ...

    def forgery(self, transcript: Transcript) -> float: ...


class Ticket:
    """The pad of one block: key 0 for Bob's tag, 1 for Alice's, 2 for Bob's commit."""

    @property
    def tag_bytes(self) -> int:
        return TAG_BYTES

    def __init__(self, number: int, material: bytes) -> None:
        if len(material) != TICKET_BYTES:
            raise ValueError(f"a ticket has {TICKET_BYTES} bytes")
        self.number = number
        self._material = material

    def key(self, index: int) -> bytes:
        if not 0 <= index < TAGS:
            raise ValueError(f"a ticket has {TAGS} keys")
        return self._material[index * ONE_TIME_BYTES : (index + 1) * ONE_TIME_BYTES]

    def tag(self, index: int, transcript: Transcript) -> bytes:
        return transcript.tag(self.key(index))

    def fits(self, index: int, transcript: Transcript, tag: bytes) -> bool:
        return transcript.fits(self.key(index), tag)

    def forgery(self, transcript: Transcript) -> float:
        """Of one tag, at most."""
        return transcript.forgery()

    def __repr__(self) -> str:
        return f"Ticket({self.number})"
