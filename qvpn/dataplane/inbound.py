"""From the network to the TUN.  Functions stand in the order in which a datagram meets them.

One received buffer may hold many datagrams of one source (UDP GRO), handshake and records mixed: each is classified
by its own first bytes.  Records are opened back to back into one output buffer; only regions whose tag verified are
ever looked at, so what a failed open left behind is overwritten by the next or thrown away.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag

from qvpn.dataplane.clamp import clamp, is_syn
from qvpn.dataplane.hooks import PlaneHooks
from qvpn.dataplane.merge import UdpMerger
from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.dataplane.runs import Run, RunJoiner
from qvpn.dataplane.views import RecordViews, ViewCache
from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER, Address, Received, Tun
from qvpn.tunnel import ecn, ip
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.epoch import Epoch
from qvpn.tunnel.records import CONTROL_BIT, FIELDS, OVERHEAD, PREFIX, Refused, split_header
from qvpn.tunnel.replay import BLOCK, INDEX_BITS

HANDSHAKE_TYPES = range(1, 7)
_HEAD = 64
"""Bytes of a packet with its virtio header that a look at its addresses and at a TCP flag may need."""

_NO_OFFLOAD = bytes(VNET_HEADER)
_NEXT, _PROTOCOL = VNET_HEADER + 6, VNET_HEADER + 9
"""Where IPv6 and IPv4 say what follows."""

OUT_BYTES = 1 << 17
"""Output buffer: one received buffer (at most 64 KiB) always fits."""


class Inbound:
    """Opens records and gives the packets in them to the TUN."""

    def __init__(
        self, table: PeerTable, tun: Tun, hooks: PlaneHooks, connect: Callable[[Address], None] = lambda address: None
    ) -> None:
        """``connect`` is told by which of the ways to a peer's endpoint his records come, whenever that changes."""
        self._table = table
        self._tun = tun
        self._hooks = hooks
        self._connect = connect
        self._joiner = RunJoiner(table, tun)
        self._views = ViewCache()
        self._merger = UdpMerger(table, tun, self._flush_packets)
        self._alone = False
        """This receive is one datagram."""
        self._apart = False
        """This receive is no superpacket as a whole: its records are handled one by one."""
        self._opened: memoryview | None = None
        """Its first record, if that is open already."""
        self._out = memoryview(bytearray(OUT_BYTES))
        self._position = 0
        self._packets: list[memoryview] = []
        self._receiver: Peer | None = None
        self._mark = 0
        """ECN bits of this receive's outer headers, where they change inner ones."""

    def process(self, received: Received, now: float) -> None:
        """Handle every datagram of one receive.  A superpacket may stay pending until :meth:`flush`."""
        if not received.segment:
            self._table.drops.count(DropReason.TRUNCATED)
            return
        segment, length = received.segment, received.length
        self._mark = ecn.changes(received.ecn) if received.ecn else ecn.NOT_ECT
        self._alone, self._apart, self._opened = length <= segment, False, None
        if self._alone:
            if length >= OVERHEAD and self._lone(received, now):
                return
            self._run(received, None, 0, 1, now)
        elif segment < OVERHEAD:
            for place in range(-(-length // segment)):
                self._run(received, None, place, 1, now)
        elif self._many(received, now):
            return
        self._flush_packets()
        self._position = 0

    def _many(self, received: Received, now: float) -> bool:
        """Several datagrams of the length of a record at least; True: nothing that was in them waits."""
        views = self._views.of(received.buffer, received.segment)
        count, tail = divmod(received.length, received.segment)
        whole = count + (tail >= OVERHEAD)
        short = 0 < tail < OVERHEAD
        if views.is_run(whole):
            if not short and self._chunks(received, views, whole, now):
                return True
            self._run(received, views, 0, whole, now)
        else:
            for first, many in views.split(whole):
                self._run(received, views, first, many, now)
        if short:
            self._run(received, None, count, 1, now)
        return False

    @property
    def pending(self) -> bool:
        """A superpacket waits for more of it, or for :meth:`flush`."""
        return self._joiner.pending is not None or self._merger.count > 0

    def flush(self) -> None:
        """Nothing more waits: write what is still pending."""
        if self._joiner.pending is not None:
            self._joiner.flush()
        if self._merger.count:
            self._merger.flush()

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
        if now >= epoch.ends or self._joiner.pending is not None or self._merger.count:
            return False
        opener = epoch.opener
        try:
            size = opener.decipher(counter, buffer[:length], self._out)
        except Refused as refused:
            peer.drops.count(refused.reason)
        else:
            plaintext, head = self._out[:size], bytes(self._out[:_HEAD])
            whole = _is_packet(head, size)
            if whole:
                opener.data.mark(counter)
                whole = self._accepts(peer, plaintext, head)
            else:
                self._place(peer, epoch, counter, received, None, 0, 1, plaintext)
            self._verified(peer, epoch, counter, 1, received.address, now)
            if whole:
                self._write(peer, [plaintext])
            elif self._packets:
                self._flush_packets()
            self._position = 0
        if opener.calls >= opener.alert or opener.failed:
            self._check_limit(peer, epoch)
        return True

    def _chunks(self, received: Received, views: RecordViews, count: int, now: float) -> bool:
        """A receive that is one run of chunks: what the functions below do, in one go.

        False for all else; then the first record may be open already.
        """
        prefix, index, counter = FIELDS.unpack_from(views.buffer)
        found = self._table.by_index.get(index)
        if found is None or prefix != PREFIX:
            return False
        peer, epoch = found
        opener = epoch.opener
        if now >= epoch.ends or not (mask := opener.run_mask(counter, count)):
            return False
        last = min(views.segment, received.length - (count - 1) * views.segment) - OVERHEAD
        if not self._joined(peer, epoch, counter, views, count, last):
            return False
        opener.calls += count
        opener.data.mark_run(counter >> INDEX_BITS, mask, count)
        self._joiner.finish()
        self._verified(peer, epoch, counter + count - 1, count, received.address, now)
        if opener.calls >= opener.alert:
            self._check_limit(peer, epoch)
        return True

    def _joined(self, peer: Peer, epoch: Epoch, counter: int, views: RecordViews, count: int, last: int) -> bool:
        """Open and join a whole receive.

        False: they are no superpacket, or one of them is forged, and the functions below handle them one by one.
        """
        joiner, pending = self._joiner, self._joiner.pending
        if len(views.texts) < count:
            views.grow(count)
        if pending is not None and pending.awaits(epoch, counter, self._mark):
            self._apart = True
            return joiner.go_on(pending, views, count, last)
        first = self._out[: views.segment - OVERHEAD]
        try:
            epoch.opener.decrypt(views.nonces[0], views.texts[0], None, first)
        except InvalidTag:
            return False  # the others may yet be opened together
        self._apart = True
        if len(first) > VNET_HEADER and first[1] != offload.GSO_NONE:
            if self._merger.count:
                self._merger.flush()
            if joiner.begin(peer, epoch, counter, views, count, first, last, self._mark):
                return True
        self._opened = first
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
            if count > 1 and self._join(Run(peer, epoch, counter, views, first, count, plaintext, last, self._mark)):
                return count, count
            if self._join(Run(peer, epoch, counter, views, first, 1, plaintext, size, self._mark)):
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
        self._flush_packets()
        self._merger.flush()
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
        if peer is not self._receiver:
            self._flush_packets()
            self._receiver = peer
        self._position += len(plaintext)
        if len(plaintext) <= VNET_HEADER:
            peer.drops.count(DropReason.MALFORMED)
        elif plaintext[1] == offload.GSO_NONE:
            self._unpack_plain(peer, plaintext)
        else:  # a chunk that the joiner did not take
            peer.drops.count(DropReason.MALFORMED)

    def _unpack_plain(self, peer: Peer, plaintext: memoryview) -> None:
        """One or more [virtio header + IP packet], back to back."""
        position, end = 0, len(plaintext)
        if self._may_have_neighbours(plaintext) and self._merger.add(peer, plaintext, self._packets):
            return
        self._merger.flush()
        while position < end:
            inner = position + VNET_HEADER
            length = ip.packet_length(plaintext, inner, end) if inner < end else 0
            if not length or not offload.plain_ok(plaintext, position, length):
                peer.drops.count(DropReason.MALFORMED)
                return
            packet = plaintext[position : inner + length]
            if self._accepts(peer, packet, packet):
                self._packets.append(packet)
            position = inner + length

    def _may_have_neighbours(self, plaintext: memoryview) -> bool:
        """False: nothing to try, as for the one packet of a datagram that came alone."""
        if self._mark or not self._tun.merges_udp:
            return False
        if not self._alone or self._merger.count:
            return True
        return ip.packet_length(plaintext, VNET_HEADER, len(plaintext)) != len(plaintext) - VNET_HEADER

    def _accepts(self, peer: Peer, packet: memoryview, head: memoryview | bytes) -> bool:
        """True if the packet may go to the TUN, as which it is mended then.  ``head``: how it begins."""
        if self._mark and not self._marked(peer, packet):
            return False
        if self._table.allowed.lookup(ip.source(head, VNET_HEADER)) is not peer:
            peer.drops.count(DropReason.WRONG_SOURCE)
            return False
        peer.source_checks += 1
        if (head[_PROTOCOL] == ip.TCP or head[_NEXT] == ip.TCP) and is_syn(head, VNET_HEADER, len(packet)):
            clamp(packet, 0, len(packet), peer.inner_mtu)
        return True

    def _marked(self, peer: Peer, packet: memoryview) -> bool:
        """Give the packet the receive's mark; False: dropped.  Our own queue's is for one packet only."""
        mark = self._mark
        if mark == ecn.WAITED:
            self._mark = ecn.NOT_ECT
        if ecn.apply(packet, VNET_HEADER, mark):
            return True
        peer.drops.count(ecn.lost(mark))
        return False

    def _flush_packets(self) -> None:
        self._merger.forget()
        peer, packets = self._receiver, self._packets
        if packets and peer is not None:
            self._packets = []
            self._write(peer, packets)

    def _write(self, peer: Peer, packets: list[memoryview]) -> None:
        taken = self._tun.write_batch(packets)
        if taken < len(packets):
            peer.tun_refused += len(packets) - taken
            peer.drops.count(DropReason.TUN_FULL, len(packets) - taken)
        peer.tun_writes += taken
        peer.received_packets += taken
        peer.received_bytes += sum(map(len, packets[:taken])) - taken * VNET_HEADER


def _is_packet(head: bytes, size: int) -> bool:
    """True if so many bytes, which begin like this, are one plain packet and nothing else."""
    length = size - VNET_HEADER
    if length <= 0 or head[1] != offload.GSO_NONE or ip.packet_length(head, VNET_HEADER, size) != length:
        return False
    return head.startswith(_NO_OFFLOAD) or offload.plain_ok(head, 0, length)
