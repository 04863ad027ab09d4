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
from keysource.qkd.optics.settings import Bits, Positions

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


@dataclass(slots=True)
class _Causes:
    """Light and every after-pulse that may come of it, sorted by gate.  ``parent`` -1: light, or left over."""

    gates: _Gates
    ports: Bits
    parent: _Gates
    light: _Gates
    """Index of the click it is, -1 for after-pulses."""


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
        alive = self._alive(causes, end)
        self._pending = _beyond(causes, alive, end)
        inside = alive & (causes.gates < end)
        gates, first = _distinct(causes.gates[inside])
        ports = np.bitwise_or.reduceat(causes.ports[inside], first) if len(first) else causes.ports[:0]
        light = np.maximum.reduceat(causes.light[inside], first) if len(first) else causes.light[:0]
        self._remember(gates)
        return Clicks(gates, ports), light

    def _remember(self, gates: _Gates) -> None:
        if len(gates):
            self._blind_until = int(gates[-1]) + self._dead

    def _causes(self, clicks: Clicks, nature: np.random.Generator) -> _Causes:
        """Draw the lots of every click before it is known which of them count."""
        gates = np.concatenate([self._pending.gates, clicks.gates])
        ports = np.concatenate([self._pending.ports, clicks.ports])
        light = np.concatenate([np.full(len(self._pending.gates), -1), np.arange(len(clicks.gates))])
        parts = [(gates, ports, np.full(len(gates), -1, dtype=np.int64), light)]
        number, total = np.arange(len(gates)), len(gates)
        while len(number):
            traps = nature.random(len(number)) < self._after
            number, gates, ports = number[traps], gates[traps], ports[traps]
            delay = _geometric(1.0 - self._survival, len(gates), nature)
            gates = gates + self._dead + delay
            coin = nature.integers(ZERO, BOTH, len(gates), dtype=np.uint8)
            ports = np.where(ports == BOTH, coin, ports)  # one trap sits in one of the two
            parts.append((gates, ports, number, np.full(len(gates), -1)))
            number, total = np.arange(total, total + len(gates)), total + len(gates)
        all_gates, all_ports, parent, all_light = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(all_gates, kind="stable")
        place = np.empty(total, dtype=np.int64)
        place[order] = np.arange(total)
        parent = parent[order]
        return _Causes(all_gates[order], all_ports[order], np.where(parent < 0, -1, place[parent]), all_light[order])

    def _alive(self, causes: _Causes, end: int) -> _Flags:
        """Those that happen: their parent fired and the gate is on."""
        children = np.flatnonzero(causes.parent >= 0)
        parents = causes.parent[children]
        possible = np.ones(len(causes.gates), dtype=bool)
        possible[children] = False
        fired = self._fired(causes.gates, possible, end)
        while True:
            born = fired[parents]
            if (possible[children] == born).all():
                return fired | (possible & (causes.gates >= end))
            possible[children] = born
            fired = self._fired(causes.gates, possible, end)

    def _fired(self, gates: _Gates, possible: _Flags, end: int) -> _Flags:
        """Several causes may share a gate: they fire, or are lost, together."""
        chosen = np.flatnonzero(possible & (gates < end))
        distinct, first = _distinct(gates[chosen])
        fires, on = np.zeros(len(gates), dtype=bool), ready_again(distinct, self._dead, self._blind_until)
        if len(first) < len(chosen):
            on = np.repeat(on, np.diff(first, append=len(chosen)))
        fires[chosen] = on
        return fires


def _distinct(gates: _Gates) -> tuple[_Gates, _Gates]:
    """(each gate once, index of its first cause), of ascending gates."""
    first = np.flatnonzero(np.diff(gates, prepend=-1))
    return gates[first], first


def _beyond(causes: _Causes, alive: _Flags, end: int) -> Clicks:
    """After-pulses that a click before ``end`` has left for later; their own lots are drawn then (no memory)."""
    late = np.flatnonzero(alive & (causes.gates >= end))
    return Clicks(causes.gates[late], causes.ports[late])


def _geometric(p: float, count: int, nature: np.random.Generator) -> _Gates:
    """1, 2, ... with success probability ``p`` each."""
    return nature.geometric(p, count).astype(np.int64)


def bits_of(ports: Bits, nature: np.random.Generator) -> Bits:
    """The bit of each click; both detectors at once: a coin."""
    bits: Bits = (ports == ONE).astype(np.uint8)
    double = np.flatnonzero(ports == BOTH)
    bits[double] = nature.integers(0, 2, len(double), dtype=np.uint8)
    return bits


def positions_of(clicks: Clicks) -> Positions:
    return clicks.gates.astype(np.uint64)
