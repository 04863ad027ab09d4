"""Long-term keys of a link's two ends: Ed25519 and ML-DSA-65 together, for links that begin without a couriered pad.

A private identity is a PEM file of two PKCS#8 blocks (RFC 5958), Ed25519 (RFC 8410) and ML-DSA-65 in its seed form
(RFC 9881); its public half has two SubjectPublicKeyInfo blocks.  The files of ``qvpn genkey`` and ``qvpn pubkey``
are of this form, and are read here anew, for ``keysource`` works without ``qvpn``.  What is signed is signed by
both; both must verify.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey

from keysource.base import End
from keysource.qkd.errors import LinkSettings
from keysource.qkd.files import read_private

_ED25519_SIGNATURE = 64
SIGNATURE_BYTES = _ED25519_SIGNATURE + 3309
"""Of Ed25519 (RFC 8032) and ML-DSA-65 (FIPS 204, table 2), in this order."""
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)
"""No PEM, no key; a key that wants a password; a kind or curve that the library does not have."""
_PRIVATE_BLOCK = re.compile(rb"-----BEGIN PRIVATE KEY-----.+?-----END PRIVATE KEY-----\n?", re.DOTALL)
_PUBLIC_BLOCK = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----\n?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """One key of each kind."""

    ed25519: Ed25519PublicKey
    mldsa: MLDSA65PublicKey

    @property
    def fingerprint(self) -> bytes:
        """48 bytes, the same that ``qvpn`` shows: SHA-384 of the family (1) and both keys."""
        return hashlib.sha384(b"\x01" + self.ed25519.public_bytes_raw() + self.mldsa.public_bytes_raw()).digest()

    @property
    def readable(self) -> str:
        """What two people read to each other: 20 bytes of the fingerprint in base32, in groups of four."""
        text = base64.b32encode(self.fingerprint[:20]).decode()
        return "-".join(text[start : start + 4] for start in range(0, len(text), 4))

    def pem(self) -> bytes:
        form = ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo
        return self.ed25519.public_bytes(*form) + self.mldsa.public_bytes(*form)


@dataclass(frozen=True, slots=True)
class Identity:
    ed25519: Ed25519PrivateKey = field(repr=False)
    mldsa: MLDSA65PrivateKey = field(repr=False)

    @property
    def public(self) -> PublicIdentity:
        return PublicIdentity(self.ed25519.public_key(), self.mldsa.public_key())

    def pem(self) -> bytes:
        """The key file: keep it 0600."""
        form = ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption()
        return self.ed25519.private_bytes(*form) + self.mldsa.private_bytes(*form)


@dataclass(frozen=True, slots=True)
class Signers:
    """One end's view of the two that may speak on a link.  What it signs names the link, both identities in order
    and the speaker, so that nothing fits another link, another pair of ends, or the way back."""

    end: End
    link: str
    me: Identity = field(repr=False)
    peer: PublicIdentity

    def sign(self, purpose: bytes, data: bytes) -> bytes:
        """:data:`SIGNATURE_BYTES`.  ``purpose`` is the context of ML-DSA too (FIPS 204, 5.2)."""
        message = self._message(purpose, self.end, data)
        return self.me.ed25519.sign(message) + self.me.mldsa.sign(message, purpose)

    def fits(self, purpose: bytes, data: bytes, signatures: bytes) -> bool:
        """Did the other end sign this?  Both signatures are always looked at."""
        message = self._message(purpose, self.end.other, data)
        good = len(signatures) == SIGNATURE_BYTES
        try:
            self.peer.ed25519.verify(signatures[:_ED25519_SIGNATURE], message)
        except InvalidSignature:
            good = False
        try:
            self.peer.mldsa.verify(signatures[_ED25519_SIGNATURE:], message, purpose)
        except InvalidSignature:
            good = False
        return good

    def _message(self, purpose: bytes, speaker: End, data: bytes) -> bytes:
        ends = [self.me.public.fingerprint, self.peer.fingerprint]
        if self.end is End.B:
            ends.reverse()
        link = self.link.encode()
        return b"".join([purpose, b"\0", speaker.value.encode(), len(link).to_bytes(2, "big"), link, *ends, data])


def generate() -> Identity:
    """A new identity, from the operating system's randomness."""
    return Identity(Ed25519PrivateKey.generate(), MLDSA65PrivateKey.generate())


def parse_private(data: bytes, where: str) -> Identity:
    """The bytes of a key file.  Raises :class:`LinkSettings`, which begins with ``where`` and shows none of them."""
    first, second = (_private(block, where) for block in _blocks(_PRIVATE_BLOCK, data, where))
    if isinstance(first, Ed25519PrivateKey) and isinstance(second, MLDSA65PrivateKey):
        return Identity(first, second)
    raise LinkSettings(f"{where}: must hold an Ed25519 and an ML-DSA-65 key, as qvpn genkey writes them (level 3)")


def parse_public(data: bytes, where: str) -> PublicIdentity:
    """The bytes of a ``.pub`` file.  Raises :class:`LinkSettings`."""
    if _PRIVATE_BLOCK.search(data) is not None:
        raise LinkSettings(f"{where}: holds a private key, which never leaves its site; the public one belongs here")
    first, second = (_public(block, where) for block in _blocks(_PUBLIC_BLOCK, data, where))
    if isinstance(first, Ed25519PublicKey) and isinstance(second, MLDSA65PublicKey):
        return PublicIdentity(first, second)
    raise LinkSettings(f"{where}: must hold an Ed25519 and an ML-DSA-65 key, as qvpn pubkey writes them (level 3)")


def _blocks(pattern: re.Pattern[bytes], data: bytes, where: str) -> list[bytes]:
    found: list[bytes] = pattern.findall(data)
    if len(found) != 2 or pattern.sub(b"", data).strip():
        raise LinkSettings(f"{where}: must hold two PEM blocks of a key and nothing else")
    return found


def _private(block: bytes, where: str) -> object:
    try:
        return ser.load_pem_private_key(block, None)
    except _UNREADABLE:  # from None: what the library says may show a part of a secret file
        raise LinkSettings(f"{where}: holds a private key that cannot be read") from None


def _public(block: bytes, where: str) -> object:
    try:
        return ser.load_pem_public_key(block)
    except _UNREADABLE:
        raise LinkSettings(f"{where}: holds a public key that cannot be read") from None


def load_signers(end: End, link: str, mine: Path, theirs: Path) -> Signers:
    """From the files.  Raises :class:`LinkSettings` where one is missing, open to others, of another form, or both
    are the same identity, which would let an end's own words come back to it."""
    try:
        me = parse_private(read_private(mine, "the identity"), str(mine))
        peer = parse_public(theirs.read_bytes(), str(theirs))
    except OSError as error:
        raise LinkSettings(f"{error.filename}: {error.strerror}") from None
    if me.public.fingerprint == peer.fingerprint:
        raise LinkSettings(f"{theirs}: is this end's own identity, not the other end's")
    return Signers(end, link, me, peer)
