"""AEAD of handshake messages: one key per direction, nonce = iv XOR number (PROTOCOL.md, chapter 1)."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag

from qvpn.crypto.suites import Suite
from qvpn.errors import BadPacket


def nonce(iv: bytes, number: int) -> bytes:
    """``iv ⊕ n``: the last 8 of the 12 bytes XORed with the number, big-endian."""
    return iv[:4] + (int.from_bytes(iv[4:], "big") ^ number).to_bytes(8, "big")


def seal(suite: Suite, key: bytes, iv: bytes, number: int, aad: bytes, plaintext: bytes) -> bytes:
    """Ciphertext and 16-byte tag.  The caller never uses a number twice under one key."""
    return suite.aead(key).encrypt(nonce(iv, number), plaintext, aad)


def open_untrusted(suite: Suite, key: bytes, iv: bytes, number: int, aad: bytes, sealed: bytes) -> bytes:
    """The plaintext.

    Raises:
        BadPacket: the tag does not verify.
    """
    try:
        return suite.aead(key).decrypt(nonce(iv, number), sealed, aad)
    except (InvalidTag, ValueError):
        raise BadPacket("tag does not verify") from None
