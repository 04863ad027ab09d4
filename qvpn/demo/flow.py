"""Numbered UDP packets: what was sent, what arrived, what came twice or out of order.

A packet is ``sequence (8 bytes, big-endian) | run (8) | pattern``; ``run`` is the first half of the marker, so
packets of another run count as foreign.  Lost is not known to one end: it is the other end's ``sent`` minus this
end's ``received``.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qvpn.demo import payload

_HEADER = struct.Struct(">Q8s")
_TICK = 0.002
"""Seconds between two looks at the clock: 1,000 packets a second leave in groups of two."""
_BURST = 64
"""Most packets sent at once: a sender that was held up goes on at its rate and does not make up for it."""
_BUFFER = 8 << 20
_SO_RCVBUFFORCE = 33


@dataclass(frozen=True)
class Settings:
    local: tuple[str, int]
    remote: tuple[str, int]
    rate: float
    """Packets a second."""
    size: int
    """UDP payload in bytes."""
    marker: bytes


class Arrivals:
    """Distinct, repeated and late sequence numbers, from any order of arrival."""

    def __init__(self) -> None:
        self._seen = bytearray()
        self.distinct = 0
        self.duplicates = 0
        self.reordered = 0
        self.highest = -1

    def note(self, sequence: int) -> None:
        if sequence >= len(self._seen):
            self._seen.extend(bytes(max(sequence + 1 - len(self._seen), 4096)))
        if self._seen[sequence]:
            self.duplicates += 1
            return
        self._seen[sequence] = 1
        self.distinct += 1
        if sequence < self.highest:
            self.reordered += 1
        else:
            self.highest = sequence

    def missing(self, sent: int) -> list[int]:
        """The numbers below ``sent`` that never came, at most the first hundred."""
        seen = self._seen.ljust(sent, b"\0")
        return [number for number in range(sent) if not seen[number]][:100]


class Flow:
    """One end: a bound socket, a paced sender and the count of arrivals."""

    def __init__(self, settings: Settings) -> None:
        if settings.size < 2 * payload.STRIDE:
            raise OSError(f"a payload of {settings.size} bytes is too small for the pattern")
        self.settings = settings
        self._run = settings.marker[:8]
        self._body = payload.filled(settings.size, settings.marker)[_HEADER.size :]
        family = socket.AF_INET6 if ":" in settings.local[0] else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        _enlarge(self._socket)
        self._socket.bind(settings.local)
        self.arrivals = Arrivals()
        self.sent = 0
        self.refused = 0
        self.foreign = 0
        self.longest_gap = 0.0
        self.last_at: float | None = None

    def __enter__(self) -> Flow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, count: int) -> None:
        """Send ``count`` packets; what the socket refuses is counted and takes no number."""
        for _ in range(count):
            packet = _HEADER.pack(self.sent, self._run) + self._body
            try:
                self._socket.sendto(packet, self.settings.remote)
            except OSError:
                self.refused += 1
            else:
                self.sent += 1

    def receive(self, wait: float) -> None:
        """Take everything that is there, waiting at most ``wait`` seconds for the first."""
        select.select([self._socket], [], [], wait)
        while True:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP answer to an earlier packet
            self._take_untrusted(data)

    def _take_untrusted(self, data: bytes) -> None:
        if len(data) != self.settings.size or data[8:16] != self._run or data[_HEADER.size :] != self._body:
            self.foreign += 1
            return
        now = time.monotonic()
        if self.last_at is not None:
            self.longest_gap = max(self.longest_gap, now - self.last_at)
        self.last_at = now
        sequence: int = _HEADER.unpack_from(data)[0]
        if sequence < 1 << 32:
            self.arrivals.note(sequence)

    def counts(self) -> dict[str, Any]:
        return {
            "at": time.monotonic(),
            "sent": self.sent,
            "refused": self.refused,
            "received": self.arrivals.distinct,
            "last_at": self.last_at,
        }

    def result(self) -> dict[str, Any]:
        return {
            **self.counts(),
            "duplicates": self.arrivals.duplicates,
            "reordered": self.arrivals.reordered,
            "foreign": self.foreign,
            "longest_gap": self.longest_gap,
            "socket_drops": self._socket_drops(),
            "missing_below_highest": self.arrivals.missing(self.arrivals.highest + 1),
        }

    def _socket_drops(self) -> int:
        """Packets that arrived and found this socket's buffer full (last column of proc_net_udp(5))."""
        port = f":{self._socket.getsockname()[1]:04X}"
        drops = 0
        for table in ("udp", "udp6"):
            for row in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                columns = row.split()
                if columns[1].endswith(port):
                    drops += int(columns[-1])
        return drops


def drive(
    running: Flow,
    *,
    seconds: float,
    linger: float,
    report: float,
    emit: Callable[[dict[str, Any]], None],
    stop: Callable[[], bool],
) -> None:
    """Send at the set rate for ``seconds`` or until ``stop()``, then listen ``linger`` seconds more."""
    start = last = time.monotonic()
    next_report = start + report if report else float("inf")
    credit = 0.0
    while (now := time.monotonic()) < start + seconds and not stop():
        credit = min(credit + (now - last) * running.settings.rate, _BURST)
        last = now
        running.send(int(credit))
        credit -= int(credit)
        running.receive(_TICK)
        if now >= next_report:
            emit(running.counts())
            next_report += report
    end = time.monotonic() + linger
    while time.monotonic() < end:
        running.receive(_TICK)


def _enlarge(wanted: socket.socket) -> None:
    """A buffer for a stall of seconds, so that a loss is the tunnel's and not this program's."""
    try:
        wanted.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    except PermissionError:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
