"""The connections that there are: how they are found, opened, accepted, kept, and given up.

A :class:`~qvpn.transports.quic.link.Link` is found by its connection IDs when a packet comes, and by the address of
its other end when something is to be sent there.  Whoever is not proved to be a peer is a stranger: strangers'
connections are few, live shortly, and what they send is opened only as far as their shares go.  A mistake in the
handling of one connection ends that one, counted as ``quic_internal``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from aioquic.quic.configuration import QuicConfiguration

from qvpn.netio.base import Address, Bind
from qvpn.transports.base import CallLater
from qvpn.transports.quic.acceptor import CID, LEAST_INITIAL, VERSIONS, Acceptor, Open
from qvpn.transports.quic.address import QuicAddress, over_quic
from qvpn.transports.quic.certificate import NOT_VERIFIED, Certificate
from qvpn.transports.quic.connection import Connection
from qvpn.transports.quic.index import Index
from qvpn.transports.quic.link import SILENT, Link
from qvpn.transports.quic.packets import LONG_HEADER, send_runs
from qvpn.transports.quic.queue import Amount
from qvpn.transports.quic.shares import Rates, Shares, Sources

IDLE = 30.0
"""Seconds of silence after which QUIC itself ends a connection."""

HALF_OPEN_LIFE, STRANGER_LIFE = 6.0, 45.0
"""Seconds that a connection may take to open, and then to become a peer's: a handshake of ours takes at most 30."""

HALF_OPEN_FREE = 16
"""So many half open connections, and whoever comes next must show first that he receives at his address."""

HALF_OPEN_DATAGRAMS = 24
"""Datagrams that a connection may take to open: three or four, and what is repeated for losses."""

STRANGERS = 64
"""Connections that no peer has proved to be his; the oldest of the source that has most makes room for the next."""

WORK = Rates(each=64.0, burst=1024.0, together=512.0, together_burst=2048.0)
"""Datagrams of these, once they are open.  A handshake of ours takes some ten each way; a peer who comes back by a
new connection is known by his first record."""

DIALLED = 256
"""Addresses remembered: names may lead to ever new ones."""

REDIAL = 1.0
"""Seconds between two tries to open a connection to one address."""

TOLD = 60.0
"""Seconds between two lines in the log about connections that were ended by a mistake here."""


