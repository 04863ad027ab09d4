"""What waits for one QUIC connection to let it go: bounded in number and in age, so that no queue builds up.

It stands in the place of aioquic's own list of pending DATAGRAM frames, which has no bound.  Control records and
handshake messages go first.
"""

from __future__ import annotations

from collections import deque

BULK, URGENT = 256, 64
"""Datagrams that wait at the most."""

AGE = 0.05
"""Seconds after which a packet that still waits is worth nothing to its sender (CoDel, RFC 8289, drops at 100 ms).

More where the round trip is longer, for then the window opens that much later.
"""


class DatagramQueue:
    """First in, first out in each of two classes.  aioquic asks for its truth, for item 0, and pops that."""

    def __init__(self) -> None:
        self._urgent: deque[bytes] = deque()
        self._bulk: deque[bytes] = deque()
        self._times: deque[float] = deque()
        self.longest = 0
        """Bytes of the longest datagram since the queue was empty."""

    def __bool__(self) -> bool:
        return bool(self._urgent or self._bulk)

    def __len__(self) -> int:
        return len(self._urgent) + len(self._bulk)

    def __getitem__(self, place: int) -> bytes:
        return (self._urgent or self._bulk)[0]

    def popleft(self) -> bytes:
        """Raises IndexError if it is empty."""
        if self._urgent:
            return self._urgent.popleft()
        self._times.popleft()
        return self._bulk.popleft()

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
        if len(datagram) > self.longest:
            self.longest = len(datagram)
        return True

    def take_long(self, over: int) -> list[bytes]:
        """Take out the urgent ones with more than so many bytes."""
        found = [datagram for datagram in self._urgent if len(datagram) > over]
        if found:
            self._urgent = deque(datagram for datagram in self._urgent if len(datagram) <= over)
        return found

    def drop_stale(self, now: float, round_trip: float = 0.0) -> int:
        """Forget what has waited for too long; how many there were.  ``round_trip`` in seconds."""
        dropped, before = 0, now - max(AGE, 1.5 * round_trip)
        while self._times and self._times[0] < before:
            self._times.popleft()
            self._bulk.popleft()
            dropped += 1
        return dropped

    def clear(self) -> int:
        """Forget all; how many there were."""
        count = len(self)
        self._urgent.clear()
        self._bulk.clear()
        self._times.clear()
        return count
