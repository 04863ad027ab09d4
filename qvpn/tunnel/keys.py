"""What the handshake hands to the packet path: one epoch's keys."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field


class EpochState(enum.StrEnum):
    """What an epoch rests on, in the words of policy, status, log and metrics."""

    QKD = "qkd"  # a fresh key of the key source is mixed in
    CHAINED = "chained"  # none, but the unbroken chain holds one younger than max_qkd_age
    PQC = "pqc"  # X25519, ML-KEM, PSK and chain only
    BLOCKED = "blocked"  # no acceptable epoch: nothing passes


class Cipher(enum.StrEnum):
    AES_256_GCM = "aes-256-gcm"
    CHACHA20_POLY1305 = "chacha20-poly1305"


@dataclass(frozen=True, slots=True)
class EpochKeys:
    """Keys and names of one epoch, as one side sees it.

    ``send_key(lane)`` and ``receive_key(lane)`` derive the 32-byte record key of a lane (PROTOCOL.md, "Key
    schedule"); lane 0 always exists.  ``hard_end`` is in seconds of the daemon's clock (CLOCK_BOOTTIME): at and
    after it not one record is sealed or opened.
    """

    number: int
    receive_index: int
    """Index that the peer puts in records to us; its low 4 bits are 0 and are replaced by the lane."""
    send_index: int
    """Index that we put in records to the peer; likewise."""
    cipher: Cipher
    state: EpochState
    hard_end: float
    initiator: bool
    """True where this side was the initiator: it sends on the epoch at once, the responder after the first record."""
    send_key: Callable[[int], bytes] = field(repr=False)
    receive_key: Callable[[int], bytes] = field(repr=False)
    lanes: int = 1
    """How many lanes both sides have: 0 to ``lanes - 1``."""
