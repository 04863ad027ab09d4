"""Epochs of one peer: which keys may open a record, and which one seals.

An epoch is born by :meth:`PeerEpochs.install`, and dies at its hard end, at the end of its overlap, or by
:meth:`PeerEpochs.erase`.  In between, so that no packet is lost while both ends change over (make before break):

- the *initiator* seals under a new epoch from the moment it is installed, for the peer could not have completed the
  handshake without having the keys;
- the *responder* seals under it after the first record that verified under it;
- either side opens records of older epochs until the *overlap* is over, which starts when this side first *receives*
  on the new one.  Until then the old epoch lives on, to its own hard end.

Times are seconds of the daemon's clock.  At and after ``ends`` an epoch neither seals nor opens.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from qvpn.tunnel.keys import EpochKeys, EpochState
from qvpn.tunnel.records import LIMITS, Limits, Opener, Sealer, index_bytes

MAX_EPOCHS = 8
"""Epochs of one peer at a time.  Two or three is usual; more only while handshakes fail halfway again and again."""

_OVER = float("-inf")


class EpochRole(enum.StrEnum):
    """Where an epoch stands in the change-over."""

    NEXT = "next"  # installed, no record verified under it yet
    CURRENT = "current"  # the one that seals
    PREVIOUS = "previous"  # only opens, until its overlap or hard end


class Epoch:
    """Keys of one epoch in use.  Holds the two AEAD objects; ``erase`` lets go of them."""

    __slots__ = (
        "_limits",
        "confirmed",
        "ends",
        "hard_end",
        "held",
        "initiator",
        "installed",
        "last_received",
        "limit_reported",
        "name",
        "number",
        "opener",
        "order",
        "receive_index",
        "sealer",
        "send_index",
        "state",
    )

    def __init__(self, keys: EpochKeys, now: float, order: int, limits: Limits) -> None:
        self.number = keys.number
        self.state: EpochState = keys.state
        self.initiator = keys.initiator
        self.receive_index = keys.receive_index
        self.send_index = keys.send_index
        self.name = index_bytes(keys.receive_index)
        """The receive index as it stands in a record."""
        self.hard_end = keys.hard_end
        self.ends = keys.hard_end
        """The hard end, or the end of the overlap where that is earlier."""
        self.installed = now
        self.order = order
        self.confirmed = False
        """A record has verified under it: the peer has these keys."""
        self.held = False
        """Receive only, for good: of two handshakes at once, the other one won."""
        self.limit_reported = False
        self.last_received: float | None = None
        self._limits = limits
        self.sealer = Sealer(keys.cipher, keys.send_key(0), keys.send_index, limits)
        self.opener = Opener(keys.cipher, keys.receive_key(0), limits)

    def may_seal(self) -> bool:
        """The initiator may at once; the responder once the peer has shown that it has the keys."""
        return (self.initiator or self.confirmed) and not self.held

    def wants_rekey(self) -> bool:
        if self.ends == _OVER:
            return False
        limits, opener = self._limits, self.opener
        wanted = limits.rekey
        return self.sealer.calls >= wanted or opener.calls >= wanted or opener.failed >= limits.failed_rekey

    def erase(self) -> None:
        """Let go of the keys: any use from here on is an error of this program, not a record."""
        del self.sealer, self.opener
        self.ends = _OVER

    @property
    def erased(self) -> bool:
        return self.ends == _OVER


class PeerEpochs:
    """All live epochs of one peer, in order of installation."""

    def __init__(self, overlap: float, limits: Limits = LIMITS) -> None:
        self._overlap = overlap
        self._limits = limits
        self._epochs: dict[int, Epoch] = {}
        self._sending: Epoch | None = None
        self._order = 0
        self._opened = self._marked = 0
        """Of the epochs that are gone."""

    def __iter__(self) -> Iterator[Epoch]:
        return iter(self._epochs.values())

    def __len__(self) -> int:
        return len(self._epochs)

    @property
    def opened(self) -> int:
        """Records opened under all epochs, those that are gone too."""
        return self._opened + sum(epoch.opener.calls for epoch in self)

    @property
    def marked(self) -> int:
        """Counters marked in the replay windows of all epochs, those that are gone too: equals :attr:`opened`."""
        return self._marked + sum(epoch.opener.marked for epoch in self)

    def get(self, receive_index: int) -> Epoch | None:
        return self._epochs.get(receive_index)

    def install(self, keys: EpochKeys, now: float) -> tuple[Epoch, list[Epoch]]:
        """Make a new epoch; returns it and those that had to go because there were too many.

        Raises ValueError if a live epoch has this receive index.
        """
        if keys.receive_index in self._epochs:
            raise ValueError(f"receive index {keys.receive_index:#010x} is in use by a live epoch")
        evicted = self._make_room()
        self._order += 1
        epoch = Epoch(keys, now, self._order, self._limits)
        self._epochs[epoch.receive_index] = epoch
        if epoch.initiator:
            self._sending = epoch
        return epoch, evicted

    def sending(self, now: float) -> Epoch | None:
        """The epoch to seal under, or None: then nothing may leave."""
        epoch = self._sending
        if epoch is None or now >= epoch.ends:
            return None
        return epoch

    def received(self, epoch: Epoch, now: float) -> bool:
        """A record verified under this epoch.  True if it was the first: the change-over happens here."""
        if epoch.confirmed:
            return False
        epoch.confirmed = True
        if epoch.held:
            return True
        if self._sending is None or self._sending.order < epoch.order:
            self._sending = epoch
        for older in self._epochs.values():
            if older.order < epoch.order:
                older.ends = min(older.ends, now + self._overlap)
        return True

    def hold(self, receive_index: int, now: float) -> Epoch | None:
        """Never seal under this epoch again; open under it for one more overlap.  None if it is not alive."""
        epoch = self._epochs.get(receive_index)
        if epoch is None:
            return None
        epoch.held = True
        epoch.ends = min(epoch.ends, now + self._overlap)
        if epoch is self._sending:
            self._sending = self._newest_able()
        return epoch

    def role(self, epoch: Epoch) -> EpochRole:
        if epoch is self._sending:
            return EpochRole.CURRENT
        newer = self._sending is None or epoch.order > self._sending.order
        waiting = newer and not epoch.confirmed and not epoch.held
        return EpochRole.NEXT if waiting else EpochRole.PREVIOUS

    def erase(self, receive_index: int) -> Epoch | None:
        """Erase one epoch; if it was the one that seals, the newest of the rest that may seal takes over."""
        epoch = self._epochs.pop(receive_index, None)
        if epoch is None:
            return None
        self._end(epoch)
        if epoch is self._sending:
            self._sending = self._newest_able()
        return epoch

    def erase_all(self) -> list[Epoch]:
        erased = list(self._epochs.values())
        self._epochs.clear()
        self._sending = None
        for epoch in erased:
            self._end(epoch)
        return erased

    def expire(self, now: float) -> list[Epoch]:
        """Erase every epoch whose time is over; returns them."""
        over = [epoch.receive_index for epoch in self._epochs.values() if now >= epoch.ends]
        return [epoch for index in over if (epoch := self.erase(index)) is not None]

    def _end(self, epoch: Epoch) -> None:
        self._opened += epoch.opener.calls
        self._marked += epoch.opener.marked
        epoch.erase()

    def _newest_able(self) -> Epoch | None:
        able = [epoch for epoch in self._epochs.values() if epoch.may_seal()]
        return max(able, key=lambda epoch: epoch.order, default=None)

    def _make_room(self) -> list[Epoch]:
        if len(self._epochs) < MAX_EPOCHS:
            return []
        oldest = min((e for e in self._epochs.values() if e is not self._sending), key=lambda e: e.order)
        erased = self.erase(oldest.receive_index)
        return [erased] if erased is not None else []
