"""Superpackets in: chunks that follow one another are joined again, decrypted straight into their place.

The plaintext of chunk ``k`` is a header and a slice.  Decrypted to where its slice belongs, its header lands on the
end of the slice before it; so a run is decrypted *last to first*, and every slice overwrites the header of the next
chunk that lay on it.  The result is one header and the whole payload, contiguous: one write to the TUN.

A run that ends before its superpacket does stays *pending*, and the next run of the same block is joined to it.  If
it never comes, what is there is settled (:func:`qvpn.netio.offload.settle`) into a smaller superpacket or a packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag

from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.netio import offload
from qvpn.netio.base import VNET_HEADER, Tun
from qvpn.netio.offload import Superpacket
from qvpn.tunnel import ecn, ip
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.epoch import Epoch
from qvpn.tunnel.records import CONTROL_BIT, HEADER, OVERHEAD
from qvpn.tunnel.replay import BLOCK, INDEX_BITS

U64Array = npt.NDArray[np.uint64]

RUN_BYTES = 1 << 18
"""A superpacket, and beyond its end the room of one more chunk."""

_PLACES = np.arange(BLOCK + 1, dtype=np.uint64)


def split_runs(buffer: memoryview, length: int, segment: int) -> Iterator[tuple[int, int]]:
    """Split one receive into runs: (offset, number of datagrams).

    The datagrams of a run have equal first eight bytes and consecutive data counters in one block.  A handshake
    datagram, a control record and anything too short is a run of one.
    """
    count, tail = divmod(length, segment)
    whole = count + (tail >= OVERHEAD)
    if segment < OVERHEAD or whole < 2:
        yield from ((start, 1) for start in range(0, length, segment))
        return
    heads = np.ndarray((whole,), "<u8", buffer, 0, (segment,))
    counters = np.ndarray((whole,), "<u8", buffer, 8, (segment,))
    if _is_run(heads, counters, whole):
        yield 0, whole
    else:
        yield from ((first * segment, run) for first, run in _split(heads.tolist(), counters.tolist()))
    if 0 < tail < OVERHEAD:
        yield count * segment, 1


def _is_run(heads: U64Array, counters: U64Array, count: int) -> bool:
    first = int(counters[0])
    if (first & (BLOCK - 1)) + count > BLOCK or first & CONTROL_BIT:
        return False
    if heads.tobytes() != heads[:1].tobytes() * count:
        return False
    return bool(counters.tobytes() == (_PLACES[:count] + counters[0]).tobytes())


def _split(heads: list[int], counters: list[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for here in range(1, len(heads) + 1):
        joins = (
            here < len(heads)
            and heads[here] == heads[first]
            and counters[here] == counters[here - 1] + 1
            and counters[here] & (BLOCK - 1)
            and not counters[here] & CONTROL_BIT
        )
        if not joins:
            yield first, here - first
            first = here


@dataclass(slots=True)
class _Pending:
    """Chunks of one superpacket, from ``first_place`` on, that stand at the start of the run buffer."""

    peer: Peer
    epoch: Epoch
    block: int
    packet: Superpacket
    head: bytes
    first_place: int
    next_place: int
    end: int
    mark: int


@dataclass(frozen=True, slots=True)
class Run:
    """Datagrams of one block that follow one another, of which the first is open already."""

    peer: Peer
    epoch: Epoch
    counter: int
    """Of the first."""
    records: memoryview
    """All of them, back to back."""
    segment: int
    """Length of each but the last."""
    count: int
    opened: memoryview
    """Plaintext of the first."""
    mark: int
    """ECN bits of the outer headers, where they change the inner one."""

    def fits(self, packet: Superpacket) -> bool:
        """True if every datagram has exactly the length that its chunk must have."""
        place = self.counter & (BLOCK - 1)
        last = len(self.records) - (self.count - 1) * self.segment - OVERHEAD
        if self.count > 1 and self.segment != OVERHEAD + packet.header + packet.segment:
            return False
        return offload.chunk_fits(packet, place, len(self.opened)) and offload.chunk_fits(
            packet, place + self.count - 1, last
        )


class RunJoiner:
    """Joins runs of chunks and writes them to the TUN."""

    def __init__(self, table: PeerTable, tun: Tun) -> None:
        self._table = table
        self._tun = tun
        self._buffer = memoryview(bytearray(RUN_BYTES))
        self._pending: _Pending | None = None

    def add(self, run: Run) -> bool:
        """Open the rest of a run and join it.

        False if its chunks do not fit together or one of them does not verify: then nothing of the run was used, and
        its datagrams must be handled one by one.  The caller marks the counters when this returns True.
        """
        packet = offload.parse_superpacket(run.opened, 0, len(run.opened))
        if packet is None or not run.fits(packet):
            return False
        pending = self._continued(run, packet)
        place = run.counter & (BLOCK - 1)
        first_place = pending.first_place if pending else place
        base = (place - first_place) * packet.segment
        try:
            self._decrypt(run, base, packet.segment)
        except InvalidTag:
            return False
        skip = packet.header if pending else 0
        self._buffer[base + skip : base + len(run.opened)] = run.opened[skip:]
        end = base + len(run.records) - run.count * OVERHEAD - (run.count - 1) * packet.header
        self._pending = _Pending(
            peer=run.peer,
            epoch=run.epoch,
            block=run.counter >> INDEX_BITS,
            packet=packet,
            head=bytes(run.opened[: packet.header]),
            first_place=first_place,
            next_place=place + run.count,
            end=end,
            mark=run.mark,
        )
        return True

    def finish(self) -> None:
        """Write the superpacket if it is complete."""
        pending = self._pending
        if pending is not None and pending.next_place == pending.packet.chunks:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as it is."""
        pending = self._pending
        if pending is None:
            return
        self._pending = None
        packet, peer = pending.packet, pending.peer
        payload = pending.end - packet.header
        chunks = pending.next_place - pending.first_place
        if pending.mark and not ecn.apply(self._buffer, VNET_HEADER, pending.mark):
            peer.drops.count(DropReason.ECN_NOT_CAPABLE, chunks)
            return
        if self._table.allowed.lookup(ip.source(self._buffer, VNET_HEADER)) is not peer:
            peer.drops.count(DropReason.WRONG_SOURCE, chunks)
            return
        peer.source_checks += 1
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

    def _continued(self, run: Run, packet: Superpacket) -> _Pending | None:
        """What is pending, if this run goes on where it ends; else it is written first.

        With slices shorter than the header, a header would land on more than the one slice before it, so such
        superpackets are not continued.
        """
        pending = self._pending
        if (
            pending is not None
            and pending.epoch is run.epoch
            and pending.mark == run.mark
            and (pending.block << INDEX_BITS) + pending.next_place == run.counter
            and pending.head == run.opened[: packet.header]
            and packet.segment >= packet.header
        ):
            return pending
        self.flush()
        return None

    def _decrypt(self, run: Run, base: int, step: int) -> None:
        """Decrypt all but the first, last to first.  Raises InvalidTag."""
        decrypt, records, buffer, segment = run.epoch.opener.decrypt, run.records, self._buffer, run.segment
        if run.count < 2:
            return
        start, place = (run.count - 1) * segment, base + (run.count - 1) * step
        size = len(records) - start - OVERHEAD
        decrypt(records[start + 4 : start + HEADER], records[start + HEADER :], None, buffer[place : place + size])
        size = segment - OVERHEAD
        starts, places = range(start - segment, 0, -segment), range(place - step, base, -step)
        for start, place in zip(starts, places, strict=True):
            text = start + HEADER
            decrypt(records[start + 4 : text], records[text : start + segment], None, buffer[place : place + size])
