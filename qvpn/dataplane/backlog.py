"""Packets that came from the TUN faster than they are sealed, each in memory of its own, in the order of
:class:`~qvpn.dataplane.flowqueue.FlowQueue`.

The kernel's queue before a TUN has no order but that of arrival and no bound but a number of packets, which may be
superpackets of 64 KiB.  So when a turn did not empty it, all of it is read, and waits here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qvpn.dataplane.flowqueue import FlowQueue
from qvpn.netio import offload
from qvpn.netio.base import MAX_READ, VNET_HEADER, Tun
from qvpn.tunnel import ecn, ip
from qvpn.tunnel.drops import DropReason, Drops

INTAKE = 64
"""Packets read in one turn: reading one takes a fifth of the time that sealing it does."""

KEPT = 32
"""Buffers kept for the next backlog."""


@dataclass(slots=True, eq=False)
class Held:
    """One packet behind its virtio header."""

    memory: memoryview
    length: int


class Backlog:
    """Reads ahead, and hands out what is next."""

    def __init__(self, tun: Tun, drops: Drops) -> None:
        self._tun = tun
        self._drops = drops
        self.queue: FlowQueue[Held] = FlowQueue(self._dropped)
        self._free: list[memoryview] = []

    def __len__(self) -> int:
        return len(self.queue)

    def fill(self, now: float) -> None:
        """Read what waits in the TUN, up to the budget."""
        for _ in range(INTAKE):
            memory = self._free.pop() if self._free else memoryview(bytearray(MAX_READ))
            batch = self._tun.read_batch(memory, 1)
            if not batch:
                self._release(memory)
                return
            # One read may bring several where lanes hand packets over.
            if len(batch) == 1 and batch[0][1] > MAX_READ // 2:
                self._put(Held(memory, batch[0][1]), now)
                continue
            for start, length in batch:  # small ones do not keep large buffers
                self._put(Held(memoryview(bytearray(memory[start : start + length])), length), now)
            self._release(memory)

    def read_batch(self, arena: memoryview, limit: int, now: float) -> list[tuple[int, int]]:
        """As :meth:`~qvpn.netio.base.Tun.read_batch`, of what is next; marked CE where it waited too long."""
        batch: list[tuple[int, int]] = []
        position, last = 0, len(arena) - MAX_READ
        while position <= last and len(batch) < limit and (waiting := self.queue.take(now)) is not None:
            held = waiting.packet
            length, place = held.length, arena[position:]
            place[:length] = held.memory[:length]
            self._release(held.memory)
            if waiting.marked:
                ecn.apply(place, VNET_HEADER, ecn.CE)
            batch.append((position, length))
            if place[1] != offload.GSO_NONE:
                break
            position += length
        return batch

    def _put(self, held: Held, now: float) -> None:
        head, length = held.memory, held.length
        if length < VNET_HEADER + ip.IPV4_HEADER:
            self._drops.count(DropReason.MALFORMED)
            return
        markable = ecn.field(head, VNET_HEADER) != ecn.NOT_ECT
        self.queue.put(flow_key(head, VNET_HEADER, length), held, length, now, markable=markable)

    def _dropped(self, held: Held, full: bool) -> None:
        reason = DropReason.QUEUE_FULL if full else DropReason.SEND_QUEUE
        self._drops.count(reason, packets_in(held.memory, held.length))
        self._release(held.memory)

    def _release(self, memory: memoryview) -> None:
        if len(memory) == MAX_READ and len(self._free) < KEPT:
            self._free.append(memory)


def flow_key(data: memoryview, start: int, end: int) -> bytes:
    """Addresses, protocol and ports of the IP packet at ``start``, which has at least 20 bytes.

    Without ports for fragments, and where extension headers stand before them.
    """
    if data[start] == 0x45 and end - start >= 24:  # as nearly always
        head = bytes(data[start : start + 24])
        whole = head[9] in (ip.TCP, ip.UDP) and not (head[6] & 0x3F or head[7])
        return head[9:10] + head[12 : 24 if whole else 20]
    if data[start] >> 4 == 4:
        protocol, ports = data[start + 9], start + ip.header_length(data, start)
        key = bytes(data[start + 9 : start + 10]) + bytes(data[start + 12 : start + 20])
    else:
        protocol, ports = data[start + 6], start + ip.IPV6_HEADER
        key = bytes(data[start + 6 : start + 7]) + bytes(data[start + 8 : min(start + 40, end)])
    if protocol not in (ip.TCP, ip.UDP) or ports + 4 > end or ip.is_fragment(data, start):
        return key
    return key + bytes(data[ports : ports + 4])


def packets_in(data: memoryview, length: int) -> int:
    """How many packets the kernel would make of this one."""
    packet = offload.parse_superpacket(data, 0, length) if data[1] != offload.GSO_NONE else None
    return 1 if packet is None else packet.chunks
