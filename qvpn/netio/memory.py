"""Twins of TUN and UDP in memory, joined by a hostile network in virtual time.

:class:`MemoryNetwork` loses, duplicates, delays and reorders datagrams as a seeded generator says and counts what it
did, so that a test can tell a packet lost by the network from one lost by the tunnel.  Nothing here reads a clock:
time passes only in :meth:`MemoryNetwork.advance`.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvpn.netio.base import MAX_READ, Address, Received

DEFAULT_PAYLOAD = 1472
"""UDP payload of an Ethernet link with IPv4."""

QUEUE_PACKETS = 4096
"""Packets or datagrams that wait in a twin; more are dropped and counted, as a socket buffer does."""

Callback = Callable[[], None]

_CE = 3
"""Congestion experienced (RFC 3168 5)."""


class _Waiter:
    """Level-triggered readiness: calls back as long as that takes something from the queue."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._waiting = waiting
        self._callback: Callback | None = None
        self._busy = False

    def set(self, callback: Callback | None) -> None:
        self._callback = callback
        self.notify()

    def notify(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            while self._callback is not None and (before := self._waiting()):
                self._callback()
                if self._waiting() >= before:
                    break
        finally:
            self._busy = False


class MemoryTun:
    """A TUN whose kernel is the test: :meth:`inject` puts packets in, ``taken`` has what came out.

    Packets are ``virtio-net header + IP packet``, as on the real device.
    """

    def __init__(self, name: str = "mem0", mtu: int = 1430) -> None:
        self.name = name
        self.mtu = mtu
        self.merges_udp = False
        self.taken: list[bytes] = []
        self.room = 1 << 62
        """Packets that the kernel still takes; 0 imitates one that refuses."""
        self.overflow = 0
        self._queue: deque[bytes] = deque()
        self._waiter = _Waiter(lambda: len(self._queue))

    def inject(self, packets: Sequence[bytes]) -> None:
        """The kernel has these packets for us."""
        for packet in packets:
            if len(self._queue) >= QUEUE_PACKETS:
                self.overflow += 1
            else:
                self._queue.append(packet)
        self._waiter.notify()

    def read_batch(self, arena: memoryview, limit: int) -> list[tuple[int, int]]:
        batch: list[tuple[int, int]] = []
        position = 0
        while self._queue and len(batch) < limit and len(arena) - position >= MAX_READ:
            packet = self._queue.popleft()
            arena[position : position + len(packet)] = packet
            batch.append((position, len(packet)))
            position += len(packet)
            if packet[1]:
                break
        return batch

    def write_batch(self, packets: Sequence[memoryview]) -> int:
        taken = min(len(packets), self.room)
        self.room -= taken
        self.taken += [bytes(packet) for packet in packets[:taken]]
        return taken

    def fileno(self) -> int:
        return -1

    def on_readable(self, callback: Callback | None) -> None:
        self._waiter.set(callback)

    def close(self) -> None:
        self._waiter.set(None)


@dataclass(frozen=True, slots=True)
class Impairments:
    """What a link does to datagrams; probabilities in 0..1, times in seconds."""

    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.001
    jitter: float = 0.0
    """Each datagram is delayed by up to so much more, which also reorders."""
    reorder: float = 0.0
    """Probability that a datagram is held back by ten times the delay."""
    mark: float = 0.0
    """Probability that a datagram which is ECN-capable gets marked CE."""
    max_payload: int = DEFAULT_PAYLOAD
    """Larger datagrams are refused at the sender, as a full-size GSO segment is."""
    path_payload: int = 1 << 16
    """Larger datagrams vanish behind the first link, unless they may be fragmented."""


class MemoryNetwork:
    """Addresses joined by links.  Deterministic for one seed and one order of calls."""

    def __init__(self, seed: int = 0, impairments: Impairments | None = None) -> None:
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        """By what happened: ``sent``, ``lost``, ``marked``, ``duplicated``, ``delivered``, ``blocked``,
        ``no_listener``, ``overflow``."""
        self.tap: Callable[[Address, Address, bytes], None] | None = None
        """Sees every datagram that is sent, before the network touches it."""
        self._random = random.Random(seed)
        self._default = impairments or Impairments()
        self._links: dict[tuple[Address, Address], Impairments] = {}
        self._blocked: set[tuple[Address, Address]] = set()
        self._binds: dict[Address, MemoryBind] = {}
        self._due: list[tuple[float, int, Address, Address, bytes, int]] = []
        self._sequence = 0

    def bind(self, address: Address) -> MemoryBind:
        """A new end.  Raises OSError if the address is taken."""
        bind = MemoryBind(self, address)
        self._attach(address, bind)
        return bind

    def impair(self, source: Address, destination: Address, impairments: Impairments) -> None:
        """Set what one direction of a link does."""
        self._links[source, destination] = impairments

    def impair_all(self, impairments: Impairments) -> None:
        """Set what every link without a setting of its own does."""
        self._default = impairments

    def block(self, source: Address, destination: Address, blocked: bool = True) -> None:
        """Swallow everything in one direction, until called with False."""
        (self._blocked.add if blocked else self._blocked.discard)((source, destination))

    def impairments(self, source: Address, destination: Address) -> Impairments:
        return self._links.get((source, destination), self._default)

    def inject(self, source: Address, destination: Address, datagram: bytes, ecn: int = 0) -> None:
        """Deliver a forged or recorded datagram at the next :meth:`advance`, unharmed."""
        self._push(self.now, source, destination, datagram, ecn)

    def next_due(self) -> float | None:
        """When the next datagram arrives; None while nothing is under way."""
        return self._due[0][0] if self._due else None

    def advance(self, now: float) -> None:
        """Let time pass up to ``now``, delivering what is due in order; what is sent meanwhile is part of it."""
        while self._due and self._due[0][0] <= now:
            due, _, source, destination, datagram, ecn = heapq.heappop(self._due)
            self.now = max(self.now, due)
            self._deliver(source, destination, datagram, ecn)
        self.now = max(self.now, now)

    def _carry(self, source: Address, destination: Address, datagram: bytes, ecn: int) -> None:
        self.counts["sent"] += 1
        if self.tap is not None:
            self.tap(source, destination, datagram)
        if (source, destination) in self._blocked:
            self.counts["blocked"] += 1
            return
        link = self.impairments(source, destination)
        if self._random.random() < link.loss:
            self.counts["lost"] += 1
            return
        if ecn and link.mark and self._random.random() < link.mark:
            self.counts["marked"] += 1
            ecn = _CE
        self._push(self.now + self._delay(link), source, destination, datagram, ecn)
        if self._random.random() < link.duplicate:
            self.counts["duplicated"] += 1
            self._push(self.now + self._delay(link), source, destination, datagram, ecn)

    def _delay(self, link: Impairments) -> float:
        held = 10.0 if self._random.random() < link.reorder else 1.0
        return link.delay * held + link.jitter * self._random.random()

    def _push(self, due: float, source: Address, destination: Address, datagram: bytes, ecn: int) -> None:
        self._sequence += 1
        heapq.heappush(self._due, (due, self._sequence, source, destination, datagram, ecn))

    def _deliver(self, source: Address, destination: Address, datagram: bytes, ecn: int) -> None:
        bind = self._binds.get(destination)
        if bind is None:
            self.counts["no_listener"] += 1
        elif bind._arrive(datagram, source, ecn):
            self.counts["delivered"] += 1
        else:
            self.counts["overflow"] += 1

    def _attach(self, address: Address, bind: MemoryBind) -> None:
        if address in self._binds:
            raise OSError(f"address {address} is in use in the memory network")
        self._binds[address] = bind

    def _detach(self, address: Address) -> None:
        self._binds.pop(address, None)


class MemoryBind:
    """One end of a :class:`MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, address: Address) -> None:
        self._network = network
        self._address = address
        self._queue: deque[tuple[bytes, Address, int]] = deque()
        self._waiter = _Waiter(lambda: len(self._queue))
        self._errors: Counter[str] = Counter()
        self._closed = False

    def receive_batch(self, limit: int, descriptor: int = -1) -> list[Received]:
        taken = [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]
        return [Received(memoryview(data), len(data), len(data), source, ecn) for data, source, ecn in taken]

    def watch_waits(self, descriptor: int, on: bool) -> None:
        """Nothing waits but for the test's own clock."""

    def send_batch(self, datagrams: Sequence[memoryview], address: Address) -> int:
        return self._send_all(datagrams, address, 0)

    def send_fragmentable(self, datagrams: Sequence[memoryview], address: Address) -> int:
        if self._closed:
            return 0
        link = self._network.impairments(self._address, address)
        for datagram in datagrams:
            self._network.counts["fragmented"] += len(datagram) > min(link.max_payload, link.path_payload)
            self._network._carry(self._address, address, bytes(datagram), 0)
        return len(datagrams)

    def send_segments(self, buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        cuts = range(0, len(buffer), segment)
        return self._send_all([buffer[cut : cut + segment] for cut in cuts], address, ecn)

    def waiting(self, address: Address) -> tuple[int, int]:
        """The kernel has what was taken."""
        return 0, 0

    def unsent(self) -> list[tuple[Address, int, int]]:
        """Nothing is kept, so nothing is dropped later."""
        return []

    def max_payload(self, address: Address) -> int:
        return self._network.impairments(self._address, address).max_payload

    def connect(self, address: Address) -> None:
        """Nothing to gain in memory."""

    def disconnect(self, address: Address) -> None:
        """Nothing to undo."""

    def rebind(self, address: Address) -> None:
        """Move to another address, as a site does whose provider renumbers it or whose NAT forgets."""
        self._network._attach(address, self)
        self._network._detach(self._address)
        self._address = address

    def filenos(self) -> list[int]:
        return []

    def on_readable(self, callback: Callback | None) -> None:
        self._waiter.set(callback)

    def on_filenos(self, callback: Callback | None) -> None:
        """There are no descriptors."""

    @property
    def errors(self) -> dict[str, int]:
        return dict(self._errors)

    @property
    def local(self) -> Address:
        return self._address

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._network._detach(self._address)
            self._waiter.set(None)

    def _send_all(self, datagrams: Sequence[memoryview], address: Address, ecn: int) -> int:
        for sent, datagram in enumerate(datagrams):
            if not self._send(bytes(datagram), address, ecn):
                return sent
        return len(datagrams)

    def _send(self, datagram: bytes, address: Address, ecn: int) -> bool:
        if self._closed:
            self._errors["EBADF"] += 1
            return False
        if len(datagram) > self.max_payload(address):
            self._errors["EMSGSIZE"] += 1
            return False
        if len(datagram) > self._network.impairments(self._address, address).path_payload:
            self._network.counts["too_long"] += 1  # lost at a later link, without a word
            return True
        self._network._carry(self._address, address, datagram, ecn)
        return True

    def _arrive(self, datagram: bytes, source: Address, ecn: int) -> bool:
        if len(self._queue) >= QUEUE_PACKETS:
            return False
        self._queue.append((datagram, source, ecn))
        self._waiter.notify()
        return True
