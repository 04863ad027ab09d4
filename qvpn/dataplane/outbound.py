"""From the TUN to the network.  Functions stand in the order in which a packet meets them.

Packets are read back to back into one arena.  Neighbours for one peer that fit one datagram together become one
plaintext without being copied; nothing ever waits for more to come.  No acceptable epoch: the packet is dropped and
counted, and leaves in no other way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qvpn.dataplane.hooks import PlaneHooks
from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.netio.base import MAX_READ, VNET_HEADER, Bind, Tun
from qvpn.tunnel import ip
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.epoch import Epoch
from qvpn.tunnel.records import OVERHEAD, Refused
from qvpn.tunnel.replay import BLOCK

READ_LIMIT = 256
"""Packets per callback: then the other direction has its turn."""

ARENA_BYTES = 4 * MAX_READ


@dataclass(slots=True)
class _Plaintext:
    """Packets that follow one another in the arena and share one record."""

    start: int
    end: int
    packets: int = 1


@dataclass(slots=True)
class _Load:
    """What one batch has for one peer."""

    peer: Peer
    plaintexts: list[_Plaintext] = field(default_factory=list)


class Outbound:
    """Seals packets from the TUN and gives the records to the network."""

    def __init__(self, table: PeerTable, tun: Tun, bind: Bind, hooks: PlaneHooks) -> None:
        self._table = table
        self._tun = tun
        self._bind = bind
        self._hooks = hooks
        self._arena = memoryview(bytearray(ARENA_BYTES))
        self._out = memoryview(bytearray(ARENA_BYTES + BLOCK * OVERHEAD))

    def pump(self, now: float) -> int:
        """Handle one batch of packets; returns how many there were."""
        batch = self._tun.read_batch(self._arena, READ_LIMIT)
        loads: dict[Peer, _Load] = {}
        for start, length in batch:
            self._route(loads, start, start + length)
        for load in loads.values():
            self._send(load, now)
        return len(batch)

    def _route(self, loads: dict[Peer, _Load], start: int, end: int) -> None:
        """Pick the peer by destination, and join the packet to the one before it where both fit."""
        arena = self._arena
        inner = start + VNET_HEADER
        if arena[start + 1] or ip.packet_length(arena, inner, end) != end - inner:
            self._table.drops.count(DropReason.MALFORMED)
            return
        peer = self._table.allowed.lookup(ip.destination(arena, inner))
        if peer is None:
            self._table.drops.count(DropReason.NO_ROUTE)
            return
        load = loads.get(peer)
        if load is None:
            load = loads[peer] = _Load(peer)
        last = load.plaintexts[-1] if load.plaintexts else None
        if last is not None and last.end == start and end - last.start <= peer.max_plaintext:
            last.end = end
            last.packets += 1
        else:
            load.plaintexts.append(_Plaintext(start, end))

    def _send(self, load: _Load, now: float) -> None:
        peer, plaintexts = load.peer, load.plaintexts
        epoch = self._table.sending(peer, now)
        if epoch is None or peer.endpoint is None:
            reason = DropReason.NO_KEY if epoch is None else DropReason.NO_ENDPOINT
            peer.drops.count(reason, sum(plaintext.packets for plaintext in plaintexts))
            return
        fitting = [plaintext for plaintext in plaintexts if plaintext.end - plaintext.start <= peer.max_plaintext]
        if len(fitting) < len(plaintexts):
            peer.drops.count(DropReason.TOO_BIG, len(plaintexts) - len(fitting))
        for first in range(0, len(fitting), BLOCK):
            self._send_block(peer, epoch, fitting[first : first + BLOCK], now)
        self._check_limit(peer, epoch)

    def _send_block(self, peer: Peer, epoch: Epoch, plaintexts: list[_Plaintext], now: float) -> None:
        """Seal one block of records, and send each run of equal length at once."""
        try:
            lengths = epoch.sealer.seal_batch([self._arena[p.start : p.end] for p in plaintexts], self._out)
        except Refused as refused:
            peer.drops.count(refused.reason, sum(plaintext.packets for plaintext in plaintexts))
            return
        position = first = 0
        for count in equal_runs(lengths):
            size = sum(lengths[first : first + count])
            sent = self._send_run(peer, self._out[position : position + size], lengths[first])
            self._account(peer, plaintexts[first : first + count], sent, now)
            position += size
            first += count

    def _send_run(self, peer: Peer, run: memoryview, segment: int) -> int:
        endpoint = peer.endpoint
        return self._bind.send_segments(run, segment, endpoint) if endpoint is not None else 0

    def _account(self, peer: Peer, plaintexts: list[_Plaintext], sent: int, now: float) -> None:
        if sent:
            done = plaintexts[:sent]
            size = sum(plaintext.end - plaintext.start for plaintext in done)
            peer.count_sent(sent, sum(plaintext.packets for plaintext in done), size, now)
        if sent < len(plaintexts):
            peer.drops.count(DropReason.SEND_FAILED, sum(plaintext.packets for plaintext in plaintexts[sent:]))
            peer.measure_path(self._bind)

    def _check_limit(self, peer: Peer, epoch: Epoch) -> None:
        if epoch.wants_rekey() and not epoch.limit_reported:
            epoch.limit_reported = True
            self._hooks.on_limit(peer.name, epoch.receive_index)


def equal_runs(lengths: list[int]) -> list[int]:
    """Split lengths into runs that one segmented send can carry: equal ones, and one shorter to end the run."""
    runs: list[int] = []
    first = 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and lengths[last] == lengths[first]:
            last += 1
        if last < len(lengths) and lengths[last] < lengths[first]:
            last += 1
        runs.append(last - first)
        first = last
    return runs
