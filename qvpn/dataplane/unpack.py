"""Packets in, one by one: what plain records hold is checked, and written to the TUN in order.

The virtio header and the packet were written by the peer and go to this host's kernel, so nothing passes that is not
whole, allowed as it is, and from an address of the peer's.
"""

from __future__ import annotations

from collections.abc import Sequence

from qvpn.dataplane.clamp import SYN, clamp, is_syn
from qvpn.dataplane.merge import UdpMerger
from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER, Tun
from qvpn.netio.offload import SIMPLE, SIMPLE_IPV4
from qvpn.tunnel import ecn, ip
from qvpn.tunnel.drops import DropReason

_HEAD = 64
"""Bytes of a packet with its virtio header that a look at its addresses and at a TCP flag may need."""

_NO_OFFLOAD = bytes(VNET_HEADER)
_NEXT, _PROTOCOL = VNET_HEADER + 6, VNET_HEADER + 9
"""Where IPv6 and IPv4 say what follows."""


class Unpacker:
    """What is accepted is kept, as views into its record, until :meth:`write_accepted`."""

    def __init__(self, table: PeerTable, tun: Tun) -> None:
        self._table = table
        self._tun = tun
        self.merger = UdpMerger(table, tun, self.write_accepted)
        self.mark = 0
        """ECN bits of this receive's outer headers, where they change inner ones."""
        self.alone = False
        """This receive is one datagram."""
        self._accepted: list[memoryview] = []
        self._peer: Peer | None = None

    def take(self, peer: Peer, plaintext: memoryview) -> None:
        """Take the packets out of one verified data record."""
        if peer is not self._peer:
            self.write_accepted()
            self._peer = peer
        if len(plaintext) <= VNET_HEADER or plaintext[1] != offload.GSO_NONE:  # or a chunk that fits nothing
            peer.drops.count(DropReason.MALFORMED)
        elif not (self._may_have_neighbours(plaintext) and self.merger.add(peer, plaintext, self._accepted)):
            self.merger.flush()
            self._take_each(peer, plaintext)

    def _take_each(self, peer: Peer, plaintext: memoryview) -> None:
        """One or more [virtio header + IP packet], back to back."""
        position, end = 0, len(plaintext)
        while position < end:
            after = self._after_simple(peer, plaintext, position, end)
            if after:
                peer.source_checks += 1
                self._accepted.append(plaintext[position:after])
                position = after
                continue
            inner = position + VNET_HEADER
            length = ip.packet_length(plaintext, inner, end) if inner < end else 0
            if not length or not offload.plain_ok(plaintext, position, length):
                peer.drops.count(DropReason.MALFORMED)
                return
            packet = plaintext[position : inner + length]
            if self._accepts(peer, packet, packet):
                self._accepted.append(packet)
            position = inner + length

    def take_whole(self, peer: Peer, packet: memoryview) -> bool:
        """As :meth:`take` of a record with one packet, while nothing is kept; False, and nothing done: it is not."""
        size, self._peer = len(packet), peer
        if 0 < self._after_simple(peer, packet, 0, size) == size:
            peer.source_checks += 1
            self._accepted.append(packet)
            return True
        head = bytes(packet[:_HEAD])
        if not _is_packet(head, size):
            return False
        if self._accepts(peer, packet, head):
            self._accepted.append(packet)
        return True

    def _after_simple(self, peer: Peer, plaintext: memoryview, position: int, end: int) -> int:
        """Where the packet that begins there ends, if it may go to the TUN as it is; 0: look closer.

        That is nearly all: IPv4 without options, no SYN, from an address of the peer's, no mark to carry in.
        """
        if self.mark or end - position < SIMPLE.size:
            return 0
        virtio, first, _, length, fragment, protocol, source, _, flags = SIMPLE.unpack_from(plaintext, position)
        after: int = position + VNET_HEADER + length
        if first != SIMPLE_IPV4 or length < ip.IPV4_HEADER or after > end:
            return 0
        if (protocol == ip.TCP and flags & SYN) or not offload.simple_ok(virtio, length, fragment):
            return 0
        return after if self._table.allowed.lookup(source) is peer else 0

    def _may_have_neighbours(self, plaintext: memoryview) -> bool:
        """False: nothing to try, as for the one packet of a datagram that came alone."""
        if self.mark or not self._tun.merges_udp:
            return False
        if not self.alone or self.merger.count:
            return True
        return ip.packet_length(plaintext, VNET_HEADER, len(plaintext)) != len(plaintext) - VNET_HEADER

    def _accepts(self, peer: Peer, packet: memoryview, head: memoryview | bytes) -> bool:
        """True if the packet may go to the TUN, as which it is mended then.  ``head``: how it begins."""
        if self.mark and not self._marked(peer, packet):
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
        mark = self.mark
        if mark == ecn.WAITED:
            self.mark = ecn.NOT_ECT
        if ecn.apply(packet, VNET_HEADER, mark):
            return True
        peer.drops.count(ecn.lost(mark))
        return False

    def write_accepted(self) -> None:
        """Write what is kept."""
        self.merger.forget()
        peer, packets = self._peer, self._accepted
        if packets and peer is not None:
            self._accepted = []
            self._write(peer, packets)

    def _write(self, peer: Peer, packets: Sequence[memoryview]) -> None:
        taken = self._tun.write_batch(packets)
        if taken < len(packets):
            peer.tun_refused += len(packets) - taken
            peer.drops.count(DropReason.TUN_FULL, len(packets) - taken)
            packets = packets[:taken]
        peer.tun_writes += taken
        peer.received_packets += taken
        peer.received_bytes += sum(map(len, packets)) - taken * VNET_HEADER


def _is_packet(head: bytes, size: int) -> bool:
    """True if so many bytes, which begin like this, are one plain packet and nothing else."""
    length = size - VNET_HEADER
    if length <= 0 or head[1] != offload.GSO_NONE or ip.packet_length(head, VNET_HEADER, size) != length:
        return False
    return head.startswith(_NO_OFFLOAD) or offload.plain_ok(head, 0, length)
