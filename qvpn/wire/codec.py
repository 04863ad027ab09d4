"""Messages to bytes and back (PROTOCOL.md, chapter 4).

Each ``*_untrusted`` takes bytes from the network and gives a value or raises :class:`~qvpn.errors.BadPacket`,
nothing else.  ``decode(encode(x)) == x`` and there is one encoding of each value.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping

from qvpn.crypto.suites import TAG, X25519_KEY, Suite
from qvpn.errors import BadPacket
from qvpn.wire.messages import (
    CHAIN_ID_BYTES,
    CONFIRM_BYTES,
    CRITICAL,
    INDEX_BYTES,
    M1,
    M2,
    MAX_TLVS,
    NO_CHAIN,
    NO_INDEX,
    P2,
    P3,
    P4,
    TLV_CLAIM,
    TLV_LANES,
    Body,
    KeyName,
    Mode,
    Outcome,
    Policy,
    Reason,
    Signed,
    WireOrigin,
)

_POLICY = struct.Struct(">BBBBI")
_TLV = struct.Struct(">HH")
_KNOWN_TLVS = {TLV_LANES, TLV_CLAIM}
_READY = 0x01
_UUID_KIND, _TEXT_KIND = 0, 1
MAX_LABEL = 32
MAX_KEY_ID = 64


class _Reader:
    """A cursor that cannot run past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        piece = self._data[self.position : self.position + count]
        if len(piece) != count:
            raise BadPacket("message is too short")
        self.position += count
        return piece

    def byte(self) -> int:
        return self.take(1)[0]


def check_index_untrusted(index: bytes) -> bytes:
    """An index is four bytes, not all zero, with the low four bits of the last zero (the lane's place)."""
    if len(index) != INDEX_BYTES or index == NO_INDEX or index[3] & 0x0F:
        raise BadPacket("index that cannot be one")
    return index


def encode_m1(message: M1) -> bytes:
    return message.index + message.ek + message.x25519 + message.chain_new + message.chain_old


def decode_m1_untrusted(suite: Suite, data: bytes) -> M1:
    if len(data) != INDEX_BYTES + suite.ek_bytes + X25519_KEY + 2 * CHAIN_ID_BYTES:
        raise BadPacket("M1 has the wrong length")
    reader = _Reader(data)
    return M1(
        check_index_untrusted(reader.take(INDEX_BYTES)),
        reader.take(suite.ek_bytes),
        reader.take(X25519_KEY),
        reader.take(CHAIN_ID_BYTES),
        reader.take(CHAIN_ID_BYTES),
    )


def encode_m2_clear(index: bytes, ciphertext: bytes, x25519: bytes, chain_selected: int) -> bytes:
    """M2c; E2 follows it on the wire."""
    return index + ciphertext + x25519 + bytes([chain_selected])


def decode_m2_untrusted(suite: Suite, data: bytes, offered: tuple[bytes, bytes]) -> M2:
    """``offered``: chain_new and chain_old of our M1; an answer may select neither of the two if it is zero."""
    clear = INDEX_BYTES + suite.ct_bytes + X25519_KEY + 1
    if len(data) < clear + _POLICY.size + 2 + suite.signature_bytes + TAG:
        raise BadPacket("M2 is too short")
    reader = _Reader(data)
    index = check_index_untrusted(reader.take(INDEX_BYTES))
    ciphertext, x25519, selected = reader.take(suite.ct_bytes), reader.take(X25519_KEY), reader.byte()
    if selected > 2 or (selected and offered[selected - 1] == NO_CHAIN):
        raise BadPacket("M2 selects a chain that was not offered")
    return M2(index, ciphertext, x25519, selected, data[:clear], data[clear:])


def encode_policy(policy: Policy) -> bytes:
    return _POLICY.pack(policy.mode, _READY if policy.ready else 0, 1, 0, policy.max_qkd_age)


def _policy(reader: _Reader) -> Policy:
    mode, flags, keys, _reserved, age = _POLICY.unpack(reader.take(_POLICY.size))
    if keys != 1:
        raise BadPacket(f"policy wants {keys} keys an epoch; version 1 has 1")
    try:
        return Policy(Mode(mode), bool(flags & _READY), age)
    except ValueError:
        raise BadPacket(f"policy mode {mode}") from None


def encode_tlvs(tlvs: Mapping[int, bytes]) -> bytes:
    entries = b"".join(
        _TLV.pack(kind, len(value)) + value
        for kind, value in sorted(tlvs.items(), key=lambda entry: entry[0] & ~CRITICAL)
    )
    if len(entries) > MAX_TLVS:
        raise ValueError(f"{len(entries)} bytes of TLVs, at most {MAX_TLVS} fit")
    return len(entries).to_bytes(2, "big") + entries


