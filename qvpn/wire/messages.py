"""Messages and their parts as frozen dataclasses; :mod:`qvpn.wire.codec` turns them into bytes and back.

Names and order as in PROTOCOL.md chapters 3, 4 and 11.
"""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass, field

INDEX_BYTES = 4
NO_INDEX = bytes(INDEX_BYTES)
CHAIN_ID_BYTES = 8
NO_CHAIN = bytes(CHAIN_ID_BYTES)
CONFIRM_BYTES = 32
MAX_LABEL = 32
MAX_TEXT_KEY_ID = 64
MAX_CLAIM = 64
MAX_TLV_BYTES = 512
MAX_KEYS = 1
"""Keys in one M3 of version 1."""


class MessageType(enum.IntEnum):
    """First byte of a handshake datagram."""

    M1 = 1
    M2 = 2
    M3 = 3
    M4 = 4
    RETRY = 5
    M3R = 6


class ControlType(enum.IntEnum):
    """First byte of a control record's plaintext."""

    HANDSHAKE = 1
    EPOCH_OK = 2
    EPOCH_ACK = 3
    KEEPALIVE = 4
    PROBE = 5
    PROBE_REPLY = 6
    CLOSE = 7


class Mode(enum.IntEnum):
    """Policy modes, as in the policy block."""

    REQUIRE_QKD = 1
    PREFER_QKD = 2
    PQC_ONLY = 3


class Outcome(enum.IntEnum):
    """First byte of P4."""

    OK = 0
    RETRY_KEY = 1
    CHAINED = 2
    ABSENT = 3
    REFUSED = 4


class Reason(enum.IntEnum):
    """Why an M4 is RETRY-KEY or REFUSED."""

    SOURCE_UNAVAILABLE = 1
    UNKNOWN_KEY_ID = 2
    NOT_AUTHORISED = 3
    KEY_ID_USED = 4
    POLICY = 5
    INTERNAL = 6
    ORIGIN_DIFFERS = 7
    ROLLED_BACK = 8


class KeyOrigin(enum.IntEnum):
    """Where a key was made, as in a key of P3."""

    QKD = 1
    RELAYED = 2
    COURIERED = 3
    EXTERNAL = 4
    SIMULATED = 5


class ChainChoice(enum.IntEnum):
    """``chain_sel`` of M2."""

    NONE = 0
    NEW = 1
    OLD = 2


def is_canonical_uuid(key_id: str) -> bool:
    """True for a UUID in lower case with hyphens: those 36 characters travel as 16 bytes."""
    try:
        return str(uuid.UUID(key_id)) == key_id
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class KeyName:
    """Which key of a source: all that travels of it.  Raises ValueError for what cannot be encoded."""

    label: str
    """The initiator's name for the source, 1-32 printable ASCII characters."""
    key_id: str
    """A UUID in canonical lower case, or 1-64 printable ASCII characters."""
    origin: KeyOrigin
    hops: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.label) <= MAX_LABEL or not _printable(self.label):
            raise ValueError(f"a source label has 1 to {MAX_LABEL} printable ASCII characters")
        if not 1 <= len(self.key_id) <= MAX_TEXT_KEY_ID or not _printable(self.key_id):
            raise ValueError(f"a key_ID has 1 to {MAX_TEXT_KEY_ID} printable ASCII characters")
        if not 0 <= self.hops <= 255:
            raise ValueError("hops is 0 to 255")


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


@dataclass(slots=True)
class KeyMaterial:
    """A key of a source as the handshake takes it.  The machine wipes ``material`` once it is mixed in."""

    name: KeyName
    material: bytearray = field(repr=False)
    """32 bytes."""
    sae_initiator: str
    sae_responder: str

    def wipe(self) -> None:
        self.material[:] = bytes(len(self.material))


@dataclass(frozen=True, slots=True)
class PolicyBlock:
    """What a side tells of its policy.  It informs; it decides nothing at the other end by itself."""

    mode: Mode
    ready: bool
    max_qkd_age: int = 0
    """Seconds; 0: never CHAINED."""
    keys_per_epoch: int = 1


@dataclass(frozen=True, slots=True)
class Tlvs:
    """Extensions of P2 and P3 that this version knows."""

    lanes: int = 1
    claim: bytes | None = None


@dataclass(frozen=True, slots=True)
class M1:
    index: bytes
    ek: bytes
    x25519: bytes
    chain_new: bytes = NO_CHAIN
    chain_old: bytes = NO_CHAIN


@dataclass(frozen=True, slots=True)
class M2Clear:
    """M2c: what M2 shows."""

    index: bytes
    ct: bytes
    x25519: bytes
    chain: ChainChoice


@dataclass(frozen=True, slots=True)
class P2:
    policy: PolicyBlock
    tlvs: Tlvs = Tlvs()


@dataclass(frozen=True, slots=True)
class P3:
    policy: PolicyBlock
    attempt: int
    key: KeyName | None
    """None: n is 0."""
    tlvs: Tlvs = Tlvs()


@dataclass(frozen=True, slots=True)
class P4:
    outcome: Outcome
    reason: int = 0
    confirm: bytes = field(default=b"", repr=False)
    signature: bytes = b""
    """sig_ed ‖ sig_ml of a degraded outcome, else empty."""


@dataclass(frozen=True, slots=True)
class InnerFragment:
    """Body of a HANDSHAKE control record."""

    message_type: MessageType
    suite: int
    number: int
    count: int
    message_id: bytes
    handshake_index: bytes
    fragment: bytes


@dataclass(frozen=True, slots=True)
class ColdFragment:
    """A handshake datagram outside any epoch, without its MACs."""

    message_type: MessageType
    suite: int
    number: int
    count: int
    sender_index: bytes
    receiver_index: bytes
    message_id: bytes
    fragment: bytes
