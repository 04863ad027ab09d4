"""A block that is authenticated by signatures, where two ends have no one-time key yet.

What the three tags of a ticket do, three signatures do here, over the same transcript and in the same order.  They
are computational: whoever can forge Ed25519 *and* ML-DSA-65 while the block runs can sit in the middle of it.  Once
it is over, its key is as secret as any other, also from somebody who breaks both the day after: signatures protect
nothing but the authenticity of that minute (npj Quantum Inf. 2021, doi 10.1038/s41534-021-00400-7).
"""

from __future__ import annotations

from keysource.base import End
from keysource.qkd.distill.mac import TAGS, Transcript
from keysource.qkd.errors import LinkError
from keysource.qkd.identity import SIGNATURE_BYTES, Signers

_PURPOSE = b"qvpn-qkd block v1"
_SPEAKERS = (End.B, End.A, End.B)
"""Who makes tag 0, 1 and 2."""


class SignedTicket:
    """In the place of a :class:`~keysource.qkd.distill.mac.Ticket`, for one block of one session."""

    def __init__(self, number: int, signers: Signers, session: bytes) -> None:
        """``session``: 32 bytes to which both ends' fresh randomness has gone, so that no other session's signatures
        fit."""
        self.number = number
        self._signers, self._session = signers, session

    @property
    def tag_bytes(self) -> int:
        return SIGNATURE_BYTES

    def tag(self, index: int, transcript: Transcript) -> bytes:
        if _SPEAKERS[index] is not self._signers.end:
            raise LinkError("an end signs its own tags only")
        return self._signers.sign(_PURPOSE, self._data(index, transcript))

    def fits(self, index: int, transcript: Transcript, tag: bytes) -> bool:
        """Is this the other end's signature of what we saw?"""
        if not 0 <= index < TAGS or _SPEAKERS[index] is self._signers.end:
            return False
        return self._signers.fits(_PURPOSE, self._data(index, transcript), tag)

    def forgery(self, transcript: Transcript) -> float:
        """Nothing is proved of a signature: it is no part of the sum of errors, and the status says so."""
        return 0.0

    def _data(self, index: int, transcript: Transcript) -> bytes:
        return bytes([index]) + self._session + transcript.digest()

    def __repr__(self) -> str:
        return "SignedTicket()"
