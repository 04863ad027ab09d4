"""Superpackets in: chunks that follow one another are joined again, decrypted straight into their place.

The plaintext of chunk ``k`` is a header and a slice.  Decrypted to where its slice belongs, its header lands on the
end of the slice before it; so a run is decrypted *last to first*, and every slice overwrites the header of the next
chunk that lay on it.  The result is one header and the whole payload, contiguous: one write to the TUN.

A run that ends before its superpacket does stays *pending*, and the next run of the same block is joined to it.  If
it never comes, what is there is settled (:func:`qvpn.netio.offload.settle`) into a smaller superpacket or a packet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

from cryptography.exceptions import InvalidTag

from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.dataplane.views import RecordViews
from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER, Tun
from qvpn.netio.offload import Superpacket
from qvpn.tunnel import ecn, ip
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.epoch import Epoch
from qvpn.tunnel.records import OVERHEAD, TAG
from qvpn.tunnel.replay import BLOCK

RUN_BYTES = 1 << 18
"""A superpacket, and beyond its end the room of one more chunk."""

SHAPES = 16
"""Shapes of superpackets (header length, segment size) whose views are kept."""


Decrypt = Callable[[memoryview, memoryview, None, memoryview], int]


@dataclass(slots=True)
class Pending:
    """Chunks of one superpacket, from ``first_place`` on, that stand at the start of the run buffer."""

    peer: Peer
    epoch: Epoch
    packet: Superpacket
    source: bytes
    """Inner address."""
    head: bytes
    first_place: int
    next_place: int
    next_counter: int
    """That a run must begin with to go on here; -1 at the end of a block."""
    end: int
    mark: int

    def awaits(self, epoch: Epoch, counter: int, mark: int) -> bool:
        """True if a run that begins with this counter goes on here.

        With slices shorter than the header, a header would land on more than the one slice before it, so such
        superpackets are not continued.
        """
        return (
            self.next_counter == counter
            and self.epoch is epoch
            and self.mark == mark
            and self.packet.segment >= self.packet.header
        )

    def extend(self, count: int, end: int) -> None:
        """So many chunks more, up to ``end``."""
        self.next_place += count
        self.next_counter = self.next_counter + count if self.next_place < BLOCK else -1
        self.end = end


@dataclass(slots=True)
class Run:
    """Datagrams of one block that follow one another, of which the first is open already."""

    peer: Peer
    epoch: Epoch
    counter: int
    """Of the first."""
    views: RecordViews | None
    """Of the receive they came in; None where there is only one."""
    first: int
    """Number of the first in the receive."""
    count: int
    opened: memoryview
    """Plaintext of the first."""
    last: int
    """Bytes of the last one's plaintext."""
    mark: int
    """ECN bits of the outer headers, where they change the inner one."""

    def fits(self, packet: Superpacket) -> bool:
        """True if every datagram has exactly the length that its chunk must have."""
        if self.count > 1 and len(self.opened) != packet.header + packet.segment:
            return False
        return offload.chunk_fits(packet, (self.counter & (BLOCK - 1)) + self.count - 1, self.last)


