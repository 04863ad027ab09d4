"""How one peer's handshake stands: a frozen picture for status and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from qvpn.handshake.events import Role
from qvpn.tunnel.keys import EpochState
from qvpn.wire.messages import KeyName


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How one peer's handshake stands, for status and metrics.  Times in seconds of the daemon's clock."""

    state: EpochState
    epoch: int | None
    epoch_installed: float | None
    hard_end: float | None
    role: Role | None
    key: KeyName | None
    """The source's key in the epoch that is sent on, if any."""
    simulated: bool
    attempt: str
    """State of our own attempt (IDLE where there is none)."""
    answering: tuple[str, ...]
    """States of the handshakes that we answer."""
    epochs: int
    """Handshakes that ended in a confirmed epoch."""
    failures: int
    last_failure: str
    keys_used: int
    next_rekey: float | None
    preferred: bool
