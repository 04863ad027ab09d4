"""The answers that one peer has under way with us: who gets a place, which one a message belongs to, who lets go."""

from __future__ import annotations

from collections.abc import Iterator

from qvpn.errors import BadPacket
from qvpn.handshake.carrier import Carrier, Cold, Inner
from qvpn.handshake.core import Core, EpochInfo
from qvpn.handshake.parameters import KeyFault, KeyMaterial
from qvpn.handshake.port import source_prefix
from qvpn.handshake.responder import Entry
from qvpn.handshake.state import ResponderState
from qvpn.tunnel.drops import DropReason

MAX_INNER_ENTRIES = 4
_ENDING = (ResponderState.FETCH, ResponderState.CONFIRM, ResponderState.CONFIRM_NONE)
_REPLACEABLE = (ResponderState.HALF_OPEN, ResponderState.RETRY, ResponderState.REFUSED)


class Answers:
    """The entries of one peer, oldest first."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._entries: list[Entry] = []

    def __iter__(self) -> Iterator[Entry]:
        """Over a copy: whoever goes through them may let some go."""
        return iter(tuple(self._entries))

    def on_m1(self, message: bytes, carrier: Carrier, now: float) -> DropReason | None:
        """The same M1 gets the same M2; a new one a place, if there is one."""
        for entry in self._entries:
            if entry.m1 == message:
                entry.again(carrier, now)
                return None
        if not self._admit(carrier, now):
            return DropReason.HANDSHAKE_BUDGET
        try:
            self._entries.append(Entry(self._core, message, carrier, now))
        except BadPacket:
            if isinstance(carrier, Cold):
                self._core.port.leave(source_prefix(carrier.address.ip))
            return DropReason.HANDSHAKE_MALFORMED
        return None

    def _admit(self, carrier: Carrier, now: float) -> bool:
        if isinstance(carrier, Inner):
            return sum(isinstance(entry.carrier, Inner) for entry in self._entries) < MAX_INNER_ENTRIES
        source, admit = source_prefix(carrier.address.ip), self._core.port.admit
        return admit(source, carrier.configured, now) or (
            self._replace_stale(carrier) and admit(source, carrier.configured, now)
        )

    def _replace_stale(self, carrier: Cold) -> bool:
        """Let the oldest answer that waits for M3 from this very address go: its peer has begun anew since."""
        for entry in self._entries:
            same = isinstance(entry.carrier, Cold) and entry.carrier.address == carrier.address
            if same and entry.source is not None and entry.state in _REPLACEABLE:
                entry.discard()
                self._entries.remove(entry)
                return True
        return False

    def find(self, index: bytes, carrier: Carrier) -> Entry | None:
        """The one with this index, if the message came the way that its M1 came."""
        for entry in self._entries:
            if entry.index == index and _same_way(entry, carrier):
                return entry
        return None

    def key(self, request: int, answer: KeyMaterial | KeyFault, now: float) -> bool:
        """The answer to NeedKey; False if none of them asked."""
        for entry in self._entries:
            if entry.request == request:
                entry.on_key(request, answer, now)
                return True
        return False

    def confirmed(self, info: EpochInfo, now: float) -> None:
        """The first record of this epoch came: its answer has done its work."""
        for entry in self:
            if entry.epoch is info:
                entry.confirmed(now)
                self._entries.remove(entry)

    def hard_end(self, info: EpochInfo, now: float) -> bool:
        """An answer that still waits for the first record ends with its epoch; False if there is none."""
        for entry in self._entries:
            if entry.epoch is info:
                entry.expire(now)
                self._entries.remove(entry)  # over: its own time limit must not end it again
                return True
        return False

    def handle_timer(self, now: float) -> None:
        for entry in self:
            entry.handle_timer(now)
        self.sweep()

    def sweep(self) -> None:
        """Let those go that are over."""
        self._entries = [entry for entry in self._entries if not entry.over]

    def next_timers(self) -> list[float]:
        return [entry.next_timer() for entry in self._entries]

    def ending(self) -> bool:
        """The peer has proved itself in one of them, and an epoch is about to come."""
        return any(entry.state in _ENDING for entry in self._entries)

    def lose(self) -> None:
        """Our own handshake was first: none of these is ever sent on."""
        for entry in self._entries:
            entry.lose()

    def give_way(self, key_id: str, entry: object, now: float) -> None:
        """This one offers the key again that another one holds: the other goes, with its unconfirmed epoch."""
        for other in self:
            if other is not entry and other.drop_key(key_id, now):
                self._entries.remove(other)

    def discard(self) -> None:
        for entry in self._entries:
            entry.discard()
        self._entries.clear()


def _same_way(entry: Entry, carrier: Carrier) -> bool:
    """A handshake stays in the carrier, suite and identity in which its M1 came, and inside the same epoch."""
    began = entry.carrier
    if isinstance(began, Cold) and isinstance(carrier, Cold):
        return (began.suite, entry.identity) == (carrier.suite, carrier.identity)
    if isinstance(began, Inner) and isinstance(carrier, Inner):
        return (began.suite, began.receive_index) == (carrier.suite, carrier.receive_index)
    return False
