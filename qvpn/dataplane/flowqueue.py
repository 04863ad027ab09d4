"""What waits between TUN and network when packets come faster than they are sealed: FQ-CoDel (RFC 8290), bounded.

Each flow has a queue of its own and CoDel on it.  Flows take turns by bytes (deficit round robin), and one that has
just come, or that never fills its share, goes first: an echo request or a key press does not wait behind a transfer,
and the transfer's sender is told, by a mark or by a drop, that it sends more than passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from qvpn.dataplane.codel import CoDel
from qvpn.netio.base import MAX_READ

T = TypeVar("T")

QUANTUM = 16_384
"""Bytes that a flow may send before the next has its turn; a superpacket is paid for over several rounds."""

MAX_BYTES = 16 << 20
"""Bytes that wait at most; beyond, the longest flow loses what it has waited for longest."""

MAX_PACKETS = 4096
"""Packets that wait at most: small ones cost more than their bytes."""


@dataclass(slots=True)
class Waiting(Generic[T]):
    """One packet or superpacket in the queue."""

    packet: T
    size: int
    """Bytes."""
    since: float
    """When it came, on the daemon's clock."""
    markable: bool
    """Its sender speaks ECN."""
    marked: bool = False
    """It waited so long that it must be marked CE now."""


@dataclass(slots=True, eq=False)
class _Flow(Generic[T]):
    key: bytes
    codel: CoDel = field(default_factory=CoDel)
    packets: deque[Waiting[T]] = field(default_factory=deque)
    size: int = 0
    deficit: int = QUANTUM


class FlowQueue(Generic[T]):
    """Packets by flow, out in a fair order."""

    def __init__(
        self,
        dropped: Callable[[T, bool], None],
        *,
        max_bytes: int = MAX_BYTES,
        max_packets: int = MAX_PACKETS,
    ) -> None:
        """``dropped(packet, full)`` is called for each that goes no further: too much waits, or it did too long."""
        self._dropped = dropped
        self._max_bytes = max_bytes
        self._max_packets = max_packets
        self._flows: dict[bytes, _Flow[T]] = {}
        self._new: deque[_Flow[T]] = deque()
        self._old: deque[_Flow[T]] = deque()
        self.size = self.packets = 0
        """Bytes and packets that wait."""
        self.marked = 0
        """Packets marked CE so far."""
        self.longest = 0.0
        """Seconds that any packet waited at most."""

    def __len__(self) -> int:
        return self.packets

    @property
    def flows(self) -> int:
        """Flows that have packets, or had some a turn ago."""
        return len(self._flows)

    def has(self, key: bytes) -> bool:
        """Packets of this flow wait, so that another must not overtake them."""
        flow = self._flows.get(key)
        return flow is not None and bool(flow.packets)

    def put(self, key: bytes, packet: T, size: int, now: float, *, markable: bool = False) -> None:
        """Let a packet wait behind the others of its flow; if that is too much, some packet is dropped."""
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(key)
            self._new.append(flow)
        flow.packets.append(Waiting(packet, size, now, markable))
        flow.size += size
        self.size += size
        self.packets += 1
        while self.size > self._max_bytes or self.packets > self._max_packets:
            longest = max(self._flows.values(), key=lambda each: each.size)
            self._dropped(self._pop(longest).packet, True)

    def take(self, now: float) -> Waiting[T] | None:
        """The packet whose turn it is; None: nothing waits."""
        while flow := self._next():
            waiting = self._judged(flow, now)
            if waiting is not None:
                flow.deficit -= waiting.size
                return waiting
            if self._new and self._new[0] is flow:
                # Once through the old ones, even if empty: else a trickle keeps all others waiting (RFC 8290, 4.2).
                self._old.append(self._new.popleft())
            else:
                self._old.popleft()
                del self._flows[flow.key]
        return None

    def _next(self) -> _Flow[T] | None:
        """The first flow that still may send in its turn."""
        while True:
            queue = self._new or self._old
            if not queue:
                return None
            flow = queue[0]
            if flow.deficit > 0:
                return flow
            flow.deficit += QUANTUM
            self._old.append(queue.popleft())

    def _judged(self, flow: _Flow[T], now: float) -> Waiting[T] | None:
        """The flow's next packet that is not dropped for having waited."""
        while flow.packets:
            waiting = self._pop(flow)
            waited = now - waiting.since
            if waited > self.longest:
                self.longest = waited
            if not flow.codel.judge(waited, flow.size <= MAX_READ, now):
                return waiting
            if waiting.markable:
                waiting.marked = True
                self.marked += 1
                return waiting
            self._dropped(waiting.packet, False)
        flow.codel.emptied()
        return None

    def _pop(self, flow: _Flow[T]) -> Waiting[T]:
        waiting = flow.packets.popleft()
        flow.size -= waiting.size
        self.size -= waiting.size
        self.packets -= 1
        return waiting
