"""The hybrid key exchange: X25519 (RFC 7748) beside ML-KEM (FIPS 203).

``ss_mlkem ‖ ss_x25519`` is 64 bytes in that order; the combiner is the first
CasKDF round, which also takes both public messages in.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from qvpn.crypto.suites import MlKemPrivate, Suite
from qvpn.errors import BadPacket


class Encapsulated(NamedTuple):
    """``ciphertext`` and ``x25519`` go to the initiator, ``secret`` (64 bytes) stays."""

    ciphertext: bytes
    x25519: bytes
    secret: bytes


class Ephemeral(Protocol):
    """The initiator's fresh keys; used once, then dropped."""

    ek: bytes
    x25519: bytes

    def decapsulate_untrusted(self, ciphertext: bytes, x25519: bytes) -> bytes: ...


class Kem(Protocol):
    """Where ephemeral keys come from.  Vectors put a recorded one in its place."""

    def generate(self, suite: Suite) -> Ephemeral: ...

    def encapsulate_untrusted(self, suite: Suite, ek: bytes, x25519: bytes) -> Encapsulated: ...


class HybridEphemeral:
    """One ML-KEM and one X25519 private key."""

    def __init__(self, mlkem: MlKemPrivate, x25519: X25519PrivateKey) -> None:
        self._mlkem = mlkem
        self._x25519 = x25519
        self.ek = mlkem.public_key().public_bytes_raw()
        self.x25519 = x25519.public_key().public_bytes_raw()

    def decapsulate_untrusted(self, ciphertext: bytes, x25519: bytes) -> bytes:
        """``ss_mlkem ‖ ss_x25519`` (64 bytes).

        A ciphertext that was altered gives another ML-KEM secret (implicit rejection), so the next AEAD fails.

        Raises:
            BadPacket: wrong length, or a point of small order.
        """
        try:
            return self._mlkem.decapsulate(ciphertext) + self._x25519.exchange(
                X25519PublicKey.from_public_bytes(x25519)
            )
        except ValueError as error:
            raise BadPacket(f"key exchange: {error}") from None


class HybridKem:
    """The real thing, on the library's own randomness."""

    def generate(self, suite: Suite) -> HybridEphemeral:
        return HybridEphemeral(suite.mlkem_private.generate(), X25519PrivateKey.generate())

    def encapsulate_untrusted(self, suite: Suite, ek: bytes, x25519: bytes) -> Encapsulated:
        """Answer an initiator's keys.

        Raises:
            BadPacket: an encapsulation key that is not canonical, a point of small order, a wrong length.
        """
        try:
            ss_mlkem, ciphertext = suite.mlkem_public.from_public_bytes(ek).encapsulate()
            own = X25519PrivateKey.generate()
            ss_x25519 = own.exchange(X25519PublicKey.from_public_bytes(x25519))
        except ValueError as error:
            raise BadPacket(f"key exchange: {error}") from None
        return Encapsulated(ciphertext, own.public_key().public_bytes_raw(), ss_mlkem + ss_x25519)
