"""QUIC over a UDP port that it shares with plain datagrams (RFC 9000, RFC 9221).

The first byte of a QUIC packet has bit 0x40 set (RFC 9000, 17), that of our own datagrams never (PROTOCOL.md,
chapters 3 and 10), so each segment that arrives goes one way or the other by that bit.  A :class:`QuicAddress` is
reached through a connection: one that we open, where the address stands in the configuration, or one that was opened
to us from there.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from qvpn.netio.base import Address, Bind, Received
from qvpn.transports.base import CallLater, Layer
from qvpn.transports.quic.acceptor import CID, VERSIONS, Acceptor, Open, source_of
from qvpn.transports.quic.address import OVERHEAD, QuicAddress, over_quic
from qvpn.transports.quic.certificate import NOT_VERIFIED, Certificate
from qvpn.transports.quic.link import SILENT, Link
from qvpn.transports.quic.settings import DEFAULT_SIZE

QUIC_BIT, LONG_HEADER = 0x40, 0x80

IDLE = 30.0
"""Seconds of silence after which QUIC itself ends a connection."""

HALF_OPEN_LIFE, STRANGER_LIFE = 6.0, 45.0
"""Seconds that a connection may take to open, and then to become a peer's: a handshake of ours takes at most 30."""

HALF_OPEN_FREE = 16
"""So many half open connections, and whoever comes next must show first that he receives at his address."""

STRANGERS = 64
"""Connections that no peer has proved to be his; the oldest of the source that has most makes room for the next."""

MOST_DATAGRAMS = 64
"""Of one receive: as many as a block of records has."""

RECEIVE_BYTES = 1 << 17
LOOK = 1.0
"""Seconds for which the first link's MTU is remembered."""

DIALLED = 256
"""Addresses remembered: names may lead to ever new ones."""

REDIAL = 1.0
"""Seconds between two tries to open a connection to one address."""


