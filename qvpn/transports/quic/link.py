"""One QUIC connection, without I/O: datagrams of ours in, UDP datagrams out, and back.

:class:`~qvpn.transports.quic.connection.Connection` does the protocol.  Of aioquic's insides these are used here: the
list of pending DATAGRAM frames is replaced by our bounded queue, the size of the packets it builds is set before each
building, the pacer is replaced by one for batches, the certificate that the peer showed is read for the pin, and
probes of the path's MTU are taken out of the congestion control's books.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, cast

from aioquic.quic import events
from aioquic.tls import Epoch

from qvpn.netio.base import Address
from qvpn.transports.quic.address import OVERHEAD, QuicAddress, over_quic
from qvpn.transports.quic.certificate import fingerprint
from qvpn.transports.quic.connection import FRAME, Connection
from qvpn.transports.quic.pacer import BatchPacer
from qvpn.transports.quic.packets import Packet
from qvpn.transports.quic.parts import PART, Joiner, Splitter
from qvpn.transports.quic.queue import Amount, DatagramQueue

LEAST_PACKET = 1200
EVERYWHERE = LEAST_PACKET - OVERHEAD
"""Bytes of the longest frame that every QUIC path carries."""

SILENT = 4.0
"""Seconds without any answer to what we sent, after which a connection is taken for dead."""


class Link:
    """A connection, as client or as server."""

    def __init__(self, quic: Connection, address: QuicAddress, now: float, errors: Counter[str]) -> None:
        self.quic = quic
        self.address = address
        self.place = address.place
        """Where its UDP datagrams go."""
        self.origin = address.place
        """Where they went first."""
        self.listed = False
        """It has been entered under its address since it opened or moved."""
        self.since = now
        self.queue = DatagramQueue()
        self.unsent = Amount()
        """Of packets that were taken: how much was not sent after all, for whoever takes that away."""
        self.inbox: list[bytes] = []
        """Datagrams of ours that came in, to be taken by whoever called :meth:`receive`."""
        self.up = False
        """The TLS handshake is over, and the pin, if any, fits."""
        self.ended = False
        self.kept = False
        """Somebody wants it: it ends by itself only when it is dead."""
        self.known = False
        """A peer has proved once that he is behind it."""
        self.validated = False
        """A Retry, or the whole handshake, has shown that the other end receives where it says."""
        self.handled = 0
        """Datagrams that it cost us something to open, before it was up."""
        self.cids: set[bytes] = set()
        self.renamed = False
        """These have changed since it was entered under them."""
        self.aliases: deque[Address] = deque(maxlen=4)
        """Where it was before."""
        self.timer: Any = None
        self.due = float("inf")
        self.last_heard = now
        self._unanswered: float | None = None
        self._errors = errors
        self._splitter, self._joiner = Splitter(), Joiner()
        inside = cast(Any, quic)
        inside._datagrams_pending = self.queue
        inside._loss._pacer = BatchPacer(LEAST_PACKET)

    @property
    def client(self) -> bool:
        """We opened it."""
        return self.address.dial

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Of several connections to one address the highest is used: only a client may move (RFC 9000, 9).

        Whoever comes there, or only forges that source, is nobody before a record shows that he is a peer.
        """
        return self.client, self.kept, self.since

    # sending

    def put(self, datagram: bytes, now: float, *, urgent: bool = False) -> bool:
        """Queue one datagram; False, and counted, if there is no room for it."""
        if self.queue.put(datagram, now, urgent=urgent):
            return True
        self._errors["quic_queue_full"] += 1
        return False

    def put_in_parts(self, datagram: bytes, now: float, most: int) -> bool:
        """As :meth:`put`, but what is longer than every QUIC path carries goes as two."""
        if len(datagram) <= EVERYWHERE:
            return self.put(datagram, now, urgent=True)
        parts = self._splitter.split(datagram)
        if len(parts[0]) > most:
            self._errors["EMSGSIZE"] += 1
            return False
        return all(self.put(part, now, urgent=True) for part in parts)

    def outgoing(self, now: float) -> list[Packet]:
        """UDP datagrams to send now."""
        inside = cast(Any, self.quic)
        if self.up and self.queue:
            self._count("quic_stale", self.queue.drop_stale(now, inside._loss._rtt_smoothed))
        found = self._probes(now) if self.up else []
        waiting = bool(self.queue)
        most = max(LEAST_PACKET, self.queue.longest + OVERHEAD if waiting else 0)
        if self.quic.only_datagrams:
            found += self._acknowledgement(now)
            found += self.quic.seal(self.queue, most, now)
        else:
            inside._max_datagram_size = most
            found += [Packet(*each) for each in self.quic.datagrams_to_send(now)]
        if waiting and self._unanswered is None:  # also if nothing leaves: then nobody acknowledges what did before
            self._unanswered = now
        return found

    def _acknowledgement(self, now: float) -> list[Packet]:
        """The one that is due, in a packet of its own: aioquic writes it."""
        if not self.quic.acknowledges(now):
            return []
        inside = cast(Any, self.quic)
        inside._datagrams_pending, inside._max_datagram_size = deque(), LEAST_PACKET
        try:
            return [Packet(*each) for each in self.quic.datagrams_to_send(now)]
        finally:
            inside._datagrams_pending = self.queue

    def _probes(self, now: float) -> list[Packet]:
        """Control records of more than what every path carries are probes of its MTU.

        Each goes at once, and whether it is lost says nothing of congestion (RFC 9000, 14.4): else a narrow path,
        on which all of them are lost, would bring the connection to a stand.
        """
        found: list[Packet] = []
        inside = cast(Any, self.quic)
        recovery = inside._loss
        for probe in self.queue.take_long(EVERYWHERE):
            flight, first = recovery._cc.bytes_in_flight, inside._packet_number
            inside._datagrams_pending, inside._max_datagram_size = deque([probe]), len(probe) + OVERHEAD
            recovery._cc.bytes_in_flight, recovery._pacer.open = 0, True
            found += [Packet(*each) for each in inside.datagrams_to_send(now)]
            recovery._cc.bytes_in_flight, recovery._pacer.open = flight, False
            inside._datagrams_pending = self.queue
            space = inside._spaces[Epoch.ONE_RTT]
            for number in range(first, inside._packet_number):
                packet = space.sent_packets.get(number)
                if packet is not None and packet.is_ack_eliciting:
                    packet.in_flight = packet.is_ack_eliciting = False
                    space.ack_eliciting_in_flight -= 1
        return found

    def refused(self, packet: Packet) -> None:
        """The first link did not take one of the packets of :meth:`outgoing`."""
        if packet.datagrams:
            size = len(packet.data) - OVERHEAD - (packet.datagrams - 1) * FRAME
            self._not_sent(Amount(packet.datagrams, size))

    def _count(self, reason: str, lost: Amount, urgent: int = 0) -> None:
        """Packets that were taken, and control records, are not sent after all."""
        if lost.datagrams or urgent:
            self._errors[reason] += lost.datagrams + urgent
            self._not_sent(lost)

    def _not_sent(self, lost: Amount) -> None:
        self.unsent = Amount(self.unsent.datagrams + lost.datagrams, self.unsent.size + lost.size)

    # receiving

    def receive(self, data: bytes, place: Address, now: float) -> None:
        """One UDP datagram; what was in it is in :attr:`inbox` then.  Nothing is taken once it is closing."""
        if self.quic.closing:
            return
        before = self.quic.verified
        self.quic.receive_datagram(data, place, now)
        if self.quic.verified != before:
            self.last_heard, self._unanswered = now, None
        if self.quic.eventful:
            self.take_events()
        if self.quic.datagrams:
            self._take_datagrams()

    def take_events(self) -> None:
        """What happened in the connection."""
        while (event := self.quic.next_event()) is not None:
            handler = _HANDLERS.get(type(event))
            if handler is not None:
                handler(self, event)

    def _take_datagrams(self) -> None:
        arrived, self.quic.datagrams = self.quic.datagrams, []
        if not self.up:
            return  # the certificate was not the one that was pinned
        for data in arrived:
            if not data:
                self._errors["quic_empty"] += 1
            elif data[0] != PART:
                self.inbox.append(data)
            elif (whole := self._joiner.join(data)) is not None:
                self.inbox.append(whole)

    def _completed(self, event: events.HandshakeCompleted) -> None:
        pin = self.address.pin
        if pin is not None:
            shown = cast(Any, self.quic).tls._peer_certificate
            if shown is None or fingerprint(shown) != pin:
                self._errors["quic_pin"] += 1
                self.close()
                return
        self.up = self.validated = True

    def _terminated(self, event: events.ConnectionTerminated) -> None:
        self.ended = True

    def _issued(self, event: events.ConnectionIdIssued) -> None:
        self.cids.add(event.connection_id)
        self.renamed = True

    def _retired(self, event: events.ConnectionIdRetired) -> None:
        self.cids.discard(event.connection_id)
        self.renamed = True

    # life

    @property
    def silent_until(self) -> float:
        """When it is taken for dead if nothing comes."""
        return float("inf") if self._unanswered is None else self._unanswered + SILENT

    def dead(self, now: float) -> bool:
        """Ended, about to end, or nobody answers."""
        return self.ended or self.quic.closing or now >= self.silent_until

    def moved(self) -> bool:
        """Take the other end's new address over, if it has one."""
        place = self.quic.get_peer_address()
        if place is self.place or place is None or self.client:
            return False
        if place == self.place:
            self.place = place  # quicker to tell the next time
            return False
        self.aliases.append(self.place)
        self.address, self.place, self.listed = over_quic(place, self.address.via), place, False
        return True

    def close(self) -> None:
        """Tell the other end; :meth:`outgoing` has the datagram."""
        self.forget()
        self.up = False
        self.quic.close()

    def forget(self) -> None:
        """What waits is not sent any more."""
        self._count("quic_closed", *self.queue.clear())


_HANDLERS: dict[type, Callable[[Link, Any], None]] = {
    events.HandshakeCompleted: Link._completed,
    events.ConnectionTerminated: Link._terminated,
    events.ConnectionIdIssued: Link._issued,
    events.ConnectionIdRetired: Link._retired,
}
