"""From the TUN to the network.  Functions stand in the order in which a packet meets them.

Packets are read back to back into one arena.  Neighbours for one peer that fit one datagram together become one
plaintext without being copied; nothing ever waits for more to come.  No acceptable epoch: the packet is dropped and
counted, and leaves in no other way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qvpn.dataplane.backlog import Backlog
from qvpn.dataplane.chunks import ChunkSealer, blocks
from qvpn.dataplane.clamp import SYN, clamp, is_syn, may_be_tcp
from qvpn.dataplane.hooks import PlaneHooks
from qvpn.dataplane.oversize import Oversize, datagrams
from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.netio import offload
from qvpn.netio.base import MAX_READ, VNET_HEADER, Bind, Tun
from qvpn.netio.offload import Superpacket
from qvpn.tunnel import ecn, ip
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.epoch import Epoch
from qvpn.tunnel.records import OVERHEAD, Refused
from qvpn.tunnel.replay import BLOCK

READ_LIMIT = 256
"""Packets per callback: then the other direction has its turn."""

SUPERPACKETS = 8
"""Superpackets per callback, likewise."""

WORTH_COMPARING = 4
"""Packets of one length for which one comparison of all is cheaper than a look-up for each."""

ARENA_BYTES = 4 * MAX_READ
OUT_BYTES = ARENA_BYTES + BLOCK * OVERHEAD
"""Records of one block: its plaintexts stand in the arena; chunks repeat a header of at most ``MAX_HEADER``."""


@dataclass(slots=True)
class _Plaintext:
    """Packets that follow one another in the arena and share one record."""

    start: int
    end: int
    ecn: int
    """ECN bits of each of them, and of the record's outer header."""
    packets: int = 1


