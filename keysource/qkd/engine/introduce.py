"""How a link without a couriered pad gets its first shared secret: ends that know each other's public identities.

The *head* is what :mod:`keysource.qkd.pad` calls so: 64 bytes that keep strangers from the connections and seal what
sites tell the fibre.  No key's secrecy rests on it, and it is no part of the one-time authentication.  Alice draws
it; Bob, who has none yet, asks::

    B -> A  INTRODUCE  version u8, 32 random bytes, X25519 public (32), ML-KEM-768 public (1184), signatures
    A -> B  INTRODUCE  32 random bytes, X25519 public (32), ML-KEM-768 ciphertext (1088), sealed head, signatures

Signatures are those of :class:`~keysource.qkd.identity.Signers`; Alice's cover Bob's whole request.  The head is
sealed by AES-256-GCM under HKDF of both shared secrets and both messages.  A request that is replayed gets an answer
that only Bob's lost private keys open; an answer that is replayed does not cover a new request.  Asked again, Alice
gives the same head: whatever was lost on the way, nobody waits for ever.  Sans-IO.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.errors import BadFrame, Disagreement
from keysource.qkd.identity import SIGNATURE_BYTES, Signers
from keysource.qkd.pad import HEAD_BYTES

VERSION = 1
_REQUEST, _ANSWER = b"qvpn-qkd introduction v1 request", b"qvpn-qkd introduction v1 answer"
_RANDOM, _X25519, _KEM_PUBLIC, _KEM_TEXT, _TAG = 32, 32, 1184, 1088, 16
_STRANGER = "an introduction that is not signed by this link's other end"


class Request:
    """Bob's side of one introduction."""

    def __init__(self, signers: Signers) -> None:
        self._signers = signers
        self._x25519, self._kem = X25519PrivateKey.generate(), MLKEM768PrivateKey.generate()
        keys = self._x25519.public_key().public_bytes_raw() + self._kem.public_key().public_bytes_raw()
        self._body = bytes([VERSION]) + os.urandom(_RANDOM) + keys

    def frame(self) -> Frame:
        return Frame(Kind.INTRODUCE, self._body + self._signers.sign(_REQUEST, self._body))

    def take_answer_untrusted(self, frame: Frame) -> bytes:
        """The head.  Raises :class:`BadFrame` for anything that Alice did not make for this request."""
        wanted = _RANDOM + _X25519 + _KEM_TEXT + HEAD_BYTES + _TAG + SIGNATURE_BYTES
        if frame.kind is not Kind.INTRODUCE or len(frame.payload) != wanted:
            raise BadFrame("no introduction where one belongs")
        body, signatures = frame.payload[:-SIGNATURE_BYTES], frame.payload[-SIGNATURE_BYTES:]
        if not self._signers.fits(_ANSWER, _digest(self._body) + body, signatures):
            raise BadFrame(_STRANGER)
        public, at = body[_RANDOM : _RANDOM + _X25519], _RANDOM + _X25519
        text, sealed = body[at : at + _KEM_TEXT], body[at + _KEM_TEXT :]
        try:
            shared = self._kem.decapsulate(text) + self._x25519.exchange(X25519PublicKey.from_public_bytes(public))
            return AESGCM(_key(shared, self._body, body[: at + _KEM_TEXT])).decrypt(bytes(12), sealed, None)
        except (ValueError, InvalidTag):
            raise BadFrame("an introduction that cannot be opened") from None


def answer_untrusted(signers: Signers, head: bytes, frame: Frame) -> Frame:
    """Alice's side: the same ``head`` for whoever proves to be Bob.

    Raises:
        BadFrame: he did not sign this.
        Disagreement: another version.
    """
    if frame.kind is not Kind.INTRODUCE or not frame.payload:
        raise BadFrame("no introduction where one belongs")
    if frame.payload[0] != VERSION:
        raise Disagreement(f"the other end introduces itself by version {frame.payload[0]}, this one by {VERSION}")
    if len(frame.payload) != 1 + _RANDOM + _X25519 + _KEM_PUBLIC + SIGNATURE_BYTES:
        raise BadFrame("an introduction of a wrong length")
    body, signatures = frame.payload[:-SIGNATURE_BYTES], frame.payload[-SIGNATURE_BYTES:]
    if not signers.fits(_REQUEST, body, signatures):
        raise BadFrame(_STRANGER)
    public, own = body[1 + _RANDOM : 1 + _RANDOM + _X25519], X25519PrivateKey.generate()
    try:
        secret, text = MLKEM768PublicKey.from_public_bytes(body[1 + _RANDOM + _X25519 :]).encapsulate()
        shared = secret + own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise BadFrame("an introduction with keys that are none") from None
    reply = os.urandom(_RANDOM) + own.public_key().public_bytes_raw() + text
    reply += AESGCM(_key(shared, body, reply)).encrypt(bytes(12), head, None)  # the key is of this answer alone
    return Frame(Kind.INTRODUCE, reply + signers.sign(_ANSWER, _digest(body) + reply))


def _digest(body: bytes) -> bytes:
    return hashlib.sha512(body).digest()


def _key(shared: bytes, request: bytes, answer: bytes) -> bytes:
    """``answer``: all of it before the sealed head."""
    salt = hashlib.sha512(request + answer).digest()
    return HKDF(hashes.SHA256(), 32, salt, b"qvpn-qkd introduction v1").derive(shared)
