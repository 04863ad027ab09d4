"""The messages of the handshake as values (PROTOCOL.md, chapter 4); ``wire.codec`` makes bytes of them and back."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Generic, TypeVar

INDEX_BYTES = 4
NO_INDEX = bytes(INDEX_BYTES)
CHAIN_ID_BYTES = 8
NO_CHAIN = bytes(CHAIN_ID_BYTES)
CONFIRM_BYTES = 32
KEY_BYTES = 32
MAX_TLVS = 512

Body = TypeVar("Body")

TLV_LANES = 0x0001
TLV_CLAIM = 0x0002
CRITICAL = 0x8000


class MessageType(enum.IntEnum):
    """Byte 0 of a handshake datagram."""

    M1 = 1
    M2 = 2
    M3 = 3
    M4 = 4
    RETRY = 5
    M3R = 6


class ControlType(enum.IntEnum):
    """First byte of a control record's plaintext (chapter 11)."""

    HANDSHAKE = 0x01
    EPOCH_OK = 0x02
    EPOCH_ACK = 0x03
    KEEPALIVE = 0x04
    PROBE = 0x05
    PROBE_REPLY = 0x06
    CLOSE = 0x07
    PATH_PROBE = 0x08
    PATH_ACK = 0x09


class Mode(enum.IntEnum):
    """Policy modes on the wire."""

    REQUIRE_QKD = 1
    PREFER_QKD = 2
    PQC_ONLY = 3


class Outcome(enum.IntEnum):
    """What R decided about the keys of M3."""

    OK = 0
    RETRY_KEY = 1
    CHAINED = 2
    ABSENT = 3
    REFUSED = 4

    @property
    def degraded(self) -> bool:
        """True for the outcomes that R signs."""
        return self in (Outcome.CHAINED, Outcome.ABSENT)

    @property
    def confirmed(self) -> bool:
        """True for the outcomes that end in an epoch and so carry confirm_R."""
        return self is Outcome.OK or self.degraded


class Reason(enum.IntEnum):
    """Why RETRY-KEY or REFUSED."""

    NONE = 0
    UNAVAILABLE = 1
    UNKNOWN_KEY = 2
    UNAUTHORISED = 3
    REUSED = 4
    POLICY = 5
    INTERNAL = 6
    ORIGIN = 7
    ROLLED_BACK = 8


class WireOrigin(enum.IntEnum):
    """Origins on the wire; the words are those of ``keysource.base.Origin``."""

    QKD = 1
    RELAYED = 2
    COURIERED = 3
    EXTERNAL = 4
    SIMULATED = 5


@dataclass(frozen=True, slots=True)
class KeyName:
    """A key as M3 names it.  ``key_id``: a UUID in canonical lower case, or 1-64 bytes of printable ASCII."""

    label: str
    key_id: str
    origin: WireOrigin
    hops: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """The eight bytes each side signs.  They inform; each side's own configuration decides."""

    mode: Mode
    ready: bool
    max_qkd_age: int = 0
    """Seconds, 0: CHAINED never."""


@dataclass(frozen=True, slots=True)
class M1:
    index: bytes
    ek: bytes = field(repr=False)
    x25519: bytes = field(repr=False)
    chain_new: bytes = NO_CHAIN
    chain_old: bytes = NO_CHAIN


@dataclass(frozen=True, slots=True)
class M2:
    index: bytes
    ciphertext: bytes = field(repr=False)
    x25519: bytes = field(repr=False)
    chain_selected: int
    clear: bytes = field(repr=False)
    """M2c as it was sent: the transcript hashes these bytes."""
    sealed: bytes = field(repr=False)
    """E2."""


@dataclass(frozen=True, slots=True)
class P2:
    policy: Policy
    tlvs: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class P3:
    policy: Policy
    attempt: int
    keys: tuple[KeyName, ...]
    tlvs: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class P4:
    outcome: Outcome
    reason: Reason = Reason.NONE
    confirm: bytes = field(default=b"", repr=False)
    signatures: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Signed(Generic[Body]):
    """What stood in front of the signatures, as value and as the bytes that the transcript hashes."""

    body: Body
    raw: bytes = field(repr=False)
    signatures: bytes = field(repr=False)
