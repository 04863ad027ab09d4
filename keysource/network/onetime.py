"""What protects one hop: a one-time pad over the body, and a one-time MAC over body and header.

Both keys are units of the link's quantum key that serve for nothing else, before or after.  The MAC is Poly1305 with
all 32 bytes of its key fresh, which is a Wegman-Carter MAC (Bernstein, FSE 2005): whoever does not have the unit
forges a message of L bytes with a probability of at most 8 * ceil(L / 16) / 2**106, whatever he can compute.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.poly1305 import Poly1305

from keysource.base import KEY_BYTES
from keysource.kme.records import xor
from keysource.network.errors import NotAuthentic

TAG_BYTES = 16


def units_for(length: int) -> int:
    """Units that a hop of ``length`` bytes costs: its pad, and one for the MAC."""
    return -(-length // KEY_BYTES) + 1


def mask(body: bytes | bytearray, pad: Sequence[bytes | bytearray]) -> bytearray:
    """``body`` XOR the units one after the other; the same again takes it off.  ``ValueError`` for a short pad."""
    joined = bytearray().join(pad)
    if len(joined) < len(body):
        raise ValueError("the pad is shorter than what it should hide")
    masked = xor(body, joined)
    joined[:] = bytes(len(joined))
    return masked


def tag(unit: bytes | bytearray, header: bytes, masked: bytes | bytearray) -> bytes:
    """Over both, each with its length."""
    return Poly1305.generate_tag(bytes(unit), _framed(header, masked))


def check(unit: bytes | bytearray, header: bytes, masked: bytes | bytearray, claimed: bytes) -> None:
    """Raises :class:`NotAuthentic`."""
    try:
        Poly1305.verify_tag(bytes(unit), _framed(header, masked), claimed)
    except InvalidSignature:
        raise NotAuthentic("the tag of a hop is wrong") from None


def _framed(header: bytes, masked: bytes | bytearray) -> bytes:
    return len(header).to_bytes(8, "big") + header + len(masked).to_bytes(8, "big") + bytes(masked)
