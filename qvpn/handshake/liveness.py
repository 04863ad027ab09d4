"""Whether the peer is there: EPOCH_OK until it answers, keepalives, and silence that calls for a cold handshake.

Times of PROTOCOL.md chapter 9; the rules are those of "Rekey and healing" in chapter 8.
"""

from __future__ import annotations

from qvpn.handshake import timers
from qvpn.handshake.core import Core, EpochInfo
from qvpn.wire.messages import ControlType


class Liveness:
    """Watches the epoch that this side sends on."""

    def __init__(self, core: Core, now: float) -> None:
        self._core = core
        self._heard = now
        self._said = now
        self._epoch_ok: tuple[int, float, float] | None = None
        """(receive index, when to send EPOCH_OK again, the delay before it)."""

    def heard(self, when: float) -> None:
        """When the newest record of the peer verified, under the epoch that we send on."""
        self._heard = max(self._heard, when)

    def said(self, when: float) -> None:
        """When the newest record to the peer left."""
        self._said = max(self._said, when)

    def accepted(self, info: EpochInfo, now: float) -> None:
        """I has a new epoch: say so until a record under it comes back."""
        self._said = now
        self._core.tell(info, bytes([ControlType.EPOCH_OK]))
        self._epoch_ok = (info.receive_index, now + timers.EPOCH_OK_FIRST, timers.EPOCH_OK_FIRST)

    def confirmed(self, info: EpochInfo, now: float) -> None:
        """The first record under an epoch verified."""
        self._heard = max(self._heard, now)
        if self._epoch_ok is not None and self._epoch_ok[0] == info.receive_index:
            self._epoch_ok = None

    def forget(self) -> None:
        """Every epoch is gone."""
        self._epoch_ok = None

    def next_timers(self) -> list[float]:
        times = [] if self._epoch_ok is None else [self._epoch_ok[1]]
        sending = self._core.sending
        if sending is not None:
            times += [self._said + self._core.parameters.keepalive_after, self._dead_at(sending)]
            if not sending.confirmed:
                times.append(self._lost_at(sending))
        return times

    def due(self, now: float) -> bool:
        """Send what is due; True where the peer must be met outside the epoch."""
        cold = self._into_nothing(now) or self._dead(now)
        self._repeat_epoch_ok(now)
        self._keep_alive(now)
        return cold

    def _lost_at(self, sending: EpochInfo) -> float:
        return sending.installed + timers.no_reply(self._core.parameters.rekey)

    def _into_nothing(self, now: float) -> bool:
        """An epoch that we accepted and that carries nothing back: send on the one before while that lives."""
        sending = self._core.sending
        if sending is None or sending.confirmed or now < self._lost_at(sending):
            return False
        self._core.hold(sending)
        return True

    def _dead_at(self, sending: EpochInfo) -> float:
        return max(self._heard, sending.installed) + timers.dead_peer(self._core.parameters.rekey)

    def _dead(self, now: float) -> bool:
        """Nothing under the epoch that we send on: a cold handshake beside it heals whatever it is."""
        sending = self._core.sending
        if sending is None or now < self._dead_at(sending):
            return False
        self._heard = now
        return True

    def _repeat_epoch_ok(self, now: float) -> None:
        if self._epoch_ok is None or now < self._epoch_ok[1]:
            return
        index, _, delay = self._epoch_ok
        info = self._core.epochs.get(index)
        if info is None or now >= info.installed + timers.ANSWER_LIFE:
            self._epoch_ok = None
            return
        delay = min(2 * delay, timers.EPOCH_OK_CAP)
        self._epoch_ok = (index, now + delay, delay)
        self._core.tell(info, bytes([ControlType.EPOCH_OK]))

    def _keep_alive(self, now: float) -> None:
        sending = self._core.sending
        if sending is not None and now >= self._said + self._core.parameters.keepalive_after:
            self._said = now
            self._core.tell(sending, bytes([ControlType.KEEPALIVE]))
