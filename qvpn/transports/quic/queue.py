"""What waits for one QUIC connection to let it go: bounded in number and in age, so that no queue builds up.

It stands in the place of aioquic's own list of pending DATAGRAM frames, which has no bound.  Control records and
handshake messages go first.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

BULK, URGENT = 256, 64
"""Datagrams that wait at the most."""

AGE, MOST_AGE = 0.05, 1.0
"""Seconds after which a packet that still waits is worth nothing to its sender (CoDel, RFC 8289, drops at 100 ms).

More where the round trip is longer, for then the window opens that much later; but never more than the second, for a
path that stands still for longer looks like one with a long round trip.
"""


class Amount(NamedTuple):
    """So many datagrams, and their bytes."""

    datagrams: int = 0
    size: int = 0


def patience(round_trip: float) -> float:
    """Seconds that packets may wait.  ``round_trip`` in seconds."""
    return min(MOST_AGE, max(AGE, 1.5 * round_trip))


class DatagramQueue:
    """First in, first out in each of two classes.  aioquic asks for its truth, for item 0, and pops that."""

    def __init__(self) -> None:
        self._urgent: deque[bytes] = deque()
        self._bulk: deque[bytes] = deque()
        self._times: deque[float] = deque()
        self._size = 0
        """Bytes of the bulk."""
        self.longest = 0
        """Bytes of the longest datagram since the queue was empty."""

    def __bool__(self) -> bool:
        return bool(self._urgent or self._bulk)

    def __len__(self) -> int:
        return len(self._urgent) + len(self._bulk)

    def __getitem__(self, place: int) -> bytes:
        return (self._urgent or self._bulk)[0]

    @property
    def bulk(self) -> Amount:
        """What waits and is not urgent."""
        return Amount(len(self._bulk), self._size)

    def popleft(self) -> bytes:
        """Raises IndexError if it is empty."""
        if self._urgent:
            return self._urgent.popleft()
        self._times.popleft()
        datagram = self._bulk.popleft()
        self._size -= len(datagram)
        return datagram

    def put(self, datagram: bytes, now: float, *, urgent: bool = False) -> bool:
        """False: there is no room."""
        if not self._urgent and not self._bulk:
            self.longest = 0
        if urgent:
            if len(self._urgent) >= URGENT:
                return False
            self._urgent.append(datagram)
        else:
            if len(self._bulk) >= BULK:
                return False
            self._bulk.append(datagram)
            self._times.append(now)
            self._size += len(datagram)
        if len(datagram) > self.longest:
            self.longest = len(datagram)
        return True

    def take_long(self, over: int) -> list[bytes]:
        """Take out the urgent ones with more than so many bytes."""
        found = [datagram for datagram in self._urgent if len(datagram) > over]
        if found:
            self._urgent = deque(datagram for datagram in self._urgent if len(datagram) <= over)
        return found

    def drop_stale(self, now: float, round_trip: float = 0.0) -> Amount:
        """Forget what has waited for longer than :func:`patience`; how much that was."""
        dropped, size, before = 0, self._size, now - patience(round_trip)
        while self._times and self._times[0] < before:
            self._times.popleft()
            self._size -= len(self._bulk.popleft())
            dropped += 1
        return Amount(dropped, size - self._size)

    def clear(self) -> tuple[Amount, int]:
        """Forget all: how much of the bulk there was, and how many urgent ones."""
        bulk, urgent = self.bulk, len(self._urgent)
        self._urgent.clear()
        self._bulk.clear()
        self._times.clear()
        self._size = 0
        return bulk, urgent