class Links:
    """All connections over one port."""

    def __init__(
        self,
        lower: Bind,
        certificate: Callable[[], Certificate],
        clock: Callable[[], float],
        call_later: CallLater,
        *,
        alpn: Sequence[str],
        size: int,
        errors: Counter[str],
        random: Callable[[int], bytes] = os.urandom,
        log: Any = None,
    ) -> None:
        """``certificate`` is asked for each connection that is accepted.  ``size``: of the longest packet."""
        self._lower = lower
        self._certificate = certificate
        self._clock, self._call_later = clock, call_later
        self._alpn, self._size = list(alpn), size
        self._errors, self._log = errors, log
        self._told = float("-inf")
        self.counts: Counter[str] = Counter()
        self.sources = Sources()
        self._acceptor = Acceptor(random, self.sources)
        self._work = Shares(WORK)
        self.index = Index()
        self._number = 0
        """Of the newest connection that was opened to us."""
        self._dial: dict[Address, tuple[QuicAddress, float]] = {}
        """Addresses that we may open connections to, and not before when."""
        self._unsent: dict[Address, Amount] = {}
        self._closed = False

    # finding them

    def receive(self, data: bytes, place: Address, now: float) -> Link | None:
        """Give one QUIC packet to its connection, or make one; None: nothing came of it."""
        cid = data[6 : 6 + data[5]] if data[0] & LONG_HEADER and len(data) > 5 else data[1 : 1 + CID]
        link = self.index.by_cid.get(cid)
        if link is None:
            link = self._accept(data, place, now)
            if link is None:
                return None
        if not link.known and not self._affords(link, now):
            self.counts["unproved_dropped"] += 1
            return None
        try:
            link.receive(data, place, now)
            self.index.follow(link)
        except Exception as error:  # what a stranger made aioquic do must not cost others what arrived with it
            self._broken(link, error)
            return None
        return link

    def _affords(self, link: Link, now: float) -> bool:
        """Whether an unproved connection's share covers another datagram.

        It is dropped else, and not the connection: opening a new one would cost us more than these datagrams do.
        """
        if not link.up:
            link.handled += 1
            return link.handled <= HALF_OPEN_DATAGRAMS
        if link.client:
            return True
        return self._work.take(self.sources.of(link.origin), now, expected=self.sources.expects(link.origin))

    def to(self, address: QuicAddress, now: float) -> Link | None:
        """The connection to an address; a new one where none is and we may open it."""
        asked, link = self.index.last
        if asked is address and link is not None and not link.dead(now):
            return link
        if address.dial:
            self.may_dial(address, now)
        came_by = self.index.accepted.get(address.via)
        if came_by is not None and came_by.up and not came_by.known and not came_by.dead(now):
            return came_by  # an answer goes to whoever asked, and to nobody else
        place = address.place
        link = self.index.at.get(place)
        if link is not None and link.dead(now):
            self.counts["lost"] += 1
            self.end(link)
            link = None
        if link is None:
            link = self._open(place, now)
        if link is None:
            self._errors["quic_not_connected"] += 1
        self.index.last = (address, link)
        return link

    # opening and accepting

    def may_dial(self, address: QuicAddress, now: float) -> None:
        """Remember it, for the address that packets come from later does not say so itself."""
        self._dial.setdefault(address.place, (address, now))
        if len(self._dial) > DIALLED:
            del self._dial[next(iter(self._dial))]

    def _open(self, place: Address, now: float) -> Link | None:
        address, earliest = self._dial.get(place, (None, 0.0))
        if address is None or now < earliest or self._closed:
            return None
        self._dial[place] = (address, now + REDIAL)
        configuration = self._configuration(client=True)
        configuration.server_name = address.server_name
        try:
            link = Link(Connection(configuration, self.counts), address, now, self._errors)
            link.quic.connect(place, now)
        except Exception as error:
            self._tell(error)
            return None
        self.index.add(link, {link.quic.host_cid})
        self.counts["opened"] += 1
        return link

    def _accept(self, data: bytes, place: Address, now: float) -> Link | None:
        if self._closed or not data[0] & LONG_HEADER or len(data) < LEAST_INITIAL:  # RFC 9000, 14.1 and 17.2
            self.counts["strays"] += 1
            return None
        strangers = [link for link in self.index if not link.client and not link.kept]
        crowded = sum(not link.up for link in strangers) >= HALF_OPEN_FREE
        try:
            verdict = self._acceptor.decide(data, place, now, crowded=crowded)
        except Exception as error:
            self._tell(error)
            return None
        if not isinstance(verdict, Open):
            self.counts["strays" if verdict is None else "answered_without_state"] += 1
            if verdict is not None:
                self._lower.send_batch([memoryview(verdict)], place)
            return None
        if len(strangers) >= STRANGERS:
            self.counts["strangers_ended"] += 1
            self.end(self._one_too_many(strangers))
        try:
            return self._accepted_from(place, verdict, now)
        except Exception as error:
            self._tell(error)
            return None

    def _accepted_from(self, place: Address, opened: Open, now: float) -> Link:
        quic = Connection(
            self._configuration(client=False),
            self.counts,
            original_destination_connection_id=opened.original,
            retry_source_connection_id=opened.retried,
        )
        self._number += 1
        link = Link(quic, over_quic(place, self._number), now, self._errors)
        link.validated = opened.retried is not None
        self.index.add(link, {opened.named, quic.host_cid})
        self.counts["accepted"] += 1
        return link

    def _one_too_many(self, strangers: list[Link]) -> Link:
        """The oldest of the source that has most; those that do come from where a peer is expected last."""
        sources = self.sources
        others = [each for each in strangers if not (each.validated and sources.expects(each.origin))]
        held = Counter(sources.of(link.origin) for link in strangers)
        return max(others or strangers, key=lambda link: held[sources.of(link.origin)])

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
            certificate = self._certificate()
            made.certificate = certificate.leaf
            made.certificate_chain = list(certificate.chain)
            made.private_key = certificate.private_key
        return made

    # life

    def after(self, link: Link, now: float, *, flush: bool = True) -> None:
        """Whenever something was done with a connection: send, and wait for its next time."""
        try:
            if link.up and not link.listed:
                self.index.register(link)
            if flush and not link.ended:
                self._flush(link, now)
                link.take_events()
                if link.renamed:  # aioquic tells of a connection ID when it sends it
                    self.index.register(link)
            if link.ended or now >= self._deadline(link):
                self.end(link)
                return
            self._wait(link, now)
        except Exception as error:
            self._broken(link, error)

    def _flush(self, link: Link, now: float) -> None:
        """Send what the connection lets go."""
        for packet in send_runs(self._lower, link.outgoing(now)):
            link.refused(packet)

    def _wait(self, link: Link, now: float) -> None:
        """One timer for each connection, which is never moved back: if there is nothing to do yet, it waits again."""
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
        if link not in self.index:
            return
        now = self._clock()
        try:
            due = link.quic.get_timer()
            if due is not None and due <= now:
                link.quic.handle_timer(now)
                link.take_events()
                self.index.follow(link)
        except Exception as error:
            self._broken(link, error)
            return
        self.after(link, now)

    @staticmethod
    def _deadline(link: Link) -> float:
        """When nobody is there, or nobody whom we know."""
        if link.client:
            return link.silent_until if link.up else link.since + SILENT
        if link.kept:
            return float("inf")
        return link.since + (STRANGER_LIFE if link.up else HALF_OPEN_LIFE)

    def end(self, link: Link) -> None:
        """Forget a connection, after telling its other end."""
        if not self.index.remove(link):
            return
        if not link.ended:
            link.ended = True
            try:
                link.close()
                self._flush(link, self._clock())
            except Exception as error:
                self._tell(error)
        link.forget()
        self._take_unsent(link)
        if link.timer is not None:
            link.timer.cancel()
            link.timer = None

    def _broken(self, link: Link, error: Exception) -> None:
        """A mistake, ours or aioquic's, ends the connection that it happened in, without another word to it."""
        self._tell(error)
        link.ended = True
        self.end(link)

    def _tell(self, error: Exception) -> None:
        self._errors["quic_internal"] += 1
        now = self._clock()
        if self._log is not None and now - self._told >= TOLD:
            self._told = now
            self._log.error("internal error in a QUIC connection, which was ended", error=type(error).__name__)

    # peers

    def proved(self, address: QuicAddress) -> None:
        """Somebody proved to be a peer there: the connection stays, and is opened where it is not."""
        now = self._clock()
        self.sources.expect(address)
        if address.dial:
            self.may_dial(address, now)
        link = self.index.at.get(address.place) or self._open(address.place, now)
        proved = self.index.accepted.get(address.via)
        if proved is not None and not proved.up:
            proved = None
        leads = link is not None and link.client
        if proved is not None and proved is not link and not (leads and proved.kept):
            self._only(proved, address.place, now)
            if not leads:
                self.index.lead(address.place, proved)
                link = proved
        for each in (link, proved):
            if each is not None and not each.kept and (each.client or each is proved):
                each.kept = each.known = True
                self.after(each, now)

    def _only(self, proved: Link, place: Address, now: float) -> None:
        """Of those that were opened to us from there this connection is the peer's: he has no older one any more."""
        for other in self.index:
            if other.kept and not other.client and other is not proved and other.place == place:
                other.kept, other.since = False, now
                self.after(other, now)

    def unwanted(self, address: QuicAddress) -> None:
        """Undo :meth:`proved`."""
        for link in (self.index.at.get(address.place), self.index.accepted.get(address.via)):
            if link is None or link.place != address.place:
                continue  # it has moved on, and its new address may be wanted
            link.kept, link.since = False, self._clock()
            if link.client:
                self.end(link)

    def waiting(self, address: QuicAddress) -> Amount:
        """How much was taken for there and is not sent yet."""
        place = address.place
        waits = [link.queue.bulk for link in self.index if link.place == place]
        return Amount(sum(each.datagrams for each in waits), sum(each.size for each in waits))

    def unsent(self) -> list[tuple[Address, int, int]]:
        """(address, datagrams, bytes) of what was taken and then not sent, since the last call."""
        for link in self.index:
            self._take_unsent(link)
        found = [(address, *amount) for address, amount in self._unsent.items()]
        self._unsent.clear()
        return found

    def _take_unsent(self, link: Link) -> None:
        lost, link.unsent = link.unsent, Amount()
        if lost.datagrams:
            before = self._unsent.get(link.address, Amount())
            self._unsent[link.address] = Amount(before.datagrams + lost.datagrams, before.size + lost.size)

    def close(self) -> None:
        """End all; nothing is opened or accepted any more."""
        for link in self.index:
            self.end(link)
        self._closed = True
