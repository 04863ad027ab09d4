"""What an end makes of a block's keys, and how the other end puts them together again.

::

    secret = keys (32 bytes each) ‖ V (64 bytes)     = share 1 XOR share 2 XOR ... XOR share k, each one random
    share j ── AES-256-GCM under a key from ML-KEM-768 (FIPS 203) ──▶ over path j, and there under the hops' pads

All k shares are needed: k - 1 of them are independent of the secret, whatever anybody can compute.  Who holds all k
paths still meets ML-KEM.  The public key travels from end to end over TLS, not along a path.

XOR can be bent without being read: a node that knew how to take the wrapping off could flip bits of keys.  So the
ends confirm to each other, before either gives a key out, under V, which is shared over every path: HMAC-SHA-256
under one half of V for each direction, over all that both must agree on, and the keys themselves.  (Not Poly1305:
bits of V can be bent too, and against a *related* key its proof says nothing.)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keysource.base import KEY_BYTES, wipe
from keysource.kme.records import xor
from keysource.network.errors import NotAuthentic

VALUE_BYTES = 64
_TAG = 16
EK_BYTES, CT_BYTES = 1184, 1088
Random = Callable[[int], bytes]
PrivateKey = MLKEM768PrivateKey


@dataclass(frozen=True, slots=True)
class Terms:
    """What both ends must agree on about a block; bound into every share and both confirmations."""

    transfer: str
    """A UUID, fresh for every attempt."""
    connection: str
    block: int
    count: int
    """Keys."""
    paths: tuple[tuple[str, ...], ...]
    origin: str

    def encoded(self) -> bytes:
        """One encoding: JSON with sorted names."""
        return canonical(
            {
                "transfer": self.transfer,
                "connection": self.connection,
                "block": self.block,
                "count": self.count,
                "paths": self.paths,
                "origin": self.origin,
            }
        )


@dataclass(slots=True)
class Secret:
    """A block's keys, and the value that the ends confirm them under."""

    keys: bytearray = field(repr=False)
    value: bytearray = field(repr=False)

    def wipe(self) -> None:
        wipe(self.keys)
        wipe(self.value)


def canonical(fields: dict[str, object]) -> bytes:
    """JSON in one way only."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def wrapped_bytes(count: int) -> int:
    """How long a wrapped share of ``count`` keys is."""
    return count * KEY_BYTES + VALUE_BYTES + _TAG


def new_shares(count: int, paths: int, random: Random = os.urandom) -> tuple[Secret, list[bytearray]]:
    """A fresh secret and its shares."""
    length = count * KEY_BYTES + VALUE_BYTES
    shares = [bytearray(random(length)) for _ in range(paths)]
    return joined(shares), shares


def joined(shares: Sequence[bytearray]) -> Secret:
    """The secret that these shares make."""
    whole = bytearray(len(shares[0]))
    for share in shares:
        if len(share) != len(whole):
            raise ValueError("shares of different lengths")
        whole = xor(whole, share)
    return Secret(whole[:-VALUE_BYTES], whole[-VALUE_BYTES:])


def new_kem() -> tuple[PrivateKey, bytes]:
    """For one transfer: the private key, and the public key to send."""
    private = MLKEM768PrivateKey.generate()
    return private, private.public_key().public_bytes_raw()


def encapsulate_untrusted(ek: bytes) -> tuple[bytes, bytes]:
    """(shared secret, ciphertext).  Raises :class:`NotAuthentic` for what is no public key."""
    try:
        return MLKEM768PublicKey.from_public_bytes(ek).encapsulate()
    except ValueError:
        raise NotAuthentic("that is no public key of ML-KEM-768") from None


def decapsulate_untrusted(private: PrivateKey, ciphertext: bytes) -> bytes:
    """A wrong ciphertext gives another secret (implicit rejection), so the unwrapping fails.  Of a wrong length:
    :class:`NotAuthentic`."""
    try:
        return private.decapsulate(ciphertext)
    except ValueError:
        raise NotAuthentic("that is no ciphertext of ML-KEM-768") from None


def wrap(secret: bytes, terms: Terms, index: int, share: bytes | bytearray) -> bytes:
    """Share ``index`` under the secret from ML-KEM; each index has a key of its own, used once."""
    return _cipher(secret, terms, index).encrypt(bytes(12), bytes(share), terms.encoded())


def unwrap_untrusted(secret: bytes, terms: Terms, index: int, blob: bytes | bytearray) -> bytearray:
    """Raises :class:`NotAuthentic`."""
    try:
        return bytearray(_cipher(secret, terms, index).decrypt(bytes(12), bytes(blob), terms.encoded()))
    except (InvalidTag, ValueError):
        raise NotAuthentic("a share was altered on its way") from None


def confirmation(secret: Secret, terms: Terms, ek: bytes, ciphertext: bytes, *, by_target: bool) -> bytes:
    """32 bytes by which one end shows that it has the same keys, on the same terms."""
    half = secret.value[:32] if by_target else secret.value[32:]
    text = terms.encoded()
    parts = [b"target" if by_target else b"initiator", text, ek, ciphertext, bytes(secret.keys)]
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.new(bytes(half), b"qvpn relay confirmation v1" + framed, hashlib.sha256).digest()


def confirm(expected: bytes, claimed: bytes) -> None:
    """Raises :class:`NotAuthentic`."""
    if not hmac.compare_digest(expected, claimed):
        raise NotAuthentic("the other end has other keys")


def _cipher(secret: bytes, terms: Terms, index: int) -> AESGCM:
    info = canonical({"label": "qvpn relay share v1", "transfer": terms.transfer, "path": index})
    return AESGCM(HKDF(hashes.SHA256(), 32, None, info).derive(secret))
