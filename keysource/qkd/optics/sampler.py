"""Detections of N pulses: by throwing dice for every pulse (*dense*), or only where one may click (*sparse*).

No pulse clicks with more than p_max.  So candidates are found by geometric gaps with p_max, their settings are worked
out, and a candidate stays with probability p / p_max: the distribution is exactly that of the dense sampler (the
tests hold both against each other and against a model that throws every photon).  Both use one table of outcomes;
what clicks do to the detectors afterwards is :mod:`keysource.qkd.optics.detectors`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.blinding import Blinding
from keysource.qkd.optics.detectors import Clicks, Receiver, bits_of
from keysource.qkd.optics.eve import Eve, Light, Notes, no_notes
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import ATTENUATOR, Readings, read
from keysource.qkd.optics.settings import AliceSettings, Bits, Positions, ReceiverSeed, SourceSeed, keystream
from keysource.qkd.optics.table import Table, cases, make_table

Method = Literal["sparse", "dense"]
DENSE_CHUNK = 1 << 18
SPARSE_CHUNK = 1 << 15
"""Candidates whose columns fit the cache together."""


@dataclass(frozen=True, slots=True)
class Detections:
    """What Bob's electronics report: pulse numbers, ascending, and the bit of each click.

    ``bases`` is None where Bob's own seed says them; ``notes`` are Eve's and never leave the fibre.
    """

    positions: Positions
    bits: Bits
    bases: Bits | None = None
    readings: Readings | None = None
    notes: Notes | None = field(default=None, repr=False)


def candidates(first: int, count: int, p_max: float, nature: np.random.Generator) -> Positions:
    """Pulse numbers in first..first+count-1, each independently with probability ``p_max``."""
    if p_max >= 1.0:
        return np.arange(first, first + count, dtype=np.uint64)
    found: list[npt.NDArray[np.int64]] = []
    reached, end = first - 1, first + count
    scale = -1.0 / math.log1p(-p_max)
    while reached < end:
        expected = min((end - reached) * p_max, 2.0 * SPARSE_CHUNK)
        steps = nature.standard_exponential(int(expected + 6.0 * expected**0.5) + 16)
        steps *= scale  # the whole part of an exponential is geometric
        positions = np.cumsum(steps.astype(np.int64) + 1)
        positions += reached
        reached = int(positions[-1])
        found.append(positions)
    everything = found[0] if len(found) == 1 else np.concatenate(found)
    return everything[: int(np.searchsorted(everything, end))].view(np.uint64)


def detect(
    optics: Optics,
    alice: SourceSeed,
    bob: ReceiverSeed,
    span: tuple[int, int],
    eve: Eve,
    nature: np.random.Generator,
    receiver: Receiver | None = None,
    method: Method = "sparse",
) -> Detections:
    """Fly the pulses ``span`` = (first, count) over the link.  ``receiver``: the detectors, where the block has
    begun before."""
    blind = isinstance(eve, Blinding) and eve.fraction > 0.0
    clicks, notes = (_faked if blind else _seen)(optics, alice, bob, span, eve, nature, method)
    end = span[0] + span[1]
    fired, light = (receiver or Receiver(optics.recovery, optics.pulse_rate)).take(clicks, end, nature)
    positions = fired.gates.view(np.uint64)
    tested = _tested(bob, positions)
    bits = bits_of(fired.ports, nature)
    kept = None
    if notes is not None and len(light):
        of_light = np.where(light >= 0, light, 0)
        kept = Notes(np.where(light >= 0, notes.how[of_light], no_notes(1).how[0]), notes.bit[of_light])
    current = eve.current() if isinstance(eve, Blinding) else 0.0
    readings = read(len(positions), 0 if tested is None else int(tested.sum()), span[1] / optics.pulse_rate, current)
    if tested is None:
        return Detections(positions, bits, None, readings, kept)
    plain = np.flatnonzero(tested == 0)  # test gates are no key: Bob chose them before anything was measured
    return Detections(positions[plain], bits[plain], None, readings, None if kept is None else kept[plain])


def _tested(bob: ReceiverSeed, positions: Positions) -> Bits | None:
    return bob.both(positions)[1] if bob.test_share > 0.0 else None


def _seen(
    optics: Optics,
    alice: SourceSeed,
    bob: ReceiverSeed,
    span: tuple[int, int],
    eve: Eve,
    nature: np.random.Generator,
    method: Method,
) -> tuple[Clicks, Notes | None]:
    """Clicks of light that Eve may have touched."""
    table = make_table(optics, eve, ATTENUATOR)
    parts = [_throw(table, optics, alice, bob, eve, at, nature) for at in _gates(table, span, nature, method)]
    return _joined([part[0] for part in parts], [part[1] for part in parts])


def _gates(
    table: Table, span: tuple[int, int], nature: np.random.Generator, method: Method
) -> list[tuple[Positions, float]]:
    """(pulse numbers, largest value of their dice) in handy pieces."""
    first, count = span
    if method == "sparse":
        found, most = candidates(first, count, table.most, nature), min(1.0, table.most)
        return [(found[at : at + SPARSE_CHUNK], most) for at in range(0, len(found), SPARSE_CHUNK)] or [(found, most)]
    edges = range(first, first + count, DENSE_CHUNK)
    return [(np.arange(at, min(at + DENSE_CHUNK, first + count), dtype=np.uint64), 1.0) for at in edges]


def _throw(
    table: Table,
    optics: Optics,
    alice: SourceSeed,
    bob: ReceiverSeed,
    eve: Eve,
    at: tuple[Positions, float],
    nature: np.random.Generator,
) -> tuple[Clicks, Notes | None]:
    if eve.fraction <= 0.0:
        return _undisturbed(table, alice, bob, at, nature), None
    positions, most = at
    settings = alice.at(positions)
    bases, tested = _choices(bob, positions)
    light = _light(optics, settings)
    touched, measured = eve.touch(light, optics, nature)
    dice = nature.random(len(positions))
    dice *= most
    clicked, ports, held = table.throw(dice, cases(settings.decoy, touched, bases, tested))
    clicks = Clicks(positions[clicked].view(np.int64), ports)
    seen = Light(light.check[clicked], light.bit[clicked])
    return clicks, eve.notes(held, seen, None if measured is None else measured[clicked])


def _undisturbed(
    table: Table, alice: SourceSeed, bob: ReceiverSeed, at: tuple[Positions, float], nature: np.random.Generator
) -> Clicks:
    """The same with nobody on the line.  Where all pulses are thrown, the intensity says how likely a click is at
    most; Bob's choices, and Alice's others, are worked out only where the die is below that."""
    positions, most = at
    words = keystream(alice.seed, positions)
    dice = nature.random(len(positions))
    dice *= most
    if most >= 1.0:  # of all pulses few click, of candidates most
        kept = np.flatnonzero(dice < table.most_of(alice.decoys(words)))
        positions, words, dice = positions[kept], words[kept], dice[kept]
    settings = alice.read(words)
    bases, tested = _choices(bob, positions)
    case = cases(settings.decoy, Light(settings.check, settings.bit), bases, tested)
    clicked, ports, _held = table.throw(dice, case)
    return Clicks(positions[clicked].view(np.int64), ports)


def _choices(bob: ReceiverSeed, positions: Positions) -> tuple[Bits, Bits | None]:
    """(bases, which gates are tests)."""
    return bob.both(positions) if bob.test_share > 0.0 else (bob.at(positions), None)


def _faked(
    optics: Optics,
    alice: SourceSeed,
    bob: ReceiverSeed,
    span: tuple[int, int],
    eve: Eve,
    nature: np.random.Generator,
    method: Method,
) -> tuple[Clicks, Notes | None]:
    """Clicks that a blinding Eve dictates: her receiver's, where Bob's choices let them through."""
    if not isinstance(eve, Blinding):
        raise TypeError("only blinding fakes states")
    hers = eve.receiver(optics)
    table = make_table(hers, Eve())
    found: list[Clicks] = []
    notes: list[Notes | None] = []
    for positions, most in _gates(table, span, nature, method):
        settings, (bases, tested) = alice.at(positions), bob.both(positions)
        basis = nature.integers(0, 2, len(positions), dtype=np.uint8)
        case = cases(settings.decoy, _light(hers, settings), basis, None)
        clicked, ports, _held = table.throw(nature.random(len(positions)) * most, case)
        bit = bits_of(ports, nature)
        let = eve.clicks(basis[clicked], bases[clicked], tested[clicked], ATTENUATOR, nature)
        gates = positions[clicked][let].astype(np.int64)
        found.append(Clicks(gates, (bit[let] + np.uint8(1))))
        notes.append(Notes(basis[clicked][let], bit[let]))
    return _joined(found, notes)


def _light(optics: Optics, settings: AliceSettings) -> Light:
    mean = np.array(optics.intensities)[settings.decoy]
    return Light(settings.check, settings.bit, mean)


def _joined(clicks: list[Clicks], notes: list[Notes | None]) -> tuple[Clicks, Notes | None]:
    if len(clicks) == 1:
        return clicks[0], notes[0]
    joined = Clicks(np.concatenate([part.gates for part in clicks]), np.concatenate([part.ports for part in clicks]))
    held = [part for part in notes if part is not None]
    if not held:
        return joined, None
    return joined, Notes(np.concatenate([part.how for part in held]), np.concatenate([part.bit for part in held]))


def join(parts: list[Detections]) -> Detections:
    """The slices of a block, in order."""
    readings = parts[0].readings
    for part in parts[1:]:
        readings = readings.plus(part.readings) if readings and part.readings else None
    positions = np.concatenate([part.positions for part in parts])
    bits = np.concatenate([part.bits for part in parts])
    if all(part.notes is None for part in parts):
        return Detections(positions, bits, None, readings)
    notes = [part.notes or no_notes(len(part.positions)) for part in parts]
    held = Notes(np.concatenate([each.how for each in notes]), np.concatenate([each.bit for each in notes]))
    return Detections(positions, bits, None, readings, held)
