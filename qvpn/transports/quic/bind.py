"""QUIC over a UDP port that it shares with plain datagrams (RFC 9000, RFC 9221).

A :class:`QuicAddress` is reached through a connection: one that we open, where the address stands in the
configuration, or one that was opened to us from there.  :mod:`~qvpn.transports.quic.links` has the connections,
:mod:`~qvpn.transports.quic.packets` tells QUIC from our own datagrams; here both meet the packet path.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qvpn.netio.base import Address, Bind, Received
from qvpn.transports.base import CallLater, Layer
from qvpn.transports.quic.address import OVERHEAD, QuicAddress
from qvpn.transports.quic.certificate import Certificate
from qvpn.transports.quic.link import Link
from qvpn.transports.quic.links import Links
from qvpn.transports.quic.packets import MOST_DATAGRAMS, Buffers, alone, copied, segment_of, which_are_quic
from qvpn.transports.quic.settings import DEFAULT_SIZE

LOOK = 1.0
"""Seconds for which the first link's MTU is remembered."""

MEASURED = 64
"""Addresses for which it is."""


class QuicBind(Layer):
    """The layer of the transport ``quic``."""

    def __init__(
        self,
        lower: Bind,
        certificate: Certificate | Callable[[], Certificate],
        clock: Callable[[], float],
        call_later: CallLater,
        *,
        alpn: Sequence[str] = ("h3",),
        max_datagram_size: int = DEFAULT_SIZE,
        random: Callable[[int], bytes] = os.urandom,
        log: Any = None,
    ) -> None:
        """``max_datagram_size``: bytes of UDP payload of the longest packet, where the first link carries that.

        ``certificate``: what is shown, or who knows it for each connection that is accepted.
        """
        super().__init__(lower)
        self._clock, self._call_later = clock, call_later
        self._size = max_datagram_size
        self._errors: Counter[str] = Counter()
        self._links = Links(
            lower,
            _always(certificate) if isinstance(certificate, Certificate) else certificate,
            clock,
            call_later,
            alpn=alpn,
            size=max_datagram_size,
            errors=self._errors,
            random=random,
            log=log,
        )
        self._arrived: deque[Received] = deque()
        """What one receive brought beyond its limit."""
        self._buffers = Buffers()
        self._sizes: dict[Address, tuple[float, int]] = {}
        self._measured: tuple[Address | None, float, int] = (None, 0.0, 0)
        """The last of them: most sends go where the one before went."""
        self._on_readable: Callable[[], None] | None = None
        self._closed = False

    # receiving

    def receive_batch(self, limit: int, descriptor: int = -1) -> list[Received]:
        self._buffers.reset()
        batch = [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]
        if len(batch) < limit:
            touched: dict[int, Link] = {}
            now = self._clock()
            for received in self.lower.receive_batch(limit - len(batch), descriptor):
                self._sort(received, batch, touched, now)
            for link in touched.values():
                # What QUIC itself has to say goes with the acknowledgement, which is due within a millisecond.
                flush = not link.up or bool(link.queue) or link.quic.closing
                self._links.after(link, now, flush=flush)
        self._arrived.extend(map(copied, batch[limit:]))
        del batch[limit:]
        if self._arrived:
            self._call_later(0, self._more)
        return batch

    def _more(self) -> None:
        if self._arrived and self._on_readable is not None:
            self._on_readable()

    def _sort(self, received: Received, batch: list[Received], touched: dict[int, Link], now: float) -> None:
        """Datagrams of ours stay as they are; QUIC packets are opened."""
        quic = which_are_quic(received)
        if quic is None:
            batch.append(received)
            return
        for place, is_quic in enumerate(quic):
            if not is_quic:
                batch.append(alone(received, place))
                continue
            link = self._links.receive(bytes(segment_of(received, place)), received.address, now)
            if link is not None:
                touched[id(link)] = link
                if len(link.inbox) >= MOST_DATAGRAMS:
                    self._deliver(link, batch, received.waited)
        for link in touched.values():
            self._deliver(link, batch, received.waited)

    def _deliver(self, link: Link, batch: list[Received], waited: float) -> None:
        """What a connection brought."""
        if link.inbox:
            inbox, link.inbox = link.inbox, []
            batch += self._buffers.join(inbox, link.address, waited)

    # sending

    def send_batch(self, datagrams: Sequence[memoryview], address: Address) -> int:
        if not isinstance(address, QuicAddress):
            return self.lower.send_batch(datagrams, address)
        return self._put((bytes(datagram) for datagram in datagrams), address, urgent=True)

    def send_fragmentable(self, datagrams: Sequence[memoryview], address: Address) -> int:
        if not isinstance(address, QuicAddress):
            return self.lower.send_fragmentable(datagrams, address)
        now = self._clock()
        link = self._links.to(address, now)
        if link is None:
            return 0
        most, sent = self.max_payload(address), 0
        for datagram in datagrams:
            if not link.put_in_parts(bytes(datagram), now, most):
                break
            sent += 1
        self._links.after(link, now)
        return sent

    def send_segments(self, buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        """ECN bits stay inside: QUIC's own congestion control would have to answer for the outer ones."""
        if not isinstance(address, QuicAddress):
            return self.lower.send_segments(buffer, segment, address, ecn)
        data = bytes(buffer)
        return self._put((data[cut : cut + segment] for cut in range(0, len(data), segment)), address, urgent=False)

    def _put(self, datagrams: Iterable[bytes], address: QuicAddress, *, urgent: bool) -> int:
        now = self._clock()
        link = self._links.to(address, now)
        if link is None:
            return 0
        most, sent = self.max_payload(address), 0
        for datagram in datagrams:
            if len(datagram) > most:  # aioquic would wait with it, and with all that follow, for ever
                self._errors["EMSGSIZE"] += 1
                break
            if not link.put(datagram, now, urgent=urgent):
                break
            sent += 1
        self._links.after(link, now)
        return sent

    def unsent(self) -> list[tuple[Address, int, int]]:
        return self.lower.unsent() + self._links.unsent()

    def waiting(self, address: Address) -> tuple[int, int]:
        return self._links.waiting(address) if isinstance(address, QuicAddress) else self.lower.waiting(address)

    # the rest of Bind

    def max_payload(self, address: Address) -> int:
        if not isinstance(address, QuicAddress):
            return self.lower.max_payload(address)
        now = self._clock()
        known, asked, size = self._measured
        if known is address and asked <= now < asked + LOOK:
            return size
        asked, size = self._sizes.get(address, (float("-inf"), 0))
        if not asked <= now < asked + LOOK:
            if len(self._sizes) > MEASURED:
                self._sizes.clear()
            asked, size = now, min(self._size, self.lower.max_payload(address.place)) - OVERHEAD
            self._sizes[address] = (asked, size)
        self._measured = (address, asked, size)
        return size

    def expect(self, place: Address) -> None:
        """A peer may come from this IP address: strangers cannot use up what he needs."""
        self._links.sources.expect(place)

    def connect(self, address: Address) -> None:
        """Somebody proved to be a peer there: the connection stays, and is opened where it is not."""
        if not isinstance(address, QuicAddress):
            self.lower.connect(address)
            return
        self.lower.connect(address.place)
        self._links.proved(address)

    def disconnect(self, address: Address) -> None:
        if not isinstance(address, QuicAddress):
            self.lower.disconnect(address)
            return
        self.lower.disconnect(address.place)
        self._links.unwanted(address)

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self._on_readable = callback
        self.lower.on_readable(callback)

    @property
    def errors(self) -> dict[str, int]:
        return dict(Counter(self.lower.errors) + self._errors)

    @property
    def links(self) -> list[Link]:
        """The connections that there are."""
        return list(self._links.index)

    def counts(self) -> dict[str, int]:
        """For status: connections ``opened`` and ``accepted``, ended because a newer stranger came
        (``strangers_ended``), or replaced (``lost``); packets of no connection (``strays``), and how many of these
        were answered by a Retry or a list of versions; packets of strangers beyond their share
        (``unproved_dropped``); packets that asked for more than a packet may (``excess``) or broke QUIC's rules
        (``protocol_errors``), each of which ended its connection; ``connections`` and how many are ``up`` now."""
        links = list(self._links.index)
        return {**self._links.counts, "connections": len(links), "up": sum(link.up for link in links)}

    def close(self) -> None:
        if not self._closed:
            self._links.close()
        self._closed = True
        self.lower.close()


def _always(certificate: Certificate) -> Callable[[], Certificate]:
    return lambda: certificate
