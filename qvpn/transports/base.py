"""What a transport is: a layer over the site's UDP port that carries our datagrams in another form.

A transport is named by an entry point of the group ``qvpn.transports``, a :class:`Factory`.  Its :class:`Transport`
puts a :class:`~qvpn.netio.base.Bind` over another one (:meth:`Transport.over`).  That layer takes from the port what
is its own and hands on all else, so that several transports share one port; it makes addresses of its own
(:meth:`Transport.reach`), which it alone can send to.  No transport is trusted: what it loses, alters, repeats or
tells to others is what a network can do as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qvpn.netio.base import Address, Bind, Received


class BadTransport(ValueError):
    """A transport's settings, or a file they name, cannot be used; one sentence.  ``key``: which setting."""

    def __init__(self, problem: str, key: str = "") -> None:
        super().__init__(problem)
        self.key = key


class Timer(Protocol):
    """A call that waits for its time."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]
"""``call_later(seconds, callback)``, as :meth:`asyncio.loop.call_later`."""


@dataclass(frozen=True)
class TransportContext:
    """What a transport gets from the site."""

    base: Path
    """Folder that relative paths in the settings start from."""
    state: Path
    """Folder for what the transport itself keeps; it may not exist before :meth:`Transport.over`."""
    read_file: Callable[[Path], bytes]
    """For certificates.  Raises ValueError with a sentence."""
    read_secret: Callable[[Path], bytes]
    """For private keys: refuses what others can read.  Raises ValueError with a sentence."""
    write_secret: Callable[[Path, bytes], None]
    """A new file, 0600.  Raises ValueError with a sentence."""
    clock: Callable[[], float]
    """Seconds of the daemon's clock (CLOCK_BOOTTIME)."""
    call_later: CallLater
    log: Any
    """A structlog logger."""


class Transport(Protocol):
    """One transport of one site."""

    def over(self, lower: Bind) -> Bind:
        """The layer over ``lower``.  Called once, before privileges are given up and before any datagram.

        Raises :class:`BadTransport`.
        """

    def reach(self, place: Address, options: Mapping[str, Any]) -> Address:
        """The address under which the layer reaches a peer.  ``options``: of the peer's ``carriers.NAME`` table.

        Raises :class:`BadTransport`.  Nothing is sent yet.
        """

    def counts(self) -> dict[str, int]:
        """What happened, by name, for status."""


class Factory(Protocol):
    """What the entry point names."""

    def __call__(self, settings: Mapping[str, Any], context: TransportContext) -> Transport:
        """``settings``: of the table ``[carrier.NAME]``.  Raises :class:`BadTransport`; opens no socket."""


class Layer:
    """A bind that hands everything on to the one below it; a transport overrides what it does otherwise."""

    def __init__(self, lower: Bind) -> None:
        self.lower = lower

    def receive_batch(self, limit: int, descriptor: int = -1) -> list[Received]:
        return self.lower.receive_batch(limit, descriptor)

    def watch_waits(self, descriptor: int, on: bool) -> None:
        self.lower.watch_waits(descriptor, on)

    def send_batch(self, datagrams: Sequence[memoryview], address: Address) -> int:
        return self.lower.send_batch(datagrams, address)

    def send_fragmentable(self, datagrams: Sequence[memoryview], address: Address) -> int:
        return self.lower.send_fragmentable(datagrams, address)

    def send_segments(self, buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        return self.lower.send_segments(buffer, segment, address, ecn)

    def waiting(self, address: Address) -> tuple[int, int]:
        return self.lower.waiting(address)

    def unsent(self) -> list[tuple[Address, int, int]]:
        return self.lower.unsent()

    def max_payload(self, address: Address) -> int:
        return self.lower.max_payload(address)

    def connect(self, address: Address) -> None:
        self.lower.connect(address)

    def disconnect(self, address: Address) -> None:
        self.lower.disconnect(address)

    def filenos(self) -> list[int]:
        return self.lower.filenos()

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self.lower.on_readable(callback)

    def on_filenos(self, callback: Callable[[], None] | None) -> None:
        self.lower.on_filenos(callback)

    @property
    def errors(self) -> dict[str, int]:
        return self.lower.errors

    @property
    def local(self) -> Address:
        return self.lower.local

    def close(self) -> None:
        self.lower.close()


class Udp:
    """The transport that is none: datagrams as they are."""

    def __init__(self, settings: Mapping[str, Any], context: TransportContext) -> None:
        """Raises :class:`BadTransport`: there is nothing to set."""
        if settings:
            raise BadTransport("this transport has no settings", key=next(iter(settings)))

    def over(self, lower: Bind) -> Bind:
        return lower

    def reach(self, place: Address, options: Mapping[str, Any]) -> Address:
        if options:
            raise BadTransport("this transport has no settings", key=next(iter(options)))
        return place

    def counts(self) -> dict[str, int]:
        return {}
