"""What one peer's handshakes came to, kept for status and log."""

from __future__ import annotations

from qvpn.handshake.events import AttemptFailed, Confirmed
from qvpn.status import SIMULATED, key_id_hash

SIMULATED_ORIGIN = "simulated"


class PeerRecord:
    """Counts and the newest facts of one peer."""

    def __init__(self) -> None:
        self.epochs = 0
        self.keys_used = 0
        self.failures = 0
        self.alarms = 0
        self.last_failure: str | None = None
        self.last_alarm: str | None = None
        self.confirmed_at: float | None = None
        self.handshake_seconds: float | None = None
        self.source_alarm: str | None = None

    def confirmed(self, event: Confirmed, now: float) -> None:
        self.epochs += 1
        self.keys_used += event.key is not None
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
            origin = event.key.origin.name.lower()
            fields |= {"origin": origin, "key_id_hash": key_id_hash(event.key.key_id)}
            if origin == SIMULATED_ORIGIN:
                fields["warning"] = SIMULATED
        return fields
