"""One peer's handshake, sans-IO: both roles, every timer, chain, keys and epochs' lives.

The driver feeds it, takes every event from :meth:`PeerHandshake.next_event` after each call, carries them out in
order, and then calls :meth:`PeerHandshake.handle_timer` no earlier than :meth:`PeerHandshake.next_timer`.
``now`` is in seconds of CLOCK_BOOTTIME and never falls.
"""

from __future__ import annotations

from collections.abc import Callable

from qvpn.handshake.carrier import Carrier
from qvpn.handshake.events import Event
from qvpn.handshake.parameters import KeyFailure, PeerParameters, Snapshot
from qvpn.tunnel.drops import DropReason
from qvpn.wire.messages import KeyMaterial

Random = Callable[[int], bytes]
"""Like ``os.urandom``."""


class PeerHandshake:
    """All of one peer's handshakes.  Give ``os.urandom`` as ``random``."""

    def __init__(
        self,
        config: PeerParameters,
        random: Random,
        now: float,
        *,
        index_taken: Callable[[int], bool] = lambda index: False,
    ) -> None:
        """``index_taken(receive_index)``: True where any peer has a live epoch of that index.

        Raises ValueError for parameters that cannot work.
        """

    # the driver's orders

    def start(self, now: float) -> None:
        """Begin: with an endpoint, and unless ``initiate`` is ``never``, a cold attempt starts at once."""

    def rekey(self, now: float) -> None:
        """Start an attempt now, inside the newest epoch where there is one; nothing if one is running."""

    def stop(self, now: float) -> None:
        """CLOSE to the peer, Erase for every epoch, every secret wiped.  The machine is dead afterwards."""

    def endpoint_known(self, known: bool, now: float) -> None:
        """Whether the driver has an address to send to.  Without one no cold attempt is started."""

    def source_ready(self, ready: bool, now: float) -> None:
        """What the key source says of itself.

        Call it with *every* status, not only on a change: a failed fetch makes the machine "not ready" by itself,
        and only the next call with True undoes that.
        """

    def claim(self, claim: bytes | None) -> None:
        """The source's claim (at most 64 bytes) for the next message; set it again whenever it changes."""

    # what arrived

    def receive(self, message_type: int, message: bytes, carrier: Carrier, now: float) -> DropReason | None:
        """A complete message or a RETRY, as the gate gave it.  The result says why it was dropped, if it was."""
        raise NotImplementedError

    def control(self, receive_index: int, payload: bytes, now: float) -> DropReason | None:
        """The plaintext of a control record of this epoch: HANDSHAKE, EPOCH_OK, EPOCH_ACK, KEEPALIVE or CLOSE.

        PROBE and PROBE_REPLY are the driver's; here they count as unknown.  Call :meth:`first_record` before.
        """
        raise NotImplementedError

    def key(self, request: int, answer: KeyMaterial | KeyFailure, now: float) -> None:
        """The answer to NeedKey.  May come late or never: a late key is held for the next attempt."""

    def first_record(self, receive_index: int, now: float) -> None:
        """The first record under this epoch verified."""

    def heard(self, now: float) -> None:
        """Any record of the peer verified."""

    def limit(self, receive_index: int) -> None:
        """The epoch has used up its AEAD calls: a rekey is due now."""

    def closed_by_peer(self, now: float, receive_index: int | None = None) -> None:
        """CLOSE verified.  Erases that epoch and older ones; ``control`` does this by itself."""

    # time

    def handle_timer(self, now: float) -> None:
        """Do all that is due."""

    def next_timer(self) -> float | None:
        """When to call :meth:`handle_timer`; None: never."""
        raise NotImplementedError

    # what to do, and how it stands

    def next_event(self) -> Event | None:
        """The next thing for the driver to carry out, in order."""
        raise NotImplementedError

    def snapshot(self, now: float) -> Snapshot:
        """For status and metrics."""
        raise NotImplementedError

    # for the gate

    def awaits(self, index: bytes) -> bool:
        """True if an own attempt, or a handshake being answered, has this index as its own."""
        raise NotImplementedError

    def live(self, now: float) -> bool:
        """True while a confirmed epoch is alive."""
        raise NotImplementedError
