"""The gate of the port: which peer sent this handshake datagram, and may it cost us anything?

One :class:`Gate` per daemon.  It knows every peer's gate keys, checks mac1 (budgeted for unknown addresses) and
mac2, answers an M1 without a cookie by RETRY, and puts fragments together.  The driver does what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from qvpn.handshake.carrier import Cold, UdpAddress
from qvpn.handshake.machine import PeerHandshake
from qvpn.handshake.parameters import PeerParameters
from qvpn.tunnel.drops import DropReason


@dataclass(frozen=True, slots=True)
class Complete:
    """Hand it on: ``machines[peer].receive(message_type, message, carrier, now)``."""

    peer: str
    message_type: int
    message: bytes = field(repr=False)
    carrier: Cold


@dataclass(frozen=True, slots=True)
class Reply:
    """Send this RETRY to the address the datagram came from."""

    peer: str
    datagram: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """A fragment; the rest of its message is still to come."""

    peer: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """Count it; ``peer`` is None where no peer's mac1 fits."""

    reason: DropReason
    peer: str | None = None


Verdict = Complete | Reply | Stored | Dropped


class Gate:
    """All peers of one port."""

    def __init__(self, random: Callable[[int], bytes], now: float) -> None:
        """``random`` like ``os.urandom``."""

    def add_peer(self, parameters: PeerParameters, machine: PeerHandshake) -> None:
        """Raises ValueError if the name is taken."""

    def remove_peer(self, name: str) -> None:
        """Raises KeyError if there is none."""

    def set_endpoint(self, name: str, address: UdpAddress | None) -> None:
        """The peer's address, from configuration or roaming; call it whenever it changes."""

    def receive(self, datagram: bytes, address: UdpAddress, now: float) -> Verdict:
        """Judge one datagram whose first byte is 1 to 6."""
        raise NotImplementedError
