"""What one peer's handshakes came to, kept for status and log."""

from __future__ import annotations

from qvpn.handshake.events import AttemptFailed, Confirmed
from qvpn.status import SIMULATED, key_id_hash
from qvpn.tunnel.drops import Drops
from qvpn.tunnel.keys import EpochState
from qvpn.wire.messages import KeyName, WireOrigin

_EPOCHS_REMEMBERED = 16


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
        self._keys: dict[int, KeyName] = {}
        self._simulated: dict[int, bool] = {}
        self._last_origin: WireOrigin | None = None
        self.drops = Drops()
        """Handshake messages and control records that were dropped."""

    def confirmed(self, event: Confirmed, now: float) -> None:
        self.epochs += 1
        self.keys_used += event.key is not None
        self.confirmed_at = now
        self.handshake_seconds = max(0.0, now - event.started)
        for old in list(self._simulated)[:-_EPOCHS_REMEMBERED]:
            del self._simulated[old]
            self._keys.pop(old, None)
        if event.key is not None:
            self._keys[event.receive_index] = event.key
            self._last_origin = event.key.origin
        # A chained epoch rests on the key that last entered the chain.
        rests = event.state in (EpochState.QKD, EpochState.CHAINED)
        self._simulated[event.receive_index] = rests and self._last_origin is WireOrigin.SIMULATED

    def key_of(self, receive_index: int) -> KeyName | None:
        """The key of a source in this epoch."""
        return self._keys.get(receive_index)

    def rests_on_simulated(self, receive_index: int) -> bool:
        """Whether what this epoch has of a key source is simulated."""
        return self._simulated.get(receive_index, False)

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
        if self.rests_on_simulated(event.receive_index):
            fields["warning"] = SIMULATED
        return fields
