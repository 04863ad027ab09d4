"""Addresses that are reached over QUIC."""

from __future__ import annotations

from dataclasses import dataclass, field

from qvpn.netio.base import Address

OVERHEAD = 30
"""Of a UDP datagram with one DATAGRAM frame: header 1 + 8 + 2, tag 16, frame 3 (RFC 9000 17.3, RFC 9221 4)."""


@dataclass(frozen=True, slots=True)
class QuicAddress(Address):
    """A UDP address whose datagrams travel in a QUIC connection.  Never equal to the plain address."""

    dial: bool = field(default=False, compare=False)
    """It stands in the configuration, so a connection to it may be opened; others are answered only."""
    server_name: str | None = field(default=None, compare=False)
    """What the TLS client asks for (SNI)."""
    pin: bytes | None = field(default=None, compare=False)
    """SHA-256 of the only certificate that the other end may show."""
    via: int = field(default=0, compare=False)
    """Number of the connection that something came by from there; 0: none in particular."""

    @property
    def carrier(self) -> str:
        return "quic"

    @property
    def overhead(self) -> int:
        return OVERHEAD

    @property
    def cuts(self) -> bool:
        """A record that is too long is split over two DATAGRAM frames, on IPv6 as on IPv4."""
        return True

    @property
    def place(self) -> Address:
        """Where its UDP datagrams go."""
        return Address(self.ip, self.port, self.scope)


def over_quic(place: Address, via: int = 0) -> QuicAddress:
    """The address of whoever speaks QUIC to us from there, by connection number ``via``."""
    return QuicAddress(place.ip, place.port, place.scope, via=via)
