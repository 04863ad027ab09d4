"""What a message came by, and so where the answer goes."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Protocol


class UdpAddress(Protocol):
    """What the gate must see of an address; ``qvpn.netio.base.Address`` is one.  Hashable and comparable."""

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address: ...

    @property
    def port(self) -> int: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Cold:
    """A message outside any epoch.  The gate makes these; the driver hands them on unseen."""

    address: UdpAddress
    suite: int
    sender_index: bytes
    receiver_index: bytes
    message_id: bytes
    configured: bool = False
    """It came from the address that we know as the peer's: strangers do not take its places."""
    identity: int = 0
    """Which of the peer's public identities (``PeerParameters.peers``) made the mac1."""


@dataclass(frozen=True, slots=True)
class Inner:
    """A message inside the epoch with this receive index of ours."""

    receive_index: int
    suite: int
    handshake_index: bytes


Carrier = Cold | Inner
