"""What one peer's handshakes came to, as far as the machine's own snapshot does not tell it."""

from __future__ import annotations

from qvpn.handshake.events import AttemptFailed, Confirmed
from qvpn.status import SIMULATED, key_id_hash
from qvpn.tunnel.drops import Drops


class PeerRecord:
    """Failures, alarms and the newest facts of one peer, for status and log."""

    def __init__(self) -> None:
        self.failures = 0
        self.carrier_changes = 0
        self.alarms = 0
        self.last_failure: str | None = None
        self.last_alarm: str | None = None
        self.confirmed_at: float | None = None
        self.handshake_seconds: float | None = None
        self.source_alarm: str | None = None
        self.drops = Drops()
        """Handshake messages and control records that were dropped."""

    def confirmed(self, event: Confirmed, now: float) -> None:
        self.confirmed_at = now
        self.handshake_seconds = max(0.0, now - event.started)

    def failed(self, event: AttemptFailed) -> None:
        self.failures += 1
        self.last_failure = f"{event.failure.value}: {event.detail}" if event.detail else event.failure.value

    def alarm(self, sentence: str) -> None:
        self.alarms += 1
        self.last_alarm = sentence

    def log_fields(self, event: Confirmed) -> dict[str, object]:
        """The facts of a new epoch for the log: hashes of key_IDs only."""
        fields: dict[str, object] = {
            "epoch": event.number,
            "state": event.state.value,
            "role": event.role.value,
            "seconds": round(self.handshake_seconds or 0.0, 3),
        }
        if event.key is not None:
            fields |= {"origin": event.key.origin.name.lower(), "key_id_hash": key_id_hash(event.key.key_id)}
        if event.simulated:
            fields["warning"] = SIMULATED
        return fields