def _tlvs(reader: _Reader) -> dict[int, bytes]:
    """By type without the critical bit: a critical claim is a claim."""
    total = int.from_bytes(reader.take(2), "big")
    if total > MAX_TLVS:
        raise BadPacket("TLV list is too long")
    end, last, tlvs = reader.position + total, -1, dict[int, bytes]()
    while reader.position < end:
        kind, length = _TLV.unpack(reader.take(_TLV.size))
        value = reader.take(length)
        if kind & ~CRITICAL <= last:
            raise BadPacket("TLVs out of order")
        last = kind & ~CRITICAL
        if kind & CRITICAL and last not in _KNOWN_TLVS:
            raise BadPacket(f"unknown critical TLV {last:#06x}")
        tlvs[last] = value
    if reader.position != end:
        raise BadPacket("TLV list does not end where it says")
    return tlvs


def encode_p2(body: P2) -> bytes:
    return encode_policy(body.policy) + encode_tlvs(body.tlvs)


def decode_p2_untrusted(suite: Suite, data: bytes) -> Signed[P2]:
    """P2 and the signatures behind it, which must fill the rest exactly."""
    reader = _Reader(data)
    body = P2(_policy(reader), _tlvs(reader))
    return _signed(suite, reader, data, body)


def encode_key(name: KeyName) -> bytes:
    """One key entry of P3; a canonical UUID is always kind 0."""
    label = name.label.encode("ascii")
    raw = _uuid_bytes(name.key_id)
    if raw is not None:
        identity = bytes([_UUID_KIND]) + raw
    else:
        text = name.key_id.encode("ascii")
        if not 1 <= len(text) <= MAX_KEY_ID:
            raise ValueError("a key_ID has 1 to 64 bytes")
        identity = bytes([_TEXT_KIND, len(text)]) + text
    if not 1 <= len(label) <= MAX_LABEL:
        raise ValueError("a label has 1 to 32 bytes")
    return bytes([len(label)]) + label + identity + bytes([name.origin, name.hops])


def _uuid_bytes(key_id: str) -> bytes | None:
    try:
        value = uuid.UUID(key_id)
    except ValueError:
        return None
    return value.bytes if str(value) == key_id else None


def _text(raw: bytes, what: str, most: int) -> str:
    if not 1 <= len(raw) <= most or not all(0x21 <= byte <= 0x7E for byte in raw):
        raise BadPacket(f"{what} is not 1 to {most} bytes of printable ASCII")
    return raw.decode("ascii")


def _key(reader: _Reader) -> KeyName:
    label = _text(reader.take(reader.byte()), "label", MAX_LABEL)
    kind = reader.byte()
    if kind == _UUID_KIND:
        key_id = str(uuid.UUID(bytes=reader.take(16)))
    elif kind == _TEXT_KIND:
        key_id = _text(reader.take(reader.byte()), "key_ID", MAX_KEY_ID)
        if _uuid_bytes(key_id) is not None:
            raise BadPacket("UUID sent as text")
    else:
        raise BadPacket(f"key_ID of kind {kind}")
    origin, hops = reader.byte(), reader.byte()
    try:
        return KeyName(label, key_id, WireOrigin(origin), hops)
    except ValueError:
        raise BadPacket(f"origin {origin}") from None


def encode_p3(body: P3) -> bytes:
    return (
        encode_policy(body.policy)
        + bytes([body.attempt, len(body.keys)])
        + b"".join(map(encode_key, body.keys))
        + encode_tlvs(body.tlvs)
    )


def decode_p3_untrusted(suite: Suite, data: bytes) -> Signed[P3]:
    """P3 or P3R and the signatures behind it, which must fill the rest exactly."""
    reader = _Reader(data)
    policy, attempt, count = _policy(reader), reader.byte(), reader.byte()
    if count > 1:
        raise BadPacket(f"{count} keys in M3; version 1 has at most one")
    keys = tuple(_key(reader) for _ in range(count))
    return _signed(suite, reader, data, P3(policy, attempt, keys, _tlvs(reader)))


def _signed(suite: Suite, reader: _Reader, data: bytes, body: Body) -> Signed[Body]:
    if len(data) - reader.position != suite.signature_bytes:
        raise BadPacket("message does not end with its signatures")
    return Signed(body, data[: reader.position], data[reader.position :])


def encode_p4(body: P4) -> bytes:
    return bytes([body.outcome, body.reason]) + body.confirm + body.signatures


def decode_p4_untrusted(suite: Suite, data: bytes) -> P4:
    reader = _Reader(data)
    try:
        outcome, reason = Outcome(reader.byte()), Reason(reader.byte())
    except ValueError:
        raise BadPacket("M4 with an unknown outcome or reason") from None
    confirm = reader.take(CONFIRM_BYTES) if outcome.confirmed else b""
    signatures = reader.take(suite.signature_bytes) if outcome.degraded else b""
    if reader.position != len(data) or outcome.confirmed != (reason is Reason.NONE):
        raise BadPacket("M4 has the wrong form")
    return P4(outcome, reason, confirm, signatures)
