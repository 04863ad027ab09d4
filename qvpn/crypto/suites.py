"""The suites of protocol version 1 with their lengths: one table, nothing negotiated (PROTOCOL.md, chapter 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import mlkem
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from qvpn.tunnel.keys import Cipher

ED25519_SIGNATURE = 64
X25519_KEY = 32
TAG = 16

MlKemPrivate = mlkem.MLKEM768PrivateKey | mlkem.MLKEM1024PrivateKey
MlKemPublic = mlkem.MLKEM768PublicKey | mlkem.MLKEM1024PublicKey


MLDSA_SIGNATURE = {3: 3309, 5: 4627}
"""Bytes of an ML-DSA signature (FIPS 204, table 2) by the identity's level: 65 is level 3, 87 level 5."""


@dataclass(frozen=True, slots=True)
class Suite:
    """One row of the table.  Lengths in bytes."""

    code: int
    name: str
    level: int
    """Level of the identities that it signs with: 3 (ML-DSA-65) or 5 (ML-DSA-87)."""
    ek_bytes: int
    ct_bytes: int
    cipher: Cipher
    mlkem_private: type[MlKemPrivate]
    mlkem_public: type[MlKemPublic]
    aead: Callable[[bytes], AESGCM | ChaCha20Poly1305]

    @property
    def signature_bytes(self) -> int:
        """Both signatures, Ed25519 first."""
        return ED25519_SIGNATURE + MLDSA_SIGNATURE[self.level]


SUITES = {
    suite.code: suite
    for suite in (
        Suite(
            0x01,
            "X25519 + ML-KEM-768, Ed25519 + ML-DSA-65, AES-256-GCM",
            3,
            1184,
            1088,
            Cipher.AES_256_GCM,
            mlkem.MLKEM768PrivateKey,
            mlkem.MLKEM768PublicKey,
            AESGCM,
        ),
        Suite(
            0x02,
            "X25519 + ML-KEM-768, Ed25519 + ML-DSA-65, ChaCha20-Poly1305",
            3,
            1184,
            1088,
            Cipher.CHACHA20_POLY1305,
            mlkem.MLKEM768PrivateKey,
            mlkem.MLKEM768PublicKey,
            ChaCha20Poly1305,
        ),
        Suite(
            0x03,
            "X25519 + ML-KEM-1024, Ed25519 + ML-DSA-87, AES-256-GCM",
            5,
            1568,
            1568,
            Cipher.AES_256_GCM,
            mlkem.MLKEM1024PrivateKey,
            mlkem.MLKEM1024PublicKey,
            AESGCM,
        ),
    )
}
