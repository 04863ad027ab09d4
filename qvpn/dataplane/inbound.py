"""From the network to the TUN.  Functions stand in the order in which a datagram meets them.

One received buffer may hold many datagrams of one source (UDP GRO), handshake and records mixed: each is classified
by its own first bytes.  Records are opened back to back into one output buffer; only regions whose tag verified are
ever looked at, so what a failed open left behind is overwritten by the next or thrown away.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag

from qvpn.dataplane.hooks import PlaneHooks
from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.dataplane.runs import Run, RunJoiner
from qvpn.dataplane.unpack import Unpacker
from qvpn.dataplane.views import RecordViews, ViewCache
from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER, Address, Received, Tun
from qvpn.tunnel import ecn
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.epoch import Epoch
from qvpn.tunnel.records import CONTROL_BIT, FIELDS, OVERHEAD, PREFIX, Refused, split_header
from qvpn.tunnel.replay import BLOCK, INDEX_BITS

HANDSHAKE_TYPES = range(1, 7)

OUT_BYTES = 1 << 17
"""Output buffer: one received buffer, of two receives at most, always fits."""


class Inbound:
    """Opens records and gives the packets in them to the TUN."""

    def __init__(
        self, table: PeerTable, tun: Tun, hooks: PlaneHooks, connect: Callable[[Address], None] = lambda address: None
    ) -> None:
        """``connect`` is told by which of the ways to a peer's endpoint his records come, whenever that changes."""
        self._table = table
        self._hooks = hooks
        self._connect = connect
        self._joiner = RunJoiner(table, tun)
        self._plain = Unpacker(table, tun)
        self._views = ViewCache()
        self._apart = False
        """This receive is no superpacket as a whole: its records are handled one by one."""
        self._opened: memoryview | None = None
        """Its first record, if that is open already."""
        self._out = memoryview(bytearray(OUT_BYTES))
        self._position = 0

    def process(self, received: Received, now: float) -> None:
        """Handle every datagram of one receive.  A superpacket may stay pending until :meth:`flush`."""
        segment, length = received.segment, received.length
        if not segment:
            self._table.drops.count(DropReason.TRUNCATED)
            return
        plain, self._apart, self._opened = self._plain, False, None
        plain.mark = ecn.changes(received.ecn) if received.ecn else ecn.NOT_ECT
        plain.alone = length <= segment
        if plain.alone:
            if length >= OVERHEAD and self._lone(received, now):
                return
            self._run(received, None, 0, 1, now)
        elif segment < OVERHEAD:
            for place in range(-(-length // segment)):
                self._run(received, None, place, 1, now)
        elif self._many(received, now):
            return
        self._settle()

    def _settle(self) -> None:
        """Write what is accepted: from here on the output buffer is free."""
        self._plain.write_accepted()
        self._position = 0

    def _many(self, received: Received, now: float) -> bool:
        """Several datagrams of the length of a record at least; True: nothing that was in them waits."""
        segment = received.segment
        views = self._views.of(received.buffer, segment)
        count, tail = divmod(received.length, segment)
        whole = count + (tail >= OVERHEAD)
        short, joined = 0 < tail < OVERHEAD, received.joined
        # Of two receives of which the first waited too long, only that one is marked, or lost.
        is_run = not (joined and self._plain.mark == ecn.WAITED) and views.is_run(0, whole)
        if is_run and not short and self._chunks(received, views, 0, whole, now):
            return True
        if is_run:
            self._run(received, views, 0, whole, now)
        elif 0 < joined < whole:
            self._part(received, views, 0, joined, now)
            self._settle()
            if self._plain.mark == ecn.WAITED:
                self._plain.mark = ecn.NOT_ECT
            self._part(received, views, joined, whole - joined, now)
        else:
            self._split(received, views, 0, whole, now)
        if short:
            self._run(received, None, count, 1, now)
        return False

    def _part(self, received: Received, views: RecordViews, first: int, count: int, now: float) -> None:
        """One of two receives that were put behind one another, and are no superpacket together."""
        self._apart, self._opened = False, None
        if count < 2 or not views.is_run(first, count):
            self._split(received, views, first, count, now)
        elif not self._chunks(received, views, first, count, now):
            self._run(received, views, first, count, now)

    def _split(self, received: Received, views: RecordViews, first: int, count: int, now: float) -> None:
        for start, many in views.split(first, count):
            self._run(received, views, start, many, now)

    @property
    def pending(self) -> bool:
        """A superpacket waits for more of it, or for :meth:`flush`."""
        return self._joiner.pending is not None or self._plain.merger.count > 0

    def flush(self) -> None:
        """Nothing more waits: write what is still pending."""
        if self._joiner.pending is not None:
            self._joiner.flush()
        if self._plain.merger.count:
            self._plain.merger.flush()

    def _lone(self, received: Received, now: float) -> bool:
        """A data record that came alone while nothing is pending: what the functions below do, in one go.

        False, and nothing done, for all else.
        """
        buffer, length = received.buffer, received.length
        prefix, index, counter = FIELDS.unpack_from(buffer)
        found = self._table.by_index.get(index)
        if found is None or prefix != PREFIX or counter & CONTROL_BIT:
            return False
        peer, epoch = found
        if now >= epoch.ends or self._joiner.pending is not None or self._plain.merger.count:
            return False
        opener = epoch.opener
        try:
            size = opener.decipher(counter, buffer[:length], self._out)
        except Refused as refused:
            peer.drops.count(refused.reason)
        else:
            plaintext = self._out[:size]
            if self._plain.take_whole(peer, plaintext):
                opener.data.mark(counter)
            else:
                self._place(peer, epoch, counter, received, None, 0, 1, plaintext)
            self._verified(peer, epoch, counter, 1, received.address, now)
            self._settle()
        if opener.calls >= opener.alert or opener.failed:
            self._check_limit(peer, epoch)
        return True

    def _chunks(self, received: Received, views: RecordViews, first: int, count: int, now: float) -> bool:
        """A receive, or one of two, that is a run of chunks: what the functions below do, in one go.

        False for all else; then the first record may be open already.
        """
        segment = views.segment
        prefix, index, counter = FIELDS.unpack_from(views.buffer, first * segment)
        found = self._table.by_index.get(index)
        if found is None or prefix != PREFIX:
            return False
        peer, epoch = found
        opener = epoch.opener
        if now >= epoch.ends or not (mask := opener.run_mask(counter, count)):
            return False
        last = min(segment, received.length - (first + count - 1) * segment) - OVERHEAD
        if not self._joined(peer, epoch, counter, views, first, count, last):
            return False
        opener.calls += count
        opener.data.mark_run(counter >> INDEX_BITS, mask, count)
        self._joiner.finish()
        self._verified(peer, epoch, counter + count - 1, count, received.address, now)
        if opener.calls >= opener.alert:
            self._check_limit(peer, epoch)
        return True

    def _joined(
        self, peer: Peer, epoch: Epoch, counter: int, views: RecordViews, first: int, count: int, last: int
    ) -> bool:
        """Open and join so many records.

        False: they are no superpacket, or one of them is forged, and the functions below handle them one by one.
        """
        joiner, pending = self._joiner, self._joiner.pending
        if len(views.texts) < first + count:
            views.grow(first + count)
        if pending is not None and pending.awaits(epoch, counter, self._plain.mark):
            self._apart = True
            return joiner.go_on(pending, views, first, count, last)
        opened = self._out[: views.segment - OVERHEAD]
        try:
            epoch.opener.decrypt(views.nonces[first], views.texts[first], None, opened)
        except InvalidTag:
            return False  # the others may yet be opened together
        self._apart = True
        if len(opened) > VNET_HEADER and opened[1] != offload.GSO_NONE:
            if self._plain.merger.count:
                self._plain.merger.flush()
            if joiner.begin(peer, epoch, counter, views, first, count, opened, last, self._plain.mark):
                return True
        self._opened = opened
        epoch.opener.calls += 1
        return False

    def _run(self, received: Received, views: RecordViews | None, first: int, count: int, now: float) -> None:
        """Datagrams that follow one another: handshake, or records of which the first tells the epoch."""
        buffer, segment = received.buffer, received.segment
        start = first * segment
        if buffer[start] in HANDSHAKE_TYPES:
            for cut in range(start, start + count * segment, segment):
                datagram = buffer[cut : min(cut + segment, received.length)]
                self._hooks.on_handshake(bytes(datagram), received.address)
            return
        record = buffer[start : min(start + segment, received.length)]
        try:
            index, counter = split_header(record)
        except Refused as refused:
            self._table.drops.count(refused.reason, count)
            return
        found = self._table.by_index.get(index)
        if found is None:
            self._table.drops.count(DropReason.UNKNOWN_INDEX, count)
            return
        peer, epoch = found
        if now >= epoch.ends:
            peer.drops.count(DropReason.EXPIRED, count)
            self._table.expire(peer, now)
            return
        if counter & CONTROL_BIT:
            self._control(peer, epoch, counter, record, received.address, now)
        else:
            self._data(peer, epoch, counter, received, views, first, count, now)
        self._check_limit(peer, epoch)

    def _check_limit(self, peer: Peer, epoch: Epoch) -> None:
        if not epoch.limit_reported and epoch.wants_rekey():
            epoch.limit_reported = True
            self._hooks.on_limit(peer.name, epoch.receive_index)

    def _control(
        self, peer: Peer, epoch: Epoch, counter: int, record: memoryview, address: Address, now: float
    ) -> None:
        out = self._out[self._position :]
        try:
            length = epoch.opener.open(counter, record, out)
        except Refused as refused:
            peer.drops.count(refused.reason)
            return
        payload = bytes(out[:length])
        self._verified(peer, epoch, counter, 1, address, now)
        self._hooks.on_control(peer.name, epoch.receive_index, payload, address)

    def _data(
        self,
        peer: Peer,
        epoch: Epoch,
        counter: int,
        received: Received,
        views: RecordViews | None,
        first: int,
        count: int,
        now: float,
    ) -> None:
        """A run of data records.

        They are opened together where they are a superpacket.  If that fails the rest is opened one by one, so a
        forged datagram costs itself and at most one more AEAD call for each of its neighbours.
        """
        done, good = self._some(peer, epoch, counter, received, views, first, 1 if self._apart else count)
        if done == count:
            if good:
                self._verified(peer, epoch, counter + done - 1, good, received.address, now)
            return
        opened, highest, end = good, counter if good else -1, first + count
        together = not good and not self._apart
        counter, first = counter + done, first + done
        while first < end:
            want = end - first if together else 1
            done, good = self._some(peer, epoch, counter, received, views, first, want)
            together = together and (done > 1 or not good)
            opened += good
            if good:
                highest = counter + done - 1
            counter += done
            first += done
        if opened:
            self._verified(peer, epoch, highest, opened, received.address, now)

    def _some(
        self,
        peer: Peer,
        epoch: Epoch,
        counter: int,
        received: Received,
        views: RecordViews | None,
        first: int,
        count: int,
    ) -> tuple[int, int]:
        """Handle the first record, and all with it if they are a superpacket: (how many, how many verified)."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            return self._place(peer, epoch, counter, received, views, first, count, opened)
        out, segment, length = self._out[self._position :], received.segment, received.length
        start = first * segment
        try:
            size = epoch.opener.decipher(counter, received.buffer[start : min(start + segment, length)], out)
        except Refused as refused:
            peer.drops.count(refused.reason)
            return 1, 0
        return self._place(peer, epoch, counter, received, views, first, count, out[:size])

    def _place(
        self,
        peer: Peer,
        epoch: Epoch,
        counter: int,
        received: Received,
        views: RecordViews | None,
        first: int,
        count: int,
        plaintext: memoryview,
    ) -> tuple[int, int]:
        """The first record is open: pass on what is in it, or all if they are a superpacket; as :meth:`_some`."""
        size, segment = len(plaintext), received.segment
        if size > VNET_HEADER and plaintext[1] != offload.GSO_NONE:
            last = min(segment, received.length - (first + count - 1) * segment) - OVERHEAD
            mark = self._plain.mark
            if count > 1 and self._join(Run(peer, epoch, counter, views, first, count, plaintext, last, mark)):
                return count, count
            if self._join(Run(peer, epoch, counter, views, first, 1, plaintext, size, mark)):
                return 1, 1
        epoch.opener.data.mark(counter)
        self._unpack(peer, plaintext)
        return 1, 1

    def _join(self, run: Run) -> bool:
        """Put chunks where they belong and mark them; False, and nothing done, if they are no good run."""
        opener = run.epoch.opener
        block, mask = run.counter >> INDEX_BITS, ((1 << run.count) - 1) << (run.counter & (BLOCK - 1))
        if not opener.data.run_fresh(block, mask) or not opener.room(run.count - 1):
            return False
        self._plain.write_accepted()
        self._plain.merger.flush()
        if not self._joiner.add(run):
            return False
        opener.calls += run.count - 1
        opener.data.mark_run(block, mask, run.count)
        self._joiner.finish()
        return True

    def _verified(self, peer: Peer, epoch: Epoch, counter: int, records: int, address: Address, now: float) -> None:
        """Tags verified, the last with this counter.  State first, hooks after it: a hook may erase the epoch."""
        peer.last_received = epoch.last_received = now
        peer.received_records += records
        if address is peer.heard and epoch.confirmed:
            return
        newest = address is not peer.heard and self._is_newest(epoch, counter)
        if not epoch.confirmed and peer.epochs.received(epoch, now):
            self._hooks.on_first_record(peer.name, epoch.receive_index, address)
        if newest:
            if peer.should_report(address, now):
                self._hooks.on_new_address(peer.name, epoch.receive_index, address)
            elif address is peer.heard:
                self._connect(address)

    @staticmethod
    def _is_newest(epoch: Epoch, counter: int) -> bool:
        return epoch.opener.window(counter).highest == counter & (CONTROL_BIT - 1)

    def _unpack(self, peer: Peer, plaintext: memoryview) -> None:
        """Take the packets out of one verified data record; from here on its region of the buffer is in use."""
        self._joiner.flush()
        self._position += len(plaintext)
        self._plain.take(peer, plaintext)
