"""Handshake datagrams, cold and inner: headers, macs, fragments out (PROTOCOL.md, chapters 3 and 11)."""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from qvpn.crypto import kdf, labels
from qvpn.errors import BadPacket
from qvpn.wire.messages import NO_INDEX, ControlType, MessageType

VERSION = 1
HEADER = struct.Struct(">BBBB4s4s4s")
MAC = 16
NO_MAC = bytes(MAC)
OVERHEAD = HEADER.size + 2 * MAC
RETRY_BYTES = 80
MAX_FRAGMENTS = 15
MAX_MESSAGE = 8192
DEFAULT_LIMIT = 1200
"""Bytes of UDP payload: fits an IPv6 path of the minimum MTU (1280 - 40 - 8 = 1232)."""
INNER_FRAGMENT = 1100

_INNER = struct.Struct(">BBBB4s4s")


@dataclass(frozen=True, slots=True)
class Datagram:
    """A handshake datagram whose form is right and whose macs nobody has looked at yet."""

    type: MessageType
    suite: int
    index: int
    count: int
    sender: bytes
    receiver: bytes
    message_id: bytes
    fragment: bytes = field(repr=False)
    """RETRY: empty."""
    raw: bytes = field(repr=False)

    @property
    def mac1(self) -> bytes:
        return self.raw[-2 * MAC : -MAC] if self.type is not MessageType.RETRY else self.raw[-MAC:]

    @property
    def mac2(self) -> bytes:
        return self.raw[-MAC:]

    def mac1_fits(self, gate_key: bytes) -> bool:
        covered = self.raw[: -MAC if self.type is MessageType.RETRY else -2 * MAC]
        return hmac.compare_digest(mac(gate_key, covered), self.mac1)

    def mac2_fits(self, cookie: bytes) -> bool:
        return hmac.compare_digest(mac(cookie, self.raw[:-MAC]), self.mac2)


def mac(key: bytes, data: bytes) -> bytes:
    """The first 16 bytes of HMAC-SHA-256."""
    return hmac.digest(key, data, "sha256")[:MAC]


def gate_key(psk: bytes, one: bytes, other: bytes, sender: bytes) -> bytes:
    """``gk_X`` of the sender X between two fingerprints; 32 bytes."""
    return kdf.hkdf(psk, labels.GATE, min(one, other) + max(one, other) + sender, 32)


def decode_untrusted(data: bytes) -> Datagram:
    """The form only.

    Raises:
        BadPacket: length, version, type or fragment numbers are not possible.
    """
    if len(data) < HEADER.size + 2 * MAC:
        raise BadPacket("handshake datagram is too short")
    kind, version, suite, fragment, sender, receiver, message_id = HEADER.unpack_from(data)
    index, count = fragment >> 4, fragment & 0x0F
    if version != VERSION or kind not in iter(MessageType) or index >= count:
        raise BadPacket("handshake datagram with a wrong header")
    if kind == MessageType.RETRY:
        if len(data) != RETRY_BYTES:
            raise BadPacket("RETRY of the wrong length")
        return Datagram(MessageType.RETRY, suite, index, count, sender, receiver, message_id, b"", data)
    body = data[HEADER.size : -2 * MAC]
    if not body:
        raise BadPacket("empty fragment")
    return Datagram(MessageType(kind), suite, index, count, sender, receiver, message_id, body, data)


def split(message: bytes, size: int) -> list[bytes]:
    """Fragments of equal length but the last; ``ValueError`` where more than 15 would be needed."""
    pieces = [message[start : start + size] for start in range(0, len(message), size)]
    if len(pieces) > MAX_FRAGMENTS:
        raise ValueError(f"a message of {len(message)} bytes needs more than {MAX_FRAGMENTS} fragments of {size}")
    return pieces


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message on its way: the same bytes at each retransmission, only mac2 may change."""

    type: MessageType
    suite: int
    sender: bytes
    receiver: bytes
    message_id: bytes
    body: bytes = field(repr=False)

    def datagrams(self, key: bytes, cookie: bytes | None, limit: int = DEFAULT_LIMIT) -> tuple[bytes, ...]:
        """Cold: outer datagrams of at most ``limit`` bytes with mac1 under our gate key."""
        pieces = split(self.body, limit - OVERHEAD)
        out = []
        for index, piece in enumerate(pieces):
            fragment = index << 4 | len(pieces)
            head = HEADER.pack(self.type, VERSION, self.suite, fragment, self.sender, self.receiver, self.message_id)
            covered = head + piece
            covered += mac(key, covered)
            out.append(covered + (mac(cookie, covered) if cookie else NO_MAC))
        return tuple(out)

    def payloads(self, handshake_index: bytes) -> tuple[bytes, ...]:
        """Inner: payloads of control records."""
        pieces = split(self.body, INNER_FRAGMENT)
        return tuple(
            _INNER.pack(
                ControlType.HANDSHAKE,
                self.type,
                self.suite,
                index << 4 | len(pieces),
                self.message_id,
                handshake_index,
            )
            + piece
            for index, piece in enumerate(pieces)
        )


@dataclass(frozen=True, slots=True)
class InnerFragment:
    """What a HANDSHAKE control payload says."""

    type: MessageType
    suite: int
    index: int
    count: int
    message_id: bytes
    handshake_index: bytes
    fragment: bytes = field(repr=False)


def decode_inner_untrusted(payload: bytes) -> InnerFragment:
    """A HANDSHAKE control payload, its type byte included.

    Raises:
        BadPacket: it does not parse.
    """
    if len(payload) <= _INNER.size:
        raise BadPacket("inner handshake fragment is too short")
    _control, kind, suite, fragment, message_id, handshake_index = _INNER.unpack_from(payload)
    index, count = fragment >> 4, fragment & 0x0F
    if kind not in iter(MessageType) or kind == MessageType.RETRY or index >= count:
        raise BadPacket("inner handshake fragment with a wrong header")
    return InnerFragment(MessageType(kind), suite, index, count, message_id, handshake_index, payload[_INNER.size :])


def _retry_key(key: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, labels.COOKIE + nonce, "sha256")


def encode_retry(m1: Datagram, key: bytes, cookie: bytes, nonce: bytes) -> bytes:
    """RETRY to fragment 0 of an M1: 80 bytes.  ``key`` is our gate key, ``nonce`` 16 random bytes."""
    head = HEADER.pack(MessageType.RETRY, VERSION, m1.suite, 0x01, NO_INDEX, m1.sender, m1.message_id)
    sealed = AESGCM(_retry_key(key, nonce)).encrypt(bytes(12), cookie, m1.mac1)
    covered = head + nonce + sealed
    return covered + mac(key, covered)


def open_retry_untrusted(retry: bytes, key: bytes, mac1: bytes) -> bytes:
    """The cookie.  ``key``: the peer's gate key; ``mac1``: that of fragment 0 of the M1 that was answered.

    Raises:
        BadPacket: it answers another M1, or is forged.
    """
    nonce, sealed = retry[HEADER.size : HEADER.size + 16], retry[HEADER.size + 16 : -MAC]
    try:
        return AESGCM(_retry_key(key, nonce)).decrypt(bytes(12), sealed, mac1)
    except InvalidTag:
        raise BadPacket("RETRY does not answer our M1") from None
