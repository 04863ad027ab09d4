"""Asks one peer what the path carries, and answers the peer's own questions (PROTOCOL.md, chapter 11).

A thin shell around :class:`~qvpn.tunnel.pathmtu.PathSearch`, with the one timer that it needs.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Protocol

from qvpn.netio.base import Address
from qvpn.netio.udp import FALLBACK_PAYLOAD
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.pathmtu import PathSearch
from qvpn.tunnel.records import OVERHEAD
from qvpn.wire.messages import ControlType

LOOK = 1.0
"""Seconds between two looks whether packets were sent, and at the first link."""

HEADERS = {4: 28, 6: 48}
"""Bytes of the outer IP and UDP headers."""

_PROBE = struct.Struct(">BI")
_ACK = struct.Struct(">BIH")


class PathPort(Protocol):
    """What a prober needs of the packet path."""

    def link_payload(self, peer: str) -> int | None: ...

    def set_path(self, peer: str, payload: int, *, provisional: bool) -> None: ...

    def sent_records(self, peer: str) -> int: ...

    def send_probe(self, peer: str, payload: bytes) -> bool: ...

    def send_control(
        self, peer: str, payload: bytes, *, receive_index: int | None = None, address: Address | None = None
    ) -> bool: ...


class PathProber:
    """One peer's path.  Belongs to the event loop's thread."""

    def __init__(
        self,
        peer: str,
        plane: PathPort,
        clock: Callable[[], float],
        log: Any,
        *,
        most: int | None = None,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        """``most``: no datagram need be longer.  ``settled()`` is called when the path's size is another one."""
        self._peer = peer
        self._plane = plane
        self._clock = clock
        self._log = log
        self._most = most
        self._settled = settled
        self._timer: asyncio.TimerHandle | None = None
        self._told = (0, False)
        self._found = 0
        self._records = 0
        self._awake = False
        self.search: PathSearch | None = None
        self.headers = HEADERS[4]
        """Bytes around a datagram of ours, outside."""
        self.echoed = 0
        """Probes of the peer that were answered."""

    def moved(self, address: Address) -> None:
        """The peer is to be reached there from now on."""
        ceiling, now = self._ceiling(), self._clock()
        if ceiling is None:
            return
        self.headers = HEADERS[address.ip.version] + address.overhead
        if self.search is None:
            self.search = PathSearch(ceiling, self.headers, now)
        else:
            self.search.set_ceiling(ceiling, now)
            self.search.moved(self.headers, now)
        self._tell()
        self._arm()

    def woken(self) -> None:
        """An epoch was confirmed: records pass."""
        self._awake = True
        if self.search is not None:
            self.search.woken(self._clock())
            self._arm()

    @property
    def payload(self) -> int | None:
        """What the last finished search found; before the first, what the link carries; None: no route."""
        if self._found:
            return self._found
        size = None if self.search is None else self.search.size
        return None if size == FALLBACK_PAYLOAD else size

    def stop(self) -> None:
        """May be called twice."""
        self._awake = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def control(self, receive_index: int, payload: bytes) -> DropReason | None:
        """A verified PATH_PROBE or PATH_ACK."""
        if payload[0] == ControlType.PATH_PROBE:
            return self._answer(receive_index, payload)
        if len(payload) != _ACK.size:
            return DropReason.CONTROL_MALFORMED
        _, number, size = _ACK.unpack(payload)
        if self.search is None or not self.search.answered(number, size, self._clock()):
            return DropReason.HANDSHAKE_STATE
        self._tell()
        self._arm()
        return None

    def _answer(self, receive_index: int, payload: bytes) -> DropReason | None:
        """A few bytes for each probe, to the peer's endpoint and nowhere else."""
        if len(payload) < _PROBE.size:
            return DropReason.CONTROL_MALFORMED
        _, number = _PROBE.unpack_from(payload)
        answer = _ACK.pack(ControlType.PATH_ACK, number, min(OVERHEAD + len(payload), 0xFFFF))
        self.echoed += self._plane.send_control(self._peer, answer, receive_index=receive_index)
        return None

    def _ceiling(self) -> int | None:
        payload = self._plane.link_payload(self._peer)
        return payload if payload is None or self._most is None else min(payload, self._most)

    # time

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._awake and self.search is not None:
            # Records are cheap to count, the clock that counts is CLOCK_BOOTTIME, and a link may change: look often.
            wait = min(LOOK, max(0.0, self.search.next_timer() - self._clock()))
            self._timer = asyncio.get_running_loop().call_later(wait, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.search is None:
            return
        now, records = self._clock(), self._plane.sent_records(self._peer)
        ceiling = self._ceiling()
        if ceiling is not None:
            self.search.set_ceiling(ceiling, now)
        if records != self._records:
            self._records = records
            self.search.traffic(now)
        for probe in self.search.probes(now):
            self._plane.send_probe(self._peer, self._padded(probe.number, probe.size))
        self._tell()
        self._arm()

    def _padded(self, number: int, size: int) -> bytes:
        return _PROBE.pack(ControlType.PATH_PROBE, number).ljust(size - OVERHEAD, b"\0")

    def _tell(self) -> None:
        """What the search knows now counts at once; beyond the packet path it is told when the search is over."""
        search = self.search
        if search is None or self._told == (search.size, search.settled):
            return
        before, self._told = self._told, (search.size, search.settled)
        self._plane.set_path(self._peer, search.size, provisional=not search.settled and not search.assumed)
        if search.settled:
            self._found = search.size
            if before[0] != search.size or not before[1]:
                self._log.info("path", mtu=search.size + self.headers, link=search.ceiling + self.headers)
            self._settled()