class QuicBind(Layer):
    """The layer of the transport ``quic``."""

    def __init__(
        self,
        lower: Bind,
        certificate: Certificate,
        clock: Callable[[], float],
        call_later: CallLater,
        *,
        alpn: Sequence[str] = ("h3",),
        max_datagram_size: int = DEFAULT_SIZE,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """``max_datagram_size``: bytes of UDP payload of the longest packet, where the first link carries that."""
        super().__init__(lower)
        self._certificate = certificate
        self._clock, self._call_later = clock, call_later
        self._alpn = list(alpn)
        self._size = max_datagram_size
        self._acceptor = Acceptor(random)
        self._errors: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._links: dict[bytes, Link] = {}
        self._at: dict[Address, Link] = {}
        """By the other end's UDP address: the connection that leads there."""
        self._all: dict[int, Link] = {}
        self._number = 0
        """Of the newest connection that was opened to us."""
        self._accepted: dict[int, Link] = {}
        """Those, by number."""
        self._dial: dict[Address, tuple[QuicAddress, float]] = {}
        """Addresses that we may open connections to, and not before when."""
        self._arrived: deque[Received] = deque()
        self._buffers: list[memoryview] = []
        self._used = 0
        self._sizes: dict[Address, tuple[float, int]] = {}
        self._measured: tuple[Address | None, float, int] = (None, 0.0, 0)
        """The last of them: most sends go where the one before went."""
        self._on_readable: Callable[[], None] | None = None
        self._last: tuple[Address | None, Link | None] = (None, None)
        self._closed = False

    # receiving

    def receive_batch(self, limit: int, descriptor: int = -1) -> list[Received]:
        self._used = 0
        batch = [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]
        if len(batch) < limit:
            touched: dict[int, Link] = {}
            now = self._clock()
            for received in self.lower.receive_batch(limit - len(batch), descriptor):
                self._sort(received, batch, touched, now)
            for link in touched.values():
                # What QUIC itself has to say goes with the acknowledgement, which is due within a millisecond.
                self._after(link, now, flush=not link.up or bool(link.queue))
        self._arrived.extend(map(_copied, batch[limit:]))
        del batch[limit:]
        if self._arrived:
            self._call_later(0, self._more)
        return batch

    def _more(self) -> None:
        if self._arrived and self._on_readable is not None:
            self._on_readable()

    def _sort(self, received: Received, batch: list[Received], touched: dict[int, Link], now: float) -> None:
        """Datagrams of ours stay as they are; QUIC packets are opened."""
        buffer, length, segment = received.buffer, received.length, received.segment
        if not segment or not length:
            batch.append(received)
            return
        quic = [bool(byte & QUIC_BIT) for byte in bytes(buffer[:length:segment])]
        if not any(quic):
            batch.append(received)
            return
        for place, is_quic in enumerate(quic):
            start = place * segment
            data = buffer[start : min(start + segment, length)]
            if not is_quic:
                batch.append(Received(data, len(data), len(data), received.address, received.ecn, received.waited))
            elif (link := self._packet(bytes(data), received.address, now)) is not None:
                touched[id(link)] = link
                if len(link.inbox) >= MOST_DATAGRAMS:
                    self._deliver(link, batch, received.waited)
        for link in touched.values():
            self._deliver(link, batch, received.waited)

    def _packet(self, data: bytes, place: Address, now: float) -> Link | None:
        """Give one QUIC packet to its connection, or make one."""
        cid = data[6 : 6 + data[5]] if data[0] & LONG_HEADER and len(data) > 5 else data[1 : 1 + CID]
        link = self._links.get(cid)
        if link is None:
            link = self._accept(data, place, now)
            if link is None:
                return None
        try:
            link.receive(data, place, now)
        except Exception:  # what a stranger made aioquic do must not cost others what arrived with it
            self._errors["quic_internal"] += 1
            link.ended = True
            self._end(link)
            return None
        moved = link.moved()
        if moved or link.renamed:
            self._register(link)
        if moved:
            here = {link.place, *link.aliases}
            for gone in [each for each, owner in self._at.items() if owner is link and each not in here]:
                del self._at[gone]
        return link

    def _deliver(self, link: Link, batch: list[Received], waited: float) -> None:
        """What a connection brought, equal lengths side by side, as the kernel does with UDP."""
        inbox, link.inbox = link.inbox, []
        first = 0
        while first < len(inbox):
            size, end = len(inbox[first]), first + 1
            last = min(len(inbox), first + MOST_DATAGRAMS, first + RECEIVE_BYTES // size)
            while end < last and len(inbox[end]) == size:
                end += 1
            if end < last and len(inbox[end]) < size:
                end += 1
            whole = b"".join(inbox[first:end])
            buffer = self._buffer()
            buffer[: len(whole)] = whole
            batch.append(Received(buffer, len(whole), size, link.address, waited=waited))
            first = end

    def _buffer(self) -> memoryview:
        if self._used >= len(self._buffers):
            self._buffers.append(memoryview(bytearray(RECEIVE_BYTES)))
        self._used += 1
        return self._buffers[self._used - 1]

    # sending

    def send_batch(self, datagrams: Sequence[memoryview], address: Address) -> int:
        if not isinstance(address, QuicAddress):
            return self.lower.send_batch(datagrams, address)
        return self._put((bytes(datagram) for datagram in datagrams), address, urgent=True)

    def send_fragmentable(self, datagrams: Sequence[memoryview], address: Address) -> int:
        if not isinstance(address, QuicAddress):
            return self.lower.send_fragmentable(datagrams, address)
        now = self._clock()
        link = self._link_to(address, now)
        if link is None:
            return 0
        most, sent = self.max_payload(address), 0
        for datagram in datagrams:
            if not link.put_in_parts(bytes(datagram), now, most):
                break
            sent += 1
        self._after(link, now)
        return sent

    def send_segments(self, buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        """ECN bits stay inside: QUIC's own congestion control would have to answer for the outer ones."""
        if not isinstance(address, QuicAddress):
            return self.lower.send_segments(buffer, segment, address, ecn)
        data = bytes(buffer)
        return self._put((data[cut : cut + segment] for cut in range(0, len(data), segment)), address, urgent=False)

    def _put(self, datagrams: Iterable[bytes], address: QuicAddress, *, urgent: bool) -> int:
        now = self._clock()
        link = self._link_to(address, now)
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
        self._after(link, now)
        return sent

    def _link_to(self, address: QuicAddress, now: float) -> Link | None:
        """The connection to an address; a new one where none is and we may open it."""
        if self._last[0] is address and self._last[1] is not None and not self._last[1].dead(now):
            return self._last[1]
        place = address.place
        if address.dial:
            self._may_dial(address, now)
        came_by = self._accepted.get(address.via)
        if came_by is not None and came_by.up and not came_by.known and not came_by.dead(now):
            return came_by  # an answer goes to whoever asked, and to nobody else
        link = self._at.get(place)
        if link is not None and link.dead(now):
            self._counts["lost"] += 1
            self._end(link)
            link = None
        if link is None:
            link = self._open(place, now)
        if link is None:
            self._errors["quic_not_connected"] += 1
        self._last = (address, link)
        return link

    def _flush(self, link: Link, now: float) -> None:
        """Send what the connection lets go: neighbours of equal length to one address in one system call."""
        packets = link.outgoing(now)
        first = 0
        while first < len(packets):
            data, place = packets[first]
            size, end = len(data), first + 1
            while end < len(packets) and end - first < MOST_DATAGRAMS and packets[end][1] is place:
                length = len(packets[end][0])
                if length > size:
                    break
                end += 1
                if length < size:
                    break
            whole = data if end == first + 1 else b"".join(packet for packet, _ in packets[first:end])
            self.lower.send_segments(memoryview(whole), size, place)
            first = end

    # connections

    def _open(self, place: Address, now: float) -> Link | None:
        address, earliest = self._dial.get(place, (None, 0.0))
        if address is None or now < earliest or self._closed:
            return None
        self._dial[place] = (address, now + REDIAL)
        configuration = self._configuration(client=True)
        configuration.server_name = address.server_name
        quic = QuicConnection(configuration=configuration)
        link = Link(quic, address, now, self._errors)
        quic.connect(place, now)
        self._add(link, {quic.host_cid})
        self._counts["opened"] += 1
        return link

    def _may_dial(self, address: QuicAddress, now: float) -> None:
        """Remember it, for the address that packets come from later does not say so itself."""
        self._dial.setdefault(address.place, (address, now))
        if len(self._dial) > DIALLED:
            del self._dial[next(iter(self._dial))]

    def _accept(self, data: bytes, place: Address, now: float) -> Link | None:
        if self._closed:
            return None
        strangers = [link for link in self._all.values() if not link.client and not link.kept]
        crowded = sum(not link.up for link in strangers) >= HALF_OPEN_FREE
        verdict = self._acceptor.decide(data, place, now, crowded=crowded)
        if not isinstance(verdict, Open):
            self._counts["strays" if verdict is None else "answered_without_state"] += 1
            if verdict is not None:
                self.lower.send_batch([memoryview(verdict)], place)
            return None
        if len(strangers) >= STRANGERS:
            self._counts["strangers_ended"] += 1
            held = Counter(source_of(link.origin) for link in strangers)
            self._end(max(strangers, key=lambda link: held[source_of(link.origin)]))
        quic = QuicConnection(
            configuration=self._configuration(client=False),
            original_destination_connection_id=verdict.original,
            retry_source_connection_id=verdict.retried,
        )
        self._number += 1
        link = Link(quic, over_quic(place, self._number), now, self._errors)
        self._accepted[self._number] = link
        self._add(link, {verdict.named, quic.host_cid})
        self._counts["accepted"] += 1
        return link

    def _configuration(self, *, client: bool) -> QuicConfiguration:
        made = QuicConfiguration(
            alpn_protocols=self._alpn,
            connection_id_length=CID,
            idle_timeout=IDLE,
            is_client=client,
            max_data=0,
            max_stream_data=0,
            max_datagram_frame_size=65_535,
            max_datagram_size=self._size,
            supported_versions=[int(version) for version in VERSIONS],
            verify_mode=NOT_VERIFIED,
        )
        if not client:
            made.certificate = self._certificate.leaf
            made.certificate_chain = list(self._certificate.chain)
            made.private_key = self._certificate.private_key
        return made

    def _add(self, link: Link, cids: set[bytes]) -> None:
        link.cids |= cids
        self._all[id(link)] = link
        self._register(link)

    def _register(self, link: Link) -> None:
        """Find it by its connection IDs and its address.  A connection that was there before keeps its IDs."""
        for cid in [cid for cid, owner in self._links.items() if owner is link and cid not in link.cids]:
            del self._links[cid]
        for cid in link.cids:
            self._links.setdefault(cid, link)
        there = self._at.get(link.place)
        if there is None or there.ended or not there.up or (link.up and link.rank >= there.rank):
            self._at[link.place] = link
        link.listed, link.renamed = link.up, False
        self._last = (None, None)

    def _after(self, link: Link, now: float, *, flush: bool = True) -> None:
        """Whenever something was done with a connection: send, and wait for its next time."""
        if link.up and not link.listed:
            self._register(link)
        if flush and not link.ended:
            self._flush(link, now)
            link.take_events()
            if link.renamed:  # aioquic tells of a connection ID when it sends it
                self._register(link)
        if link.ended or now >= self._deadline(link):
            self._end(link)
            return
        due = self._deadline(link)
        wanted = link.quic.get_timer()
        if wanted is not None and wanted < due:
            due = wanted
        if due >= link.due:
            return
        if link.timer is not None:
            link.timer.cancel()
        link.due = due
        link.timer = self._call_later(max(0.0, due - now), lambda: self._on_timer(link))

    def _on_timer(self, link: Link) -> None:
        link.timer, link.due = None, float("inf")
        if self._all.get(id(link)) is not link:
            return
        now, due = self._clock(), link.quic.get_timer()
        if due is not None and due <= now:
            link.quic.handle_timer(now)
            link.take_events()
        self._after(link, now)

    @staticmethod
    def _deadline(link: Link) -> float:
        """When nobody is there, or nobody whom we know."""
        if link.client:
            return link.silent_until if link.up else link.since + SILENT
        if link.kept:
            return float("inf")
        return link.since + (STRANGER_LIFE if link.up else HALF_OPEN_LIFE)

    def _end(self, link: Link) -> None:
        """Forget a connection, after telling its other end."""
        if self._all.pop(id(link), None) is None:
            return
        self._accepted.pop(link.address.via, None)
        if not link.ended:
            link.close()
            self._flush(link, self._clock())
            link.ended = True
        if link.timer is not None:
            link.timer.cancel()
            link.timer = None
        for cid in [cid for cid, owner in self._links.items() if owner is link]:
            del self._links[cid]
        for place in [place for place, owner in self._at.items() if owner is link]:
            del self._at[place]
            for other in self._all.values():
                if other.place == place:
                    self._register(other)
        self._last = (None, None)

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
            if len(self._sizes) > STRANGERS:
                self._sizes.clear()
            asked, size = now, min(self._size, self.lower.max_payload(address.place)) - OVERHEAD
            self._sizes[address] = (asked, size)
        self._measured = (address, asked, size)
        return size

    def connect(self, address: Address) -> None:
        """Somebody proved to be a peer there: the connection stays, and is opened where it is not."""
        if not isinstance(address, QuicAddress):
            self.lower.connect(address)
            return
        self.lower.connect(address.place)
        now = self._clock()
        if address.dial:
            self._may_dial(address, now)
        link = self._at.get(address.place) or self._open(address.place, now)
        proved = self._accepted.get(address.via)
        if proved is not None and proved.up and proved is not link and not (link is not None and link.client):
            if link is not None and link.place == address.place:
                link.kept, link.since = False, now  # the peer has a newer one, or this never was his
                self._after(link, now)
            link = self._at[address.place] = proved
            self._last = (None, None)
        elif proved is not None and proved.up:
            proved.kept = proved.known = True  # each dials the other, and his packets come by his connection
        if link is not None and not link.kept and (link.client or link is proved):
            link.kept = link.known = True
            self._after(link, now)

    def disconnect(self, address: Address) -> None:
        if not isinstance(address, QuicAddress):
            self.lower.disconnect(address)
            return
        self.lower.disconnect(address.place)
        link = self._at.get(address.place)
        if link is None or link.place != address.place:
            return  # it has moved on, and its new address may be wanted
        link.kept, link.since = False, self._clock()
        if link.client:
            self._end(link)

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self._on_readable = callback
        self.lower.on_readable(callback)

    @property
    def errors(self) -> dict[str, int]:
        return dict(Counter(self.lower.errors) + self._errors)

    @property
    def links(self) -> list[Link]:
        """The connections that there are."""
        return list(self._all.values())

    def counts(self) -> dict[str, int]:
        """For status: connections ``opened`` and ``accepted``, ended because a newer stranger came
        (``strangers_ended``), or replaced (``lost``); packets of no connection (``strays``), and how many of these
        were answered by a Retry or a list of versions; ``connections`` and how many are ``up`` now."""
        links = self._all.values()
        return {**self._counts, "connections": len(links), "up": sum(link.up for link in links)}

    def close(self) -> None:
        if not self._closed:
            for link in list(self._all.values()):
                self._end(link)
        self._closed = True
        self.lower.close()


def _copied(received: Received) -> Received:
    """For a later call: what it came in belongs to the next receive."""
    whole = memoryview(bytes(received.buffer[: received.length]))
    return replace(received, buffer=whole)
