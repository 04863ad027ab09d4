"""What one peer's handshake machine tells its driver.

The machine does no I/O.  The driver feeds it (:class:`~qvpn.handshake.machine.PeerHandshake`), then takes every event
from ``next_event()`` and carries it out in order, then arms one timer for ``next_timer()``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import EpochKeys, EpochState
from qvpn.wire.messages import KeyName


class Role(enum.StrEnum):
    INITIATOR = "initiator"
    RESPONDER = "responder"


class Failure(enum.StrEnum):
    """Why an attempt of ours, or an answer of ours, came to nothing."""

    DEADLINE = "deadline"  # 30 s without an end
    NOT_READY = "peer_not_ready"  # require-qkd, and the peer's source is not ready
    NO_KEY = "no_key"  # require-qkd, and our source gave none
    REFUSED = "refused"  # the peer's policy
    POLICY = "policy"  # our policy refuses the outcome
    KEY_MISMATCH = "key_mismatch"  # two sources gave different bytes under one key_ID, twice
    YIELDED = "yielded"  # the preferred peer's handshake was authenticated first
    NO_REPLY = "no_reply"  # an inner attempt met silence; the cold one goes on
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class SendCold:
    """Send these datagrams to the peer's endpoint, or to ``address`` where it is set (an answer to a stranger)."""

    datagrams: tuple[bytes, ...] = field(repr=False)
    address: object | None = None


@dataclass(frozen=True, slots=True)
class SendInner:
    """Send these control payloads inside the epoch with this receive index (ours)."""

    receive_index: int
    payloads: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class NeedKey:
    """Ask the key source; answer with ``machine.key(request, key_or_error, now)``, at most 2 s later.

    ``key`` is None for a fresh draw (we are master SAE) and the name from M3 for a fetch (we are slave SAE).
    For a draw the answer names the key itself.
    ``claim`` is the peer's claim that came with it, to be checked before the source is asked.
    """

    request: int
    role: Role
    key: KeyName | None
    claim: bytes | None = None


@dataclass(frozen=True, slots=True)
class Install:
    """Install this epoch in the packet path *before* carrying out the next event."""

    keys: EpochKeys


@dataclass(frozen=True, slots=True)
class Hold:
    """Receive on this epoch, never send on it: the preferred peer's handshake won."""

    receive_index: int


@dataclass(frozen=True, slots=True)
class Erase:
    """Erase the keys of this epoch now."""

    receive_index: int


@dataclass(frozen=True, slots=True)
class Confirmed:
    """Both sides have the epoch: the peer's first record under it verified."""

    receive_index: int
    number: int
    state: EpochState
    role: Role
    key: KeyName | None
    started: float
    """When the attempt or the answer began, for the duration."""
    simulated: bool = False
    """The epoch rests on a simulated key, its own or its chain's."""


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An own attempt ended without an epoch; the machine backs off by itself."""

    failure: Failure
    detail: str
    role: Role = Role.INITIATOR


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something an operator must see: key mismatch, key_ID used twice, state rolled back, origin differs."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class ChainBroken:
    """No common chain where one was expected; the epoch rests on fresh secrets alone."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A message was dropped; count it."""

    reason: DropReason
    detail: str = ""


Event = (
    Dropped
    | SendCold
    | SendInner
    | NeedKey
    | Install
    | Hold
    | Erase
    | Confirmed
    | AttemptFailed
    | Alarm
    | ChainBroken
)
