"""Where one peer's end of one lane is, and whether what is sent there arrives (PROTOCOL.md, "Lanes"); sans-IO.

A lane is proved before it carries a packet: each epoch by a record of the peer under this lane's key, each address
by the answer to a PROBE sent there.  Until then, and again when nothing comes back, packets go by lane 0.

Times are seconds of the daemon's clock.  :meth:`LanePath.take` gives the probes to be sent.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field

from qvpn.netio.base import Address
from qvpn.wire.messages import ControlType

PROBE_BYTES = 8
PROBE_LIFE = 3.0
"""Seconds in which a probe must be answered."""
FIRST_AGAIN, LAST_AGAIN = 0.2, 2.0
"""Seconds after which an epoch or an address that is not proved yet is probed again, doubled up to the second."""
DOUBT = 1.0
"""Seconds without a record while records leave, after which the path is asked; and between two such questions."""
LOST = 3.0
"""Seconds without an answer after which nothing is sent on the lane any more."""


@dataclass(frozen=True, slots=True)
class Send:
    """A control record to be sent under the epoch with this (our) receive index."""

    receive_index: int
    payload: bytes = field(repr=False)
    address: Address


@dataclass(slots=True)
class _Epoch:
    usable: bool = False
    """We may send on it."""
    proved: bool = False
    """The peer has sent on it."""
    next_probe: float = 0.0
    delay: float = FIRST_AGAIN


class LanePath:
    """One peer's path on one lane."""

    def __init__(self, keepalive: float, random: Callable[[int], bytes]) -> None:
        self._keepalive = keepalive
        self._random = random
        self.endpoint: Address | None = None
        """Proved: packets may go there."""
        self._guess: Address | None = None
        self._seen: Address | None = None
        """Where the newest record came from, as long as that is not proved."""
        self._epochs: dict[int, _Epoch] = {}
        self._open: dict[Address, tuple[bytes, int, float]] = {}
        self._sends: list[Send] = []
        self._asked_since: float | None = None
        """When the first of the questions was sent that nothing has come back after."""
        self._asked_at = float("-inf")
        self._sent_before = 0

    def take(self) -> list[Send]:
        """What is to be sent now; once."""
        sends, self._sends = self._sends, []
        return sends

    # what the daemon says

    def guess(self, address: Address | None, now: float) -> None:
        """The peer's lane should be there: it is asked, and what was proved before stays until that answers."""
        self._guess = address
        newest = self._newest()
        if address is not None and address != self.endpoint and newest is not None:
            self._probe(newest, address, now)

    def install(self, receive_index: int) -> None:
        """An epoch is there, for receiving.  What a lane remembers of epochs is in their order."""
        self._epochs[receive_index] = _Epoch()

    def usable(self, receive_index: int, now: float) -> None:
        """We may send on this epoch: say so on this lane."""
        epoch = self._epochs.get(receive_index)
        if epoch is not None and not epoch.usable:
            epoch.usable = True
            epoch.next_probe = now
            self.handle_timer(now)

    def erase(self, receive_index: int | None) -> None:
        """Held or gone: nothing is sent on it any more."""
        if receive_index is None:
            self._epochs.clear()
        else:
            self._epochs.pop(receive_index, None)

    def alive(self, indexes: set[int]) -> None:
        """The epochs that still live."""
        self._epochs = {index: epoch for index, epoch in self._epochs.items() if index in indexes}

    # what arrives

    def first_record(self, receive_index: int, now: float) -> None:
        """The peer has sent on this epoch, which proves that it may be sent on."""
        epoch = self._epochs.get(receive_index)
        if epoch is not None:
            epoch.proved = epoch.usable = True
            if self.endpoint is None:
                epoch.next_probe, epoch.delay = now, FIRST_AGAIN

    def new_address(self, receive_index: int, address: Address, now: float) -> None:
        """The newest record came from an address that is not proved."""
        self._seen = address
        if receive_index in self._epochs:
            self._probe(receive_index, address, now)

    def control(self, receive_index: int, payload: bytes, address: Address, now: float) -> bool:
        """A verified control record of this lane; False if it is none of a lane's."""
        body = payload[1:]
        if len(body) != PROBE_BYTES or payload[0] not in (ControlType.PROBE, ControlType.PROBE_REPLY):
            return False
        if payload[0] == ControlType.PROBE:
            if receive_index in self._epochs:
                self._sends.append(Send(receive_index, bytes([ControlType.PROBE_REPLY]) + body, address))
            return True
        challenge, index, ends = self._open.get(address, (b"", -1, 0.0))
        if index == receive_index and now < ends and hmac.compare_digest(challenge, body):
            del self._open[address]
            self.endpoint, self._seen = address, None
        return True

    # time

    def next_timer(self) -> float | None:
        """When to call :meth:`handle_timer` at the latest; None: never."""
        times = [epoch.next_probe for index, epoch in self._epochs.items() if self._wants_probe(index, epoch)]
        if self._asked_since is not None:
            times.append(self._asked_since + LOST)
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        """Probe what is not proved yet."""
        for index, epoch in self._epochs.items():
            if self._wants_probe(index, epoch) and now >= epoch.next_probe:
                for address in self._targets(epoch):
                    self._probe(index, address, now)
                epoch.next_probe = now + epoch.delay
                epoch.delay = min(2 * epoch.delay, LAST_AGAIN)

    def look(self, now: float, received_at: float | None, sent_records: int) -> None:
        """Once a second: whether the path that is used still carries anything back.

        ``received_at``: when the newest record of the peer verified on this lane.  ``sent_records``: how many of
        ours, data only, have left.
        """
        if self._asked_since is not None and received_at is not None and received_at >= self._asked_since:
            self._asked_since = None
        newest = self._newest(proved=True)
        if self.endpoint is None or newest is None:
            self._asked_since = None
            return
        if self._asked_since is not None and now >= self._asked_since + LOST:
            self._lose(newest, now)
            return
        silence = now - received_at if received_at is not None else float("inf")
        doubtful = sent_records != self._sent_before and silence >= DOUBT
        self._sent_before = sent_records
        if doubtful or self._asked_since is not None:
            due = now - self._asked_at >= DOUBT
        else:
            due = min(silence, now - self._asked_at) >= self._keepalive
        if due:
            self._asked_at = now
            if self._asked_since is None:
                self._asked_since = now
            self._probe(newest, self.endpoint, now)

    def _lose(self, newest: int, now: float) -> None:
        """Nothing comes back: stop sending there, go on asking."""
        self.endpoint, self._seen, self._asked_since = None, self.endpoint, None
        self._epochs[newest].next_probe = now
        self._epochs[newest].delay = FIRST_AGAIN
        self.handle_timer(now)

    def _newest(self, *, proved: bool = False) -> int | None:
        """The newest epoch that we may send on."""
        found = [index for index, epoch in self._epochs.items() if epoch.usable and (epoch.proved or not proved)]
        return found[-1] if found else None

    def _wants_probe(self, index: int, epoch: _Epoch) -> bool:
        if not epoch.usable or not self._targets(epoch):
            return False
        return not epoch.proved or (self.endpoint is None and index == self._newest(proved=True))

    def _targets(self, epoch: _Epoch) -> list[Address]:
        """Where to ask: at the proved address, and everywhere else only if that stays silent."""
        if self.endpoint is not None and epoch.delay < DOUBT:
            return [self.endpoint]
        places = dict.fromkeys((self.endpoint, self._guess, self._seen))
        return [address for address in places if address is not None]

    def _probe(self, index: int, address: Address, now: float) -> None:
        self._open = {place: probe for place, probe in self._open.items() if now < probe[2]}
        challenge, same, _ = self._open.get(address, (b"", -1, 0.0))
        if same != index:  # else the answer to an earlier question counts as well
            challenge = self._random(PROBE_BYTES)
        self._open[address] = (challenge, index, now + PROBE_LIFE)
        self._sends.append(Send(index, bytes([ControlType.PROBE]) + challenge, address))