@dataclass(slots=True)
class _Load:
    """What one batch has for one peer."""

    peer: Peer
    plaintexts: list[_Plaintext] = field(default_factory=list)

    def extend(self, start: int, size: int, count: int) -> None:
        """Add so many packets of this size, back to back behind the last one and routed as that."""
        last, room = self.plaintexts[-1], self.peer.max_plaintext
        while count:
            many = min(count, max(0, (room - (start - last.start)) // size))
            if many:
                last.end += many * size
                last.packets += many
            else:
                many = 1
                last = _Plaintext(start, start + size, last.ecn)
                self.plaintexts.append(last)
            start += many * size
            count -= many


class Outbound:
    """Seals packets from the TUN and gives the records to the network."""

    def __init__(
        self,
        table: PeerTable,
        tun: Tun,
        bind: Bind,
        hooks: PlaneHooks,
        detour: Callable[[memoryview], bool] | None = None,
        *,
        answers: Tun | None = None,
    ) -> None:
        """``detour`` may take what cannot be sealed here: packets back to back, each with its virtio header.

        ``answers`` (default: ``tun``): where senders are told that a packet is too long.
        """
        self._table = table
        self._detour = detour
        self._tun = tun
        self._bind = bind
        self._hooks = hooks
        self._arena = memoryview(bytearray(ARENA_BYTES))
        self._out = memoryview(bytearray(OUT_BYTES))
        self._chunks = ChunkSealer(self._arena, memoryview(bytearray(OUT_BYTES)))
        self._oversize = Oversize(answers or tun)
        self.backlog = Backlog(tun, table.drops)
        """What waits because one turn did not empty the TUN; then :meth:`pump` must be called again."""
        self.waiting = self.backlog.queue

    def pump(self, now: float, limit: int = READ_LIMIT) -> int:
        """Handle what waits, up to the budget and so many packets; returns how many there were."""
        total, behind = 0, self.waiting.packets
        if behind:
            self.backlog.fill(now)
        for _ in range(SUPERPACKETS):
            count, more = self._pump_once(limit - total, now)
            total += count
            if not more or total >= limit:
                return total
        if not behind:
            self.backlog.fill(now)
        return total

    def pump_one(self, now: float) -> int:
        """Handle one packet of the TUN, while nothing waits here; returns how many there were."""
        batch = self._tun.read_batch(self._arena, 1)
        if not batch:
            return 0
        ((_, length),) = batch
        (self._send_lone if self._arena[1] == offload.GSO_NONE else self._send_superpacket)(length, now)
        return 1

    def _pump_once(self, limit: int, now: float) -> tuple[int, bool]:
        """One batch of reads, of which only the last can be a superpacket; True if there may be more."""
        arena, behind = self._arena, self.waiting.packets > 0
        batch = self.backlog.read_batch(arena, limit, now) if behind else self._tun.read_batch(arena, limit)
        if not batch:
            return 0, False
        last, length = batch[-1]
        big = arena[last + 1] != offload.GSO_NONE
        if not last:
            (self._send_superpacket if big else self._send_lone)(length, now)
            return 1, big or behind
        loads: dict[Peer, _Load] = {}
        self._route_batch(loads, batch[:-1] if big else batch)
        for load in loads.values():
            self._send(load, now)
        if big:
            arena[:length] = arena[last : last + length]
            self._send_superpacket(length, now)
        return len(batch), big or behind

    def _send_lone(self, length: int, now: float) -> None:
        """A packet that waited alone, at the start of the arena: as :meth:`_route` and :meth:`_send`, in one go."""
        arena = self._arena
        found = self._simple(0, length) or self._other(0, length)
        if found is None:
            self._table.drops.count(DropReason.MALFORMED)
            return
        destination, bits, may_be_syn = found
        peer = self._table.allowed.lookup(destination)
        if peer is None:
            self._table.drops.count(DropReason.NO_ROUTE)
            return
        if may_be_syn and is_syn(arena, VNET_HEADER, length):
            clamp(arena, 0, length, peer.inner_mtu)
        epoch = peer.epochs.sending(now) or self._table.sending(peer, now)
        if epoch is None or peer.endpoint is None:
            self._unsealable(peer, epoch, 0, length, 1)
            return
        if length > peer.max_plaintext:
            self._send_single(peer, epoch, arena[:length], now)
        else:
            self._seal_one(peer, epoch, arena[:length], 1, bits, now)
        if epoch.sealer.calls >= epoch.sealer.alert:
            self._check_limit(peer, epoch)

    def _simple(self, start: int, end: int) -> tuple[bytes, int, bool] | None:
        """(destination, ECN bits, may be a SYN) of a packet of IPv4 without options; None: look closer."""
        if end - start < offload.SIMPLE.size:
            return None
        _, first, tos, length, _, protocol, _, destination, flags = offload.SIMPLE.unpack_from(self._arena, start)
        if first != offload.SIMPLE_IPV4 or length != end - start - VNET_HEADER:
            return None
        return destination, tos & ecn.MASK, protocol == ip.TCP and flags & SYN != 0

    def _seal_one(self, peer: Peer, epoch: Epoch, plaintext: memoryview, packets: int, bits: int, now: float) -> None:
        """Seal and send one record with so many packets, whose ECN bits these are."""
        try:
            record = epoch.sealer.seal_one(plaintext, self._out)
        except Refused as refused:
            peer.drops.count(refused.reason, packets)
            return
        if peer.endpoint is not None and self._bind.send_segments(record, len(record), peer.endpoint, bits):
            peer.count_sent(1, packets, len(plaintext), now)
        else:
            peer.drops.count(DropReason.SEND_FAILED, packets)
            peer.measure_path(self._bind)

    def _route_batch(self, loads: dict[Peer, _Load], batch: list[tuple[int, int]]) -> None:
        """Packets of one length are most often of one flow, so neighbours are compared before they are looked up."""
        first, count = 0, len(batch)
        while first < count:
            start, size = batch[first]
            last = first + 1
            while last < count and batch[last][1] == size:
                last += 1
            many = last - first
            load = self._route(loads, start, start + size)
            if load is not None and many >= WORTH_COMPARING and _alike(self._arena, start, size, many):
                load.extend(start + size, size, many - 1)
            else:
                for start, _ in batch[first + 1 : last]:
                    self._route(loads, start, start + size)
            first = last

    def _route(self, loads: dict[Peer, _Load], start: int, end: int) -> _Load | None:
        """Pick the peer by destination, and join the packet to the one before it where both fit; None: dropped."""
        arena = self._arena
        found = self._simple(start, end) or self._other(start, end)
        if found is None:
            self._table.drops.count(DropReason.MALFORMED)
            return None
        destination, bits, may_be_syn = found
        peer = self._table.allowed.lookup(destination)
        if peer is None:
            self._table.drops.count(DropReason.NO_ROUTE)
            return None
        if may_be_syn and is_syn(arena, start + VNET_HEADER, end):
            clamp(arena, start, end, peer.inner_mtu)
        load = loads.get(peer)
        if load is None:
            load = loads[peer] = _Load(peer)
        last = load.plaintexts[-1] if load.plaintexts else None
        if last is not None and last.end == start and last.ecn == bits and end - last.start <= peer.max_plaintext:
            last.end = end
            last.packets += 1
        else:
            load.plaintexts.append(_Plaintext(start, end, bits))
        return load

    def _other(self, start: int, end: int) -> tuple[bytes, int, bool] | None:
        """As :meth:`_simple` of any packet; None: malformed."""
        arena, inner = self._arena, start + VNET_HEADER
        if not 0 < end - inner == ip.packet_length(arena, inner, end):
            return None
        may_be_tcp = arena[inner + 9] == ip.TCP or arena[inner + 6] == ip.TCP
        return ip.destination(arena, inner), ecn.field(arena, inner), may_be_tcp

    def _send(self, load: _Load, now: float) -> None:
        peer, plaintexts = load.peer, load.plaintexts
        epoch = peer.epochs.sending(now) or self._table.sending(peer, now)
        if epoch is None or peer.endpoint is None:
            for plaintext in plaintexts:
                self._unsealable(peer, epoch, plaintext.start, plaintext.end, plaintext.packets)
            return
        fitting = [plaintext for plaintext in plaintexts if plaintext.end - plaintext.start <= peer.max_plaintext]
        if len(fitting) < len(plaintexts):
            self._send_oversize(peer, epoch, [p for p in plaintexts if p.end - p.start > peer.max_plaintext], now)
        if len(fitting) == 1:
            (only,) = fitting
            self._seal_one(peer, epoch, self._arena[only.start : only.end], only.packets, only.ecn, now)
        else:
            for first in range(0, len(fitting), BLOCK):
                self._send_block(peer, epoch, fitting[first : first + BLOCK], now)
        if epoch.sealer.calls >= epoch.sealer.alert:
            self._check_limit(peer, epoch)

    def _send_oversize(self, peer: Peer, epoch: Epoch, plaintexts: list[_Plaintext], now: float) -> None:
        for plaintext in plaintexts:
            self._send_single(peer, epoch, self._arena[plaintext.start : plaintext.end], now)

    def _send_single(self, peer: Peer, epoch: Epoch, packet: memoryview, now: float) -> None:
        """Send one plain packet that may be longer than the path carries, in what becomes of it then."""
        instead, cut_outside = [packet], False
        if len(packet) > peer.max_plaintext:
            instead, cut_outside = self._oversize.take(peer, packet, now)
        for part in instead:
            try:
                length = epoch.sealer.seal_batch([part], self._out)[0]
            except Refused as refused:
                peer.drops.count(refused.reason)
                continue
            if cut_outside and peer.endpoint is not None:
                sent = self._bind.send_fragmentable([self._out[:length]], peer.endpoint)
            else:
                sent = self._send_run(peer, self._out[:length], length, ecn.field(part, VNET_HEADER))
            if sent:
                peer.count_sent(1, 1, len(part), now)
            else:
                peer.drops.count(DropReason.SEND_FAILED)

    def _send_block(self, peer: Peer, epoch: Epoch, plaintexts: list[_Plaintext], now: float) -> None:
        """Seal one block of records, and send each run of equal length and ECN bits at once."""
        try:
            lengths = epoch.sealer.seal_batch([self._arena[p.start : p.end] for p in plaintexts], self._out)
        except Refused as refused:
            peer.drops.count(refused.reason, sum(plaintext.packets for plaintext in plaintexts))
            return
        position = first = 0
        for count in equal_runs(lengths, [plaintext.ecn for plaintext in plaintexts]):
            size = sum(lengths[first : first + count])
            records = self._out[position : position + size]
            sent = self._send_run(peer, records, lengths[first], plaintexts[first].ecn)
            self._account(peer, plaintexts[first : first + count], sent, now)
            position += size
            first += count

    def _send_superpacket(self, length: int, now: float) -> None:
        """Send the superpacket at the start of the arena as chunks."""
        arena = self._arena
        found = offload.addressed(arena, length)
        if found is None or found[0].header + found[0].payload != length:
            self._table.drops.count(DropReason.MALFORMED)
            return
        packet, _, destination = found
        chunks = packet.chunks
        peer = self._table.allowed.lookup(destination)
        if peer is None:
            self._table.drops.count(DropReason.NO_ROUTE, chunks)
            return
        epoch = peer.epochs.sending(now) or self._table.sending(peer, now)
        if epoch is None or peer.endpoint is None:
            self._unsealable(peer, epoch, 0, length, chunks)
            return
        if packet.segment > peer.max_plaintext - packet.header:
            fitting = self._fit(peer, packet)
            if fitting is None:
                for part in datagrams(arena, packet):
                    self._send_single(peer, epoch, part, now)
                return
            packet, chunks = fitting, fitting.chunks
        if chunks <= BLOCK:
            self._send_chunks(peer, epoch, packet, chunks, bytes(arena[: packet.header]), now)
        else:
            self._send_blocks(peer, epoch, packet, now)
        if epoch.sealer.calls >= epoch.sealer.alert:
            self._check_limit(peer, epoch)

    def _unsealable(self, peer: Peer, epoch: Epoch | None, start: int, end: int, packets: int) -> None:
        """No key or no address: another way, or none."""
        if self._detour is None or not self._detour(self._arena[start:end]):
            peer.drops.count(DropReason.NO_KEY if epoch is None else DropReason.NO_ENDPOINT, packets)

    def _fit(self, peer: Peer, packet: Superpacket) -> Superpacket | None:
        """The superpacket as the path can carry it: TCP may be cut smaller, UDP's datagrams may not."""
        room = peer.max_plaintext - packet.header
        if min(packet.segment, packet.payload) <= room:
            return packet
        if packet.protocol != ip.TCP or room < 1:
            return None
        return offload.narrow(self._arena, 0, packet, room)

    def _send_chunks(
        self, peer: Peer, epoch: Epoch, packet: Superpacket, chunks: int, head: bytes, now: float
    ) -> None:
        """``head``: the superpacket's header; ``chunks``: how many it has, at most a block."""
        try:
            records, segment = self._chunks.seal(epoch.sealer, packet, chunks, head)
        except Refused as refused:
            peer.drops.count(refused.reason, chunks)
            return
        endpoint, bits = peer.endpoint, ecn.field(head, VNET_HEADER)
        sent = self._bind.send_segments(records, segment, endpoint, bits) if endpoint is not None else 0
        if sent:
            payload = packet.payload if sent == chunks else sent * packet.segment
            peer.count_sent(sent, sent, payload + sent * packet.header, now)
        if sent < chunks:
            peer.drops.count(DropReason.SEND_FAILED, chunks - sent)
            peer.measure_path(self._bind)

    def _send_blocks(self, peer: Peer, epoch: Epoch, packet: Superpacket, now: float) -> None:
        """More than 64 chunks: several superpackets, each moved to the start of the arena."""
        arena = self._arena
        step = BLOCK * packet.segment
        for number, (part, head) in enumerate(blocks(arena, packet)):
            start = packet.header + number * step
            arena[packet.header : packet.header + part.payload] = arena[start : start + part.payload]
            arena[: packet.header] = head
            if part.chunks > 1:
                self._send_chunks(peer, epoch, part, part.chunks, head, now)
            else:
                bits = ecn.field(arena, VNET_HEADER)
                self._send_block(peer, epoch, [_Plaintext(0, packet.header + part.payload, bits)], now)

    def _send_run(self, peer: Peer, run: memoryview, segment: int, bits: int) -> int:
        endpoint = peer.endpoint
        return self._bind.send_segments(run, segment, endpoint, bits) if endpoint is not None else 0

    def _account(self, peer: Peer, plaintexts: list[_Plaintext], sent: int, now: float) -> None:
        if sent:
            done = plaintexts[:sent]
            size = sum(plaintext.end - plaintext.start for plaintext in done)
            peer.count_sent(sent, sum(plaintext.packets for plaintext in done), size, now)
        if sent < len(plaintexts):
            peer.drops.count(DropReason.SEND_FAILED, sum(plaintext.packets for plaintext in plaintexts[sent:]))
            peer.measure_path(self._bind)

    def _check_limit(self, peer: Peer, epoch: Epoch) -> None:
        if not epoch.limit_reported and epoch.wants_rekey():
            epoch.limit_reported = True
            self._hooks.on_limit(peer.name, epoch.receive_index)


def _alike(data: memoryview, start: int, size: int, count: int) -> bool:
    """True if packets of one size agree in version, length, ECN bits, destination and a protocol that is not TCP.

    Then one look-up does for all, and none has a segment size to clamp.
    """
    if may_be_tcp(data, start + VNET_HEADER):
        return False
    four = data[start + VNET_HEADER] >> 4 == 4
    for at, length in ((10, 4), (19, 1), (26, 4)) if four else ((10, 2), (14, 3), (34, 16)):
        wanted = bytes(data[start + at : start + at + length])
        if np.ndarray((count, length), np.uint8, data, start + at, (size, 1)).tobytes() != wanted * count:
            return False
    return True


def equal_runs(lengths: list[int], marks: list[int]) -> list[int]:
    """Split lengths into runs that one segmented send can carry: equal ones, and one shorter to end the run.

    ``marks`` has the ECN bits of each, which are equal within a run.
    """
    runs: list[int] = []
    first, count = 0, len(lengths)
    while first < count:
        last, mark = first + 1, marks[first]
        while last < count and lengths[last] == lengths[first] and marks[last] == mark:
            last += 1
        if last < count and lengths[last] < lengths[first] and marks[last] == mark:
            last += 1
        runs.append(last - first)
        first = last
    return runs
