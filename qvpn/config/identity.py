"""A site's long-term keys as files: what a key file holds, and how people compare it.

A private identity is a PEM file of two standard PKCS#8 blocks (RFC 5958), Ed25519 (RFC 8410) and ML-DSA in its seed
form (RFC 9881); its ``.pub`` is two SubjectPublicKeyInfo blocks.  Any OpenSSL >= 3.5 reads both.
Bytes in, bytes out: ``qvpn.privileged`` opens the files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import (
    MLDSA65PrivateKey,
    MLDSA65PublicKey,
    MLDSA87PrivateKey,
    MLDSA87PublicKey,
)

from qvpn.config.errors import IdentityError

MLDSAPrivateKey = MLDSA65PrivateKey | MLDSA87PrivateKey
MLDSAPublicKey = MLDSA65PublicKey | MLDSA87PublicKey

LEVELS = (3, 5)
"""NIST levels: 3 is ML-DSA-65 (suites 1 and 2), 5 is ML-DSA-87 (suite 3)."""

_FAMILY = {3: 0x01, 5: 0x03}
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)
"""No PEM, no key; a key that wants a password; a kind or curve that the library does not have."""
_PRIVATE_BLOCK = re.compile(rb"-----BEGIN PRIVATE KEY-----.+?-----END PRIVATE KEY-----\n?", re.DOTALL)
_PUBLIC_BLOCK = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----\n?", re.DOTALL)
_PSK_BYTES = 32


@dataclass(frozen=True)
class PublicIdentity:
    """What the peer knows of a site: one key of each kind."""

    ed25519: Ed25519PublicKey
    mldsa: MLDSAPublicKey
    level: int

    @property
    def fingerprint(self) -> bytes:
        """48 bytes, PROTOCOL.md chapter 2: SHA-384 of family, Ed25519 key and ML-DSA key."""
        family = bytes([_FAMILY[self.level]])
        return hashlib.sha384(family + self.ed25519.public_bytes_raw() + self.mldsa.public_bytes_raw()).digest()

    @property
    def readable(self) -> str:
        """What two people read to each other: 20 bytes of the fingerprint in base32, in groups of four."""
        text = base64.b32encode(self.fingerprint[:20]).decode()
        return "-".join(text[start : start + 4] for start in range(0, len(text), 4))

    def pem(self) -> bytes:
        """The ``.pub`` file."""
        return b"".join(
            key.public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)
            for key in (self.ed25519, self.mldsa)
        )


@dataclass(frozen=True)
class Identity:
    """A site's private keys."""

    ed25519: Ed25519PrivateKey = field(repr=False)
    mldsa: MLDSAPrivateKey = field(repr=False)
    level: int

    @property
    def public(self) -> PublicIdentity:
        return PublicIdentity(self.ed25519.public_key(), self.mldsa.public_key(), self.level)

    def pem(self) -> bytes:
        """The key file: keep it 0600."""
        return b"".join(
            key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())
            for key in (self.ed25519, self.mldsa)
        )


def generate(level: int = 3) -> Identity:
    """A new identity.  Raises ValueError for a level that is not in :data:`LEVELS`."""
    if level not in LEVELS:
        raise ValueError("a level is 3 (ML-DSA-65) or 5 (ML-DSA-87)")
    mldsa = MLDSA65PrivateKey.generate() if level == 3 else MLDSA87PrivateKey.generate()
    return Identity(Ed25519PrivateKey.generate(), mldsa, level)


def parse_private(data: bytes) -> Identity:
    """Read a key file's bytes.

    Raises:
        IdentityError: not two PKCS#8 blocks of the right kinds.  Never shows a byte of the file.
    """
    if _PUBLIC_BLOCK.search(data) is not None:
        raise IdentityError("holds a public key where the private identity belongs")
    keys = [_load_private(block) for block in _blocks(_PRIVATE_BLOCK, data, "private key")]
    if isinstance(keys[0], Ed25519PrivateKey):
        if isinstance(keys[1], MLDSA65PrivateKey):
            return Identity(keys[0], keys[1], 3)
        if isinstance(keys[1], MLDSA87PrivateKey):
            return Identity(keys[0], keys[1], 5)
    raise IdentityError("must hold an Ed25519 key and then an ML-DSA-65 or ML-DSA-87 key, as qvpn genkey writes them")


def parse_public(data: bytes) -> PublicIdentity:
    """Read a ``.pub`` file's bytes.

    Raises:
        IdentityError: not two SubjectPublicKeyInfo blocks of the right kinds.
    """
    if _PRIVATE_BLOCK.search(data) is not None:
        raise IdentityError("holds a private key where a public key belongs: a private key never leaves its site")
    keys = [_load_public(block) for block in _blocks(_PUBLIC_BLOCK, data, "public key")]
    if isinstance(keys[0], Ed25519PublicKey):
        if isinstance(keys[1], MLDSA65PublicKey):
            return PublicIdentity(keys[0], keys[1], 3)
        if isinstance(keys[1], MLDSA87PublicKey):
            return PublicIdentity(keys[0], keys[1], 5)
    raise IdentityError("must hold an Ed25519 key and then an ML-DSA-65 or ML-DSA-87 key, as qvpn pubkey writes them")


def _blocks(pattern: re.Pattern[bytes], data: bytes, what: str) -> list[bytes]:
    found: list[bytes] = pattern.findall(data)
    if len(found) != 2 or pattern.sub(b"", data).strip():
        raise IdentityError(f"must hold two PEM blocks of a {what} and nothing else, as qvpn writes them")
    return found


def _load_private(block: bytes) -> object:
    try:
        return ser.load_pem_private_key(block, None)
    except _UNREADABLE:  # from None: what the library says may show a part of a secret file
        raise IdentityError("holds a private key that cannot be read") from None


def _load_public(block: bytes) -> object:
    try:
        return ser.load_pem_public_key(block)
    except _UNREADABLE:
        raise IdentityError("holds a public key that cannot be read") from None


def generate_psk() -> bytes:
    """The text of a new PSK file: 32 random bytes in base64."""
    return base64.b64encode(secrets.token_bytes(_PSK_BYTES)) + b"\n"


def parse_psk(data: bytes) -> bytes:
    """The 32 bytes of a PSK file.

    Raises:
        IdentityError: not 32 bytes in base64, or all zero (which would mean "no PSK" in the protocol).
    """
    try:
        psk = base64.b64decode(data.strip(), validate=True)
    except (binascii.Error, ValueError):
        psk = b""
    if len(psk) != _PSK_BYTES:
        raise IdentityError("must hold a PSK of 32 bytes in base64, as qvpn genpsk writes it")
    if not any(psk):
        raise IdentityError("holds a PSK of zeros, which is no secret")
    return psk
