"""What the packet path tells control.  Everything is called from the event loop, in the middle of a batch.

A hook may call any method of the plane.  It must be quick and must not raise: packets of other peers wait behind it.
"""

from __future__ import annotations

from typing import Protocol

from qvpn.netio.base import Address


class PlaneHooks(Protocol):
    """The receiving end of control."""

    def on_handshake(self, datagram: bytes, address: Address) -> None:
        """A datagram whose first byte is 1 to 6.  Nothing about it is verified."""

    def on_control(self, peer: str, receive_index: int, payload: bytes, address: Address) -> None:
        """The plaintext of a control record that verified under this epoch."""

    def on_first_record(self, peer: str, receive_index: int, address: Address) -> None:
        """The first record, data or control, that verified under this epoch, and where it came from.

        Comes before its ``on_control`` and ``on_new_address``.
        """

    def on_new_address(self, peer: str, receive_index: int, address: Address) -> None:
        """A record that verified and has the highest counter came from an address that is not the endpoint.

        At most once a second for one peer, from however many addresses, as long as the endpoint stays another one.
        """

    def on_limit(self, peer: str, receive_index: int) -> None:
        """This epoch has used so many AEAD calls that a new one is wanted now.  Once per epoch."""

    def on_tun_gone(self) -> None:
        """Somebody deleted the inner device: no packet can pass any more.  Once."""
