"""Notices what the daemon's clock does not show: a wall clock that jumps, and a virtual machine that was copied.

CLOCK_BOOTTIME and the wall clock both go on through a suspend, so their distance stays.  It changes when somebody
sets the wall clock, or when the machine stood still without knowing: paused, or restored from a snapshot.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from qvpn.netio.vmclock import Generation

INTERVAL = 0.5
"""Seconds between two looks: so long may a copy of the machine use counters twice."""
JUMP = 5.0
"""Seconds between wall clock and CLOCK_BOOTTIME; a clock that is slewed stays far below between two looks."""
_CLOSE = 0.1
_TRIES = 3


class Sight(enum.Enum):
    NOTHING = "nothing"
    JUMPED = "jumped"
    FORKED = "forked"


class ClockWatch:
    """Compares each look with the one before."""

    def __init__(
        self,
        boottime: Callable[[], float],
        wall: Callable[[], float],
        readers: Sequence[Callable[[], Generation | None]] = (),
    ) -> None:
        """Each of ``readers`` gives the marks of one device, or None where it cannot be read now."""
        self._boottime = boottime
        self._wall = wall
        self._readers = readers
        self._distance = self._measure()
        self._marks = [read() for read in readers]

    @property
    def sees_forks(self) -> bool:
        """Whether the kernel shows when this machine is copied."""
        return any(mark is not None for mark in self._marks)

    def look(self) -> tuple[Sight, float]:
        """What happened since the last look, and by how many seconds the wall clock jumped."""
        before, self._distance = self._distance, self._measure()
        jump = self._distance - before
        copied = moved = False
        for place, read in enumerate(self._readers):
            old, new = self._marks[place], read()
            if new is None:
                continue
            self._marks[place] = new
            copied |= old is not None and new.copied != old.copied
            moved |= old is not None and new.moved != old.moved
        if copied:
            return Sight.FORKED, jump
        return (Sight.JUMPED if moved or abs(jump) > JUMP else Sight.NOTHING), jump

    def _measure(self) -> float:
        """Wall clock less CLOCK_BOOTTIME, read at the same moment: this process may be stopped between two reads."""
        for _ in range(_TRIES):
            before = self._boottime()
            wall = self._wall()
            after = self._boottime()
            if after - before < _CLOSE:
                break
        return wall - after
