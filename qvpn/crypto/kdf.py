"""Hashes and key derivation: SHA-384, HKDF (RFC 5869) and the cascade of ETSI TS 103 744."""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

HASH_BYTES = 48
KEY_MATERIAL_BYTES = 96
ZERO_HASH = bytes(HASH_BYTES)


def lp(value: bytes) -> bytes:
    """``LP(x)``: the length as u32, then the value."""
    return len(value).to_bytes(4, "big") + value


def digest(*parts: bytes) -> bytes:
    """``H(LP(a) ‖ LP(b) ‖ ...)``: SHA-384 over length-prefixed parts."""
    state = hashlib.sha384()
    for part in parts:
        state.update(len(part).to_bytes(4, "big"))
        state.update(part)
    return state.digest()


def hmac384(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha384")


def extract(salt: bytes, ikm: bytes) -> bytes:
    """HKDF-Extract with SHA-384; 48 bytes."""
    return HKDF.extract(hashes.SHA384(), salt, ikm)


def expand(prk: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand with SHA-384; ``length`` up to 255 x 48 bytes."""
    return HKDFExpand(hashes.SHA384(), length, info).derive(prk)


def hkdf(ikm: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return expand(extract(salt, ikm), info, length)


class Round(NamedTuple):
    """What a cascade round gives: the next chain secret (48 bytes) and key material (96 bytes)."""

    chain_secret: bytes
    key_material: bytes


def cas_kdf(chain_secret: bytes, secret: bytes, ma: bytes, mb: bytes, label: bytes, info: bytes) -> Round:
    """One CasKDF round (ETSI TS 103 744, cascade): HMAC as PRF and HKDF as KDF, both with SHA-384.

    Each secret has one fixed length per label, which is what HMAC needs to be a dual PRF (ePrint 2023/861).
    """
    round_secret = hmac384(chain_secret, digest(secret, ma, mb))
    out = hkdf(round_secret, label, info, HASH_BYTES + KEY_MATERIAL_BYTES)
    return Round(out[:HASH_BYTES], out[HASH_BYTES:])
