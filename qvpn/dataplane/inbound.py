"""From the network to the TUN.  Functions stand in the order in which a datagram meets them.

One received buffer may hold many datagrams of one source (UDP GRO), handshake and records mixed: each is classified
by its own first bytes.  Records are opened back to back into one output buffer; only regions whose tag verified are
ever looked at, so what a failed open left behind is overwritten by the next or thrown away.
"""

from __future__ import annotations

from qvpn.dataplane.hooks import PlaneHooks
from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER, Address, Received, Tun
from qvpn.tunnel import ip
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.epoch import Epoch
from qvpn.tunnel.records import CONTROL_BIT, Refused, split_header
from qvpn.tunnel.replay import BLOCK

HANDSHAKE_TYPES = range(1, 7)
OUT_BYTES = 1 << 17
"""Output buffer: one received buffer (at most 64 KiB) always fits."""


class Inbound:
    """Opens records and gives the packets in them to the TUN."""

    def __init__(self, table: PeerTable, tun: Tun, hooks: PlaneHooks) -> None:
        self._table = table
        self._tun = tun
        self._hooks = hooks
        self._out = memoryview(bytearray(OUT_BYTES))
        self._position = 0
        self._packets: list[memoryview] = []
        self._receiver: Peer | None = None

    def process(self, received: Received, now: float) -> None:
        """Handle every datagram of one receive."""
        buffer, segment = received.buffer, received.segment
        if not segment:
            self._table.drops.count(DropReason.TRUNCATED)
            return
        for start in range(0, received.length, segment):
            datagram = buffer[start : min(start + segment, received.length)]
            if datagram[0] in HANDSHAKE_TYPES:
                self._hooks.on_handshake(bytes(datagram), received.address)
            else:
                self._record(datagram, received.address, now)
        self._flush()

    def _record(self, datagram: memoryview, address: Address, now: float) -> None:
        try:
            index, counter = split_header(datagram)
        except Refused as refused:
            self._table.drops.count(refused.reason)
            return
        found = self._table.by_index.get(index)
        if found is None:
            self._table.drops.count(DropReason.UNKNOWN_INDEX)
            return
        peer, epoch = found
        if now >= epoch.ends:
            peer.drops.count(DropReason.EXPIRED)
            self._table.expire(peer, now)
            return
        start = self._position
        try:
            length = epoch.opener.open(counter, datagram, self._out[start:])
        except Refused as refused:
            peer.drops.count(refused.reason)
        else:
            self._opened(peer, epoch, counter, self._out[start : start + length], address, now)
        if not epoch.erased and epoch.wants_rekey() and not epoch.limit_reported:
            epoch.limit_reported = True
            self._hooks.on_limit(peer.name, epoch.receive_index)

    def _opened(
        self, peer: Peer, epoch: Epoch, counter: int, plaintext: memoryview, address: Address, now: float
    ) -> None:
        """The tag verified.  State first, hooks after it: a hook may erase the epoch."""
        peer.last_received = now
        peer.received_records += 1
        newest = epoch.opener.window(counter).highest == counter & (CONTROL_BIT - 1)
        if not counter & CONTROL_BIT:
            self._unpack(peer, counter & (BLOCK - 1), plaintext)
        if peer.epochs.received(epoch, now):
            self._hooks.on_first_record(peer.name, epoch.receive_index)
        if newest and peer.should_report(address, now):
            self._hooks.on_new_address(peer.name, epoch.receive_index, address)
        if counter & CONTROL_BIT:
            self._hooks.on_control(peer.name, epoch.receive_index, bytes(plaintext), address)

    def _unpack(self, peer: Peer, place: int, plaintext: memoryview) -> None:
        """Take the packets out of one verified data record; from here on its region of the buffer is in use."""
        if peer is not self._receiver:
            self._flush_packets()
            self._receiver = peer
        self._position += len(plaintext)
        if len(plaintext) <= VNET_HEADER:
            peer.drops.count(DropReason.MALFORMED)
        elif plaintext[1] == offload.GSO_NONE:
            self._unpack_plain(peer, plaintext)
        else:
            self._unpack_chunk(peer, place, plaintext)

    def _unpack_plain(self, peer: Peer, plaintext: memoryview) -> None:
        """One or more [virtio header + IP packet], back to back."""
        position, end = 0, len(plaintext)
        while position < end:
            inner = position + VNET_HEADER
            length = ip.packet_length(plaintext, inner, end) if inner < end else 0
            if not length or not offload.plain_ok(plaintext, position, length):
                peer.drops.count(DropReason.MALFORMED)
                return
            self._pass_on(peer, plaintext[position : inner + length])
            position = inner + length

    def _unpack_chunk(self, peer: Peer, place: int, plaintext: memoryview) -> None:
        """One chunk of a superpacket becomes a packet of its own."""
        packet = offload.parse_superpacket(plaintext, 0, len(plaintext))
        if packet is None or not offload.chunk_fits(packet, place, len(plaintext)):
            peer.drops.count(DropReason.MALFORMED)
            return
        offload.settle(plaintext, 0, packet, place, len(plaintext) - packet.header)
        self._pass_on(peer, plaintext)

    def _pass_on(self, peer: Peer, packet: memoryview) -> None:
        if self._table.allowed.lookup(ip.source(packet, VNET_HEADER)) is peer:
            self._packets.append(packet)
        else:
            peer.drops.count(DropReason.WRONG_SOURCE)

    def _flush(self) -> None:
        self._flush_packets()
        self._position = 0

    def _flush_packets(self) -> None:
        peer, packets = self._receiver, self._packets
        if not packets or peer is None:
            return
        self._packets = []
        taken = self._tun.write_batch(packets)
        if taken < len(packets):
            peer.drops.count(DropReason.TUN_FULL, len(packets) - taken)
        peer.received_packets += taken
        peer.received_bytes += sum(len(packet) - VNET_HEADER for packet in packets[:taken])
