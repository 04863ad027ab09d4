"""What clicks do to detectors: dead time, after-pulses, double clicks.

The light of a block makes *clicks*, as if the detectors were always ready: gate numbers and which of the two fired.
:class:`Receiver` goes through them in order.  A gate that fires turns both detectors off for ``dead_gates`` gates;
each cause of a firing gate (light or dark, or an after-pulse) leaves with probability ``after_pulse`` a trap in its
own detector, which fires some live gates later and is a cause itself.  A cause in a gate that is off is lost.

Whether a click happens depends only on what came before it, so the answer is the one fixed point of "alive if its
cause fired", found by repetition: a few rounds over arrays instead of a loop over clicks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.model import Recovery
from keysource.qkd.optics.settings import Bits

CHUNK = 1 << 15
"""Clicks that go through the detectors at once."""
ZERO, ONE, BOTH = 1, 2, 3
"""Which detectors fired, as bits of a number."""

_Gates = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Clicks:
    """Gates in ascending order and what fired in them."""

    gates: _Gates
    ports: Bits


def ready_again(gates: _Gates, dead: int, blind_until: int = -1) -> _Flags:
    """Which of these ascending clicks find the detectors on, when each that does turns them off for ``dead`` gates.

    ``blind_until``: the last gate that is off before the first click.
    """
    fires = gates > blind_until
    if dead <= 0 or len(gates) < 2:
        return fires
    start = int(np.searchsorted(gates, blind_until, side="right"))
    late = gates[start:]
    near = np.flatnonzero(np.diff(late) <= dead) + 1
    if not len(near):
        return fires
    found = np.ones(len(late), dtype=bool)
    found[near] = False  # each may still be far enough from the last one that fired
    front = near[found[near - 1]] - 1
    while len(front):
        after = np.searchsorted(late, late[front] + dead, side="right")
        front = after[after < len(late)]
        front = front[~found[front]]
        found[front] = True
    fires[start:] = found
    return fires


@dataclass(frozen=True, slots=True)
class _Causes:
    """Light and every after-pulse that may come of it, sorted by gate."""

    gates: _Gates
    ports: Bits
    light: _Gates
    """Index of the click it is, -1 for after-pulses."""
    traps: _Gates
    """Which of them are after-pulses, ascending."""
    parent: _Gates
    """Of each after-pulse what it came from, -1 where that is over."""


class Receiver:
    """Two detectors over one block.  Feed it slices in order."""

    def __init__(self, recovery: Recovery, pulse_rate: float) -> None:
        self._dead = recovery.dead_gates(pulse_rate)
        self._after = recovery.after_pulse
        self._survival = recovery.survival(pulse_rate)
        self._blind_until = -1
        self._pending = Clicks(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint8))

    def take(self, clicks: Clicks, end: int, nature: np.random.Generator) -> tuple[Clicks, _Gates]:
        """(what fires before gate ``end``, for each the index of the light click in it or -1)."""
        gates, total = clicks.gates, len(clicks.gates)
        if total <= CHUNK:
            return self._take(clicks, end, nature)
        fired, lights = list[Clicks](), list[_Gates]()
        for at in range(0, total, CHUNK):  # what the cache holds; a slice is a slice
            until = min(at + CHUNK, total)
            edge = int(gates[until]) if until < total else end
            some, light = self._take(Clicks(gates[at:until], clicks.ports[at:until]), edge, nature)
            fired.append(some)
            lights.append(np.where(light >= 0, light + at, -1))
        joined = (np.concatenate([getattr(some, name) for some in fired]) for name in ("gates", "ports"))
        return Clicks(*joined), np.concatenate(lights)

    def _take(self, clicks: Clicks, end: int, nature: np.random.Generator) -> tuple[Clicks, _Gates]:
        if self._after <= 0.0:
            fires = ready_again(clicks.gates, self._dead, self._blind_until)
            kept = np.flatnonzero(fires)
            found = Clicks(clicks.gates[kept], clicks.ports[kept])
            self._remember(found.gates)
            return found, kept
        causes = self._causes(clicks, nature)
        fired = np.flatnonzero(self._fired(causes, end))
        gates, ports, light = causes.gates[fired], causes.ports[fired], causes.light[fired]
        first = np.flatnonzero(np.diff(gates, prepend=-1))
        if len(first) < len(gates):  # several causes in one gate
            ports, light = np.bitwise_or.reduceat(ports, first), np.maximum.reduceat(light, first)
            gates = gates[first]
        self._remember(gates)
        return Clicks(gates, ports), light

    def _remember(self, gates: _Gates) -> None:
        if len(gates):
            self._blind_until = int(gates[-1]) + self._dead

    def _causes(self, clicks: Clicks, nature: np.random.Generator) -> _Causes:
        """Draw the lots of every click before it is known which of them count.  Causes have numbers: the clicks from
        0 on, then what the slices before have left, then the after-pulses as they are drawn."""
        total, before = len(clicks.gates), self._pending
        of_light, of_before = (_some(count, self._after, nature) for count in (total, len(before.gates)))
        number = np.concatenate([of_light, total + of_before])
        gates: _Gates = np.concatenate([clicks.gates, before.gates])
        ports: Bits = np.concatenate([clicks.ports, before.ports])
        over: _Gates = np.full(len(before.gates), -1, dtype=np.int64)
        parts: list[tuple[_Gates, Bits, _Gates]] = [(before.gates, before.ports, over)]
        gates, ports, total = gates[number], ports[number], total + len(before.gates)
        while len(number):
            gates = gates + self._dead + _geometric(1.0 - self._survival, len(gates), nature)
            coin = nature.integers(ZERO, BOTH, len(gates), dtype=np.uint8)
            ports = np.where(ports == BOTH, coin, ports).astype(np.uint8)  # one trap sits in one of the two
            parts.append((gates, ports, number))
            again = _some(len(gates), self._after, nature)
            number, gates, ports, total = total + again, gates[again], ports[again], total + len(gates)
        traps = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _merged(clicks, *traps)

    def _fired(self, causes: _Causes, end: int) -> _Flags:
        """Which of the causes before gate ``end`` happen: their parent fired and the gate is on.  Those that a trap
        has left for later become pending; their own lots are drawn then (no memory)."""
        inside = int(np.searchsorted(causes.gates, end))
        gates, count = causes.gates[:inside], int(np.searchsorted(causes.traps, inside))
        fires, traps, parent = gates > self._blind_until, causes.traps[:count], causes.parent[:count]
        crowd = _crowd(gates, self._dead, traps)  # everything else is alone and fires
        place, among = np.searchsorted(crowd, traps), gates[crowd]
        possible = np.ones(len(crowd), dtype=bool)
        while True:
            fires[crowd] = self._ready(among, possible)
            born = fires[parent] | (parent < 0)
            if (possible[place] == born).all():
                break
            possible[place] = born
        late, came = causes.traps[count:], causes.parent[count:]
        left = (came < 0) | ((came < inside) & fires[np.minimum(came, inside - 1)]) if inside else came < 0
        self._pending = Clicks(causes.gates[late[left]], causes.ports[late[left]])
        return fires

    def _ready(self, gates: _Gates, possible: _Flags) -> _Flags:
        """Which of the possible causes find the detectors on; several in one gate fire, or are lost, together."""
        chosen = np.flatnonzero(possible)
        some = gates[chosen]
        first = np.flatnonzero(np.diff(some, prepend=-1))
        on = ready_again(some[first], self._dead, self._blind_until)
        if len(first) < len(some):
            on = np.repeat(on, np.diff(first, append=len(some)))
        fires = np.zeros(len(gates), dtype=bool)
        fires[chosen] = on
        return fires


def _some(count: int, p: float, nature: np.random.Generator) -> _Gates:
    """Each of the numbers 0..count-1 with probability ``p``, ascending."""
    if p >= 0.1 or count < 100:
        return np.flatnonzero(nature.random(count) < p)
    found, reached = list[_Gates](), -1
    while reached < count:
        steps = nature.geometric(p, int((count - reached) * p * 1.1) + 16)
        found.append(reached + np.cumsum(steps))
        reached = int(found[-1][-1])
    every = np.concatenate(found)
    return every[: int(np.searchsorted(every, count))]


def _merged(clicks: Clicks, gates: _Gates, ports: Bits, parent: _Gates) -> _Causes:
    """Clicks and, by number after them, traps: sorted by gate, and parents by place instead of by number."""
    count, order = len(clicks.gates), np.argsort(gates, kind="stable")
    before = np.searchsorted(clicks.gates, gates[order])  # clicks
    traps = before + np.arange(len(order))
    light = np.ones(count + len(order), dtype=bool)
    light[traps] = False
    columns = []
    for mine, theirs in ((clicks.gates, gates), (clicks.ports, ports), (np.arange(count), np.full(len(order), -1))):
        column = np.empty(len(light), dtype=mine.dtype)
        column[light] = mine
        column[traps] = theirs[order]
        columns.append(column)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = traps
    came, of_click = parent[order], np.minimum(parent[order], max(0, count - 1))
    from_trap = place[np.maximum(came - count, 0)] if len(place) else came
    where = np.where(came < count, of_click + np.searchsorted(before, of_click, side="right"), from_trap)
    return _Causes(columns[0], columns[1], columns[2], traps, np.where(came < 0, -1, where))


def _crowd(gates: _Gates, dead: int, traps: _Gates) -> _Gates:
    """Causes that another one may keep from firing, or that may not be there at all."""
    near = np.diff(gates) <= dead
    some = np.zeros(len(gates), dtype=bool)
    some[1:] = near
    some[:-1] |= near
    some[traps] = True
    return np.flatnonzero(some)


def _geometric(p: float, count: int, nature: np.random.Generator) -> _Gates:
    """1, 2, ... with success probability ``p`` each."""
    return nature.geometric(p, count).astype(np.int64)


def bits_of(ports: Bits, nature: np.random.Generator) -> Bits:
    """The bit of each click; both detectors at once: a coin."""
    bits: Bits = (ports == ONE).astype(np.uint8)
    double = np.flatnonzero(ports == BOTH)
    bits[double] = nature.integers(0, 2, len(double), dtype=np.uint8)
    return bits