class RunJoiner:
    """Joins runs of chunks and writes them to the TUN."""

    def __init__(self, table: PeerTable, tun: Tun) -> None:
        self._table = table
        self._tun = tun
        self._buffer = memoryview(bytearray(RUN_BYTES))
        self.pending: Pending | None = None
        """Chunks that wait for more of their superpacket."""
        self._places: dict[tuple[int, int], list[memoryview]] = {}
        """Where the chunks of a superpacket of one shape go."""

    def begin(
        self,
        peer: Peer,
        epoch: Epoch,
        counter: int,
        views: RecordViews,
        first: int,
        count: int,
        opened: memoryview,
        last: int,
        mark: int,
    ) -> bool:
        """Begin with ``count`` records of a receive from number ``first`` on, which is open; as :meth:`add`.

        ``last``: bytes of the last one's plaintext.
        """
        size, place = len(opened), counter & (BLOCK - 1)
        found, after = offload.addressed(opened, size), place + count
        if found is None:
            return False
        packet, source, _ = found
        header, segment, _, _, _ = packet
        if size != header + segment or not offload.chunk_fits(packet, after - 1, last):
            return False
        if self.pending is not None:
            self.flush()
        if count > 1:
            try:
                _open(epoch.opener.decrypt, views, first + 1, self._shape(header, segment, count)[1:count], last)
            except InvalidTag:
                return False
        self._buffer[:size] = opened
        head, end = bytes(opened[:header]), (count - 1) * segment + last
        follows = counter + count if after < BLOCK else -1
        self.pending = Pending(peer, epoch, packet, source, head, place, after, follows, end, mark)
        return True

    def go_on(self, pending: Pending, views: RecordViews, first: int, count: int, last: int) -> bool:
        """Open ``count`` records of a receive from number ``first`` on, which go on where ``pending`` ends.

        As :meth:`add`.  ``last``: bytes of the last one's plaintext.  The header of the first lands on the end of
        what is pending, which is put back.
        """
        packet, place = pending.packet, pending.next_place
        header, segment, at = packet.header, packet.segment, place - pending.first_place
        if header + segment != views.segment - OVERHEAD:
            return False
        if not offload.chunk_fits(packet, place + count - 1, last):
            return False
        base = at * segment
        landing = self._buffer[base : base + header]
        kept, places = bytes(landing), self._shape(header, segment, at + count)[at : at + count]
        try:
            _open(pending.epoch.opener.decrypt, views, first, places, last)
            fits = landing == pending.head
        except InvalidTag:
            fits = False
        landing[:] = kept
        if fits:
            pending.extend(count, base + (count - 1) * segment + last)
        return fits

    def add(self, run: Run) -> bool:
        """Open the rest of a run and join it.

        False if its chunks do not fit together or one of them does not verify: then nothing of the run was used, and
        its datagrams must be handled one by one.  The caller marks the counters when this returns True.
        """
        pending = self._continued(run) if self.pending else None
        found = None if pending else offload.addressed(run.opened, len(run.opened))
        packet = pending.packet if pending else found[0] if found else None
        if packet is None or not run.fits(packet):
            return False
        if pending is None:
            self.flush()
        place = run.counter & (BLOCK - 1)
        first_place = pending.first_place if pending else place
        base = (place - first_place) * packet.segment
        try:
            if run.count > 1 and run.views is not None:
                at = place - first_place
                run.views.grow(run.first + run.count)
                places = self._shape(packet.header, packet.segment, at + run.count)[at + 1 : at + run.count]
                _open(run.epoch.opener.decrypt, run.views, run.first + 1, places, run.last)
        except InvalidTag:
            return False
        skip = packet.header if pending else 0
        self._buffer[base + skip : base + len(run.opened)] = run.opened[skip:]
        end = base + (run.count - 1) * packet.segment + run.last
        if pending:
            pending.extend(run.count, end)
        elif found:
            head, after = bytes(run.opened[: packet.header]), place + run.count
            follows = run.counter + run.count if after < BLOCK else -1
            self.pending = Pending(run.peer, run.epoch, packet, found[1], head, place, after, follows, end, run.mark)
        return True

    def finish(self) -> None:
        """Write the superpacket if it is complete."""
        pending = self.pending
        if pending is not None and pending.next_place * pending.packet.segment >= pending.packet.payload:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as it is."""
        pending = self.pending
        if pending is None:
            return
        self.pending = None
        packet, peer = pending.packet, pending.peer
        payload = pending.end - packet.header
        chunks = pending.next_place - pending.first_place
        if pending.mark and not ecn.apply(self._buffer, VNET_HEADER, pending.mark):
            peer.drops.count(ecn.lost(pending.mark), chunks)
            return
        if self._table.allowed.lookup(pending.source) is not peer:
            peer.drops.count(DropReason.WRONG_SOURCE, chunks)
            return
        peer.source_checks += 1
        if packet.protocol == ip.UDP and chunks > 1 and not self._tun.merges_udp:
            self._write_apart(pending, payload)
            return
        if payload == packet.payload and payload > packet.segment:
            offload.set_header_length(self._buffer, 0, packet)
        else:
            offload.settle(self._buffer, 0, packet, pending.first_place, payload)
        if self._tun.write_batch([self._buffer[: pending.end]]):
            peer.tun_writes += 1
            peer.received_packets += chunks
            peer.received_bytes += payload + chunks * (packet.header - VNET_HEADER)
        else:
            peer.tun_refused += 1
            peer.drops.count(DropReason.TUN_FULL, chunks)

    def _write_apart(self, pending: Pending, payload: int) -> None:
        """Each chunk as a packet of its own, for a kernel that knows no UDP superpackets."""
        packet, peer, size = pending.packet, pending.peer, pending.packet.header
        head, frames = bytes(self._buffer[:size]), []
        for place, cut in enumerate(range(size, size + payload, packet.segment), start=pending.first_place):
            end = min(cut + packet.segment, size + payload)
            frames.append(memoryview(bytearray(head + self._buffer[cut:end])))
            offload.settle(frames[-1], 0, packet, place, end - cut)
        taken = self._tun.write_batch(frames)
        peer.source_checks += len(frames) - 1  # one look-up, but each packet has its entry in the books
        peer.tun_writes += taken
        peer.received_packets += taken
        peer.received_bytes += sum(len(frame) - VNET_HEADER for frame in frames[:taken])
        if taken < len(frames):
            peer.tun_refused += len(frames) - taken
            peer.drops.count(DropReason.TUN_FULL, len(frames) - taken)

    def _continued(self, run: Run) -> Pending | None:
        """What is pending, if this run goes on where it ends."""
        pending = self.pending
        if (
            pending is not None
            and pending.awaits(run.epoch, run.counter, run.mark)
            and pending.head == run.opened[: pending.packet.header]
        ):
            return pending
        return None

    def _shape(self, header: int, segment: int, count: int) -> list[memoryview]:
        """The first ``count`` places, at least, of superpackets with this header and segment size."""
        places = self._places.get((header, segment))
        if places is None:
            if len(self._places) >= SHAPES:
                self._places.pop(next(iter(self._places)))
            places = self._places[header, segment] = []
        size = header + segment
        for place in range(len(places), count):
            places.append(self._buffer[place * segment : place * segment + size])
        return places


def _open(decrypt: Decrypt, views: RecordViews, first: int, places: list[memoryview], last: int) -> None:
    """Decrypt a record to each of the places, from number ``first`` on, last to first.  Raises InvalidTag.

    ``last``: bytes of the last one's plaintext.
    """
    end = first + len(places)
    if last < len(places[-1]):
        end -= 1
        decrypt(views.nonces[end], views.texts[end][: last + TAG], None, places.pop()[:last])
    if places:
        stop = first - 1 if first else None
        nonces, texts = views.nonces[end - 1 : stop : -1], views.texts[end - 1 : stop : -1]
        places.reverse()
        # A loop in C; what it adds up tells that no chunk was left out.
        if sum(map(decrypt, nonces, texts, repeat(None), places)) != len(places) * len(places[0]):
            raise InvalidTag
