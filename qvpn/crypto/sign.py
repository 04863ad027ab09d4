"""Two signatures as one: Ed25519 (RFC 8032) and ML-DSA (FIPS 204).  Both must verify."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature

from qvpn.config.identity import Identity, PublicIdentity
from qvpn.crypto.suites import ED25519_SIGNATURE


def sign(identity: Identity, label: bytes, data: bytes) -> bytes:
    """``sig_ed ‖ sig_ml`` over ``label ‖ data``; ML-DSA has the label as its context too (FIPS 204, 5.2)."""
    message = label + data
    return identity.ed25519.sign(message) + identity.mldsa.sign(message, label)


def verifies(identity: PublicIdentity, label: bytes, data: bytes, signatures: bytes) -> bool:
    """Whether both signatures over ``label ‖ data`` are the identity's.

    Both are always checked, so that the time does not tell which one failed.
    """
    message = label + data
    good = True
    try:
        identity.ed25519.verify(signatures[:ED25519_SIGNATURE], message)
    except InvalidSignature:
        good = False
    try:
        identity.mldsa.verify(signatures[ED25519_SIGNATURE:], message, label)
    except InvalidSignature:
        good = False
    return good
