"""The queue at the receiving end: datagrams that wait in a socket because we open them slower than they come.

Nobody can reorder that queue, but it can be kept short.  Whoever sends through the tunnel fills it like that of a
router, so what a router does helps: CoDel by the time that the kernel's stamps show, marking CE, and where the inner
sender does not speak ECN dropping (:mod:`qvpn.tunnel.ecn`).  Only receives of many datagrams are chosen: they are
what fills the queue, and an echo request that waits with them is none of theirs.

Stamps cost a little for each receive, so they are asked for only while a socket cannot be emptied in one turn.
"""

from __future__ import annotations

from qvpn.dataplane.codel import CoDel
from qvpn.netio.base import Bind, Received
from qvpn.tunnel import ecn

TARGET = 0.002
INTERVAL = 0.04
"""Seconds, as in :class:`~qvpn.dataplane.codel.CoDel`; less than its defaults: here flows wait for one another."""

BULK = 8192
"""Bytes of a receive that may be chosen."""


class Arrivals:
    """Sockets that are slow to empty, and how long what comes from them has waited."""

    def __init__(self, bind: Bind) -> None:
        self._bind = bind
        self.watched: dict[int, CoDel] = {}
        """Those that say now how long each receive waited."""
        self._owed: set[int] = set()
        """Sockets of which the next receive of many datagrams is chosen."""
        self._behind: set[int] = set()
        self.marked = 0
        """Receives chosen so far."""
        self.longest = 0.0
        """Seconds that any receive waited at most."""

    def behind(self, descriptor: int) -> None:
        """One turn did not empty this socket."""
        self._behind.add(descriptor)
        if descriptor not in self.watched:
            self.watched[descriptor] = CoDel(TARGET, INTERVAL)
            self._bind.watch_waits(descriptor, True)

    def look(self, descriptor: int, received: Received, now: float) -> None:
        """A receive that says how long it waited: mark it as a router would, if it is time for that."""
        codel = self.watched.get(descriptor)
        if codel is None:
            return
        if received.waited > self.longest:
            self.longest = received.waited
        if codel.judge(received.waited, False, now):
            self._owed.add(descriptor)
        if self._owed and descriptor in self._owed and received.length >= BULK:
            self._owed.remove(descriptor)
            self.marked += 1
            received.ecn = ecn.WAITED

    def emptied(self, descriptor: int) -> None:
        """A turn emptied this socket: what waited did so for want of processor time, not in a queue that stands."""
        codel = self.watched.get(descriptor)
        if codel is not None:
            codel.emptied()
            self._owed.discard(descriptor)

    def forget(self, descriptor: int) -> None:
        """It is closed, and another socket may get its number."""
        self.watched.pop(descriptor, None)
        self._owed.discard(descriptor)
        self._behind.discard(descriptor)

    def settle(self) -> None:
        """Now and then: do not watch what was emptied in every turn since the last time."""
        for descriptor in self.watched.keys() - self._behind:
            del self.watched[descriptor]
            self._owed.discard(descriptor)
            self._bind.watch_waits(descriptor, False)
        self._behind.clear()
