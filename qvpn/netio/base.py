"""The two edges of the packet path: :class:`Tun` (inner packets) and :class:`Bind` (outer datagrams).

Both are batch interfaces, both have a twin in ``netio.memory``.  Neither blocks; readiness comes from the event
loop through :meth:`fileno`, or in the memory twins through the callback given to ``on_readable``.

An *address* is opaque to everything but the bind that made it: hashable, comparable, with a text form for status.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

VNET_HEADER = 10
"""Bytes of ``struct virtio_net_hdr`` that precede each packet to and from a :class:`Tun` (virtio 1.2, 5.1.6)."""

MAX_READ = 65_600
"""Room one read of a :class:`Tun` needs: a superpacket and its header; a smaller buffer truncates silently."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer's datagrams come from.  ``ip`` is without a v4-mapped prefix; ``scope`` for link-local IPv6."""

    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    scope: int = 0

    @property
    def carrier(self) -> str:
        """Name of the transport that datagrams to this address go by (entry points ``qvpn.transports``)."""
        return "udp"

    @property
    def overhead(self) -> int:
        """Bytes that the transport adds to each datagram inside its UDP payload."""
        return 0

    @property
    def cuts(self) -> bool:
        """Whether a datagram that is too long for the path still arrives, if sent with ``send_fragmentable``."""
        return self.ip.version == 4

    def __str__(self) -> str:
        if self.ip.version == 4:
            return f"{self.ip}:{self.port}"
        zone = f"%{self.scope}" if self.scope else ""
        return f"[{self.ip}{zone}]:{self.port}"


@dataclass(slots=True)
class Received:
    """One receive: ``length`` bytes at ``buffer[offset:]``, equal segments of ``segment`` bytes but the last."""

    buffer: memoryview
    length: int
    segment: int
    address: Address
    ecn: int = 0
    """ECN bits of the outer headers: the kernel joins only datagrams whose bits are equal."""
    waited: float = 0.0
    """Seconds that its first datagram waited in the socket; 0 where nobody asks (:meth:`Bind.watch_waits`)."""
    joined: int = 0
    """Datagrams of the first of two receives that were put behind one another; 0: it is only one."""


class Tun(Protocol):
    """An inner network device that carries ``virtio-net header + IP packet``, possibly a superpacket."""

    @property
    def name(self) -> str:
        """Of the interface."""

    @property
    def mtu(self) -> int:
        """Bytes of the longest IP packet."""

    @property
    def merges_udp(self) -> bool:
        """Whether it takes superpackets of UDP, and so equal UDP packets as one; Linux before 6.2 refuses them."""

    def read_batch(self, arena: memoryview, limit: int) -> list[tuple[int, int]]:
        """Read up to ``limit`` packets back to back into ``arena``; returns (offset, length) of each.

        Stops when nothing is queued, when a superpacket (``gso_type`` != 0) was read, or when fewer than
        :data:`MAX_READ` bytes of the arena are left.  An empty list: nothing to read.
        """

    def write_batch(self, packets: Sequence[memoryview]) -> int:
        """Write each ``virtio header + IP packet``; returns how many the kernel took."""

    def fileno(self) -> int:
        """Descriptor for the event loop, or -1 for a twin without one."""

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        """Only for twins without a descriptor: called when packets wait."""

    def close(self) -> None:
        """May be called twice."""


class Bind(Protocol):
    """Where outer datagrams go and come from.

    Datagrams may be lost, doubled and reordered, never altered in length or joined: what was given to one send comes
    out of one :class:`Received` as segments of the same bytes.  :mod:`qvpn.transports.conformance` checks an
    implementation; ``qvpn/transports/README.md`` says how to write one.
    """

    def receive_batch(self, limit: int, descriptor: int = -1) -> list[Received]:
        """What has arrived, in at most ``limit`` receives, and one found behind the last; fewer: nothing more waits.

        ``descriptor`` is the only one of :meth:`filenos` to ask, because it is known to be readable; -1: all.
        Buffers are valid until the next call.
        """

    def watch_waits(self, descriptor: int, on: bool) -> None:
        """From now on say how long what this descriptor receives has waited, or do not; it costs a little."""

    def send_batch(self, datagrams: Sequence[memoryview], address: Address) -> int:
        """Send datagrams to one address in order; returns how many were taken.

        Never raises for what a network does: ECONNREFUSED, ENETUNREACH, EMSGSIZE and ENOBUFS are counted in
        :attr:`errors` by name.
        """

    def send_fragmentable(self, datagrams: Sequence[memoryview], address: Address) -> int:
        """As :meth:`send_batch`, but over IPv4 the network may cut a datagram on the way and joins it at its end.

        For the few datagrams that must arrive whatever the path carries; all others carry "don't fragment".
        """

    def send_segments(self, buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        """Send ``buffer`` as datagrams of ``segment`` bytes (the last perhaps shorter); returns how many were taken.

        ``ecn``: bits for the outer headers.  The first so many were taken, the others were not.  Raises as little as
        :meth:`send_batch`.
        """

    def waiting(self, address: Address) -> tuple[int, int]:
        """(datagrams, bytes) that :meth:`send_segments` took for this address and that still wait here."""

    def unsent(self) -> list[tuple[Address, int, int]]:
        """(address, datagrams, bytes) of what :meth:`send_segments` took and then dropped, since the last call.

        Why is counted in :attr:`errors`.  A bind that keeps nothing has nothing to tell.
        """

    def max_payload(self, address: Address) -> int:
        """Bytes one datagram to this address can have on its first link; no outsider's word counts in it."""

    def connect(self, address: Address) -> None:
        """Hint that much will go to this address (a connected socket is cheaper).  May do nothing."""

    def disconnect(self, address: Address) -> None:
        """Undo :meth:`connect`."""

    def filenos(self) -> list[int]:
        """Descriptors for the event loop; none for a twin."""

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        """Called when datagrams wait although no descriptor is readable: twins, and what a layer has kept."""

    def on_filenos(self, callback: Callable[[], None] | None) -> None:
        """Called after the set of :meth:`filenos` changed, and before a descriptor that left it is closed."""

    @property
    def errors(self) -> dict[str, int]:
        """Errno names of failed sends, counted."""

    @property
    def local(self) -> Address:
        """The address listened on, with the real port."""

    def close(self) -> None:
        """May be called twice."""
