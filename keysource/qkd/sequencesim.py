"""SeQUeNCe, a discrete-event simulator of quantum networks, as a front end: its clicks in this package's records.

The light source, fibre, polarising beam splitter and detectors are SeQUeNCe's (PyPI ``sequence``, extra
``qvpn[sequence]``); bits, bases and intensities come from this package's seeds, so from the operating system.  The
post-processing then plays the records like those of any device: two simulators, one border.

What is told to SeQUeNCe otherwise than to our own optics: misalignment e_d as depolarisation with probability 2 e_d,
dark counts as a Poisson process per detector whose clicks go to the nearest gate, intensities by a source that
changes its mean pulse by pulse.  Its detectors rest one by one, which no proof here covers, so only links whose
detectors are always ready are taken.  It throws every photon as a Python object: a dense simulator, at some 10^5
pulses a second.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from keysource.qkd.distill.bits import Bits
from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import read
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.optics.settings import AliceSettings, ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.presets import Preset
from keysource.qkd.rates.proofs import intensities
from keysource.qkd.records import encode_detections, encode_settings

CHUNK = 50_000
"""Pulses of one timeline: every photon of it is an event in memory."""


def record_block(preset: Preset, pulses: int | None = None) -> tuple[bytes, bytes]:
    """(settings record, detection record) of one block that SeQUeNCe has flown.

    Raises:
        LinkSettings: SeQUeNCe is not installed, or this link is not for it.
    """
    optics = preset.optics
    if not isinstance(optics, Optics):
        raise LinkSettings(f"preset {preset.name}: SeQUeNCe is asked for weak pulses only")
    count = preset.plan().pulses if pulses is None else pulses
    source = SourceSeed.of(fresh_seed(), optics.p_z, optics.probabilities)
    receiver = ReceiverSeed(fresh_seed(), optics.p_z)
    settings = source.at(np.arange(count, dtype=np.uint64))
    seen = fly(optics, settings, receiver, int.from_bytes(os.urandom(4), "big"))
    record = encode_settings(settings.bit, settings.check, settings.decoy, intensities(optics.source))
    return record, encode_detections(seen, count)


def fly(optics: Optics, settings: AliceSettings, receiver: ReceiverSeed, nature: int) -> Detections:
    """Clicks of these pulses with Bob's bases.  ``nature``: a seed for SeQUeNCe's own dice."""
    if optics.recovery.dead_time > 0.0 or optics.recovery.after_pulse > 0.0 or optics.course:
        raise LinkSettings("SeQUeNCe's detectors rest one by one: only links with detectors that are always ready")
    parts, count = _parts(), len(settings.bit)
    bases = receiver.angles(np.arange(count, dtype=np.uint64))
    clicks: list[tuple[np.ndarray[Any, Any], Bits]] = []
    dice = np.random.default_rng(nature)
    for first in range(0, count, CHUNK):
        here = slice(first, min(first + CHUNK, count))
        some = AliceSettings(settings.bit[here], settings.check[here], settings.decoy[here])
        where, bits = _chunk(parts, optics, some, bases[here], dice)
        clicks.append((where + first, bits))
    positions = np.concatenate([where for where, _bits in clicks]).astype(np.uint64)
    found = np.concatenate([bits for _where, bits in clicks]).astype(np.uint8)
    readings = read(len(positions), 0, count / optics.pulse_rate, 0.0)
    return Detections(positions, found, bases[positions.astype(np.int64)], readings)


@dataclass(frozen=True, slots=True)
class _Parts:
    """SeQUeNCe's classes: it is imported only when it is wanted, and it is no dependency."""

    timeline: Any
    channel: Any
    node: Any
    photon: Any
    event: Any
    process: Any
    polarization: Any


def _parts() -> _Parts:
    try:
        from sequence.components.optical_channel import QuantumChannel
        from sequence.components.photon import Photon
        from sequence.kernel.event import Event
        from sequence.kernel.process import Process
        from sequence.kernel.timeline import Timeline
        from sequence.topology.node import QKDNode
        from sequence.utils.encoding import polarization
    except ImportError as error:
        raise LinkSettings(f"SeQUeNCe is not installed ({error.name}): pip install 'qvpn[sequence]'") from None
    return _Parts(Timeline, QuantumChannel, QKDNode, Photon, Event, Process, polarization)


def _chunk(
    parts: _Parts, optics: Optics, settings: AliceSettings, bases: Bits, dice: np.random.Generator
) -> tuple[np.ndarray[Any, Any], Bits]:
    """(gates that fired, bits) of a piece of a block on a timeline of its own."""
    period = round(1e12 / optics.pulse_rate)  # picoseconds
    line = parts.timeline()
    alice, bob = (parts.node(name, line, stack_size=0, seed=int(dice.integers(2**31))) for name in ("alice", "bob"))
    channel = parts.channel(
        "fibre",
        line,
        attenuation=optics.attenuation / 1000.0,
        distance=optics.distance_km * 1000.0,
        polarization_fidelity=1.0 - 2.0 * optics.misalignment,
        frequency=optics.pulse_rate,
    )
    channel.set_ends(alice, "bob")
    alice.destination = "bob"
    detector = bob.components["bob.qsdetector"]
    for number in (0, 1):
        dark = optics.dark * optics.pulse_rate
        detector.set_detector(number, optics.detector, dark, int(2 * optics.pulse_rate), 1)
    line.init()
    detector.set_basis_list(bases.tolist(), channel.delay - period / 2, 1e12 / period)
    _emit(parts, optics, settings, alice, period, dice)
    line.stop_time = channel.delay + len(bases) * period
    line.run()
    return _clicks(detector.get_photon_times(), channel.delay, period, len(bases), dice)


def _emit(
    parts: _Parts, optics: Optics, settings: AliceSettings, alice: Any, period: int, dice: np.random.Generator
) -> None:
    """A source whose mean changes from pulse to pulse, which SeQUeNCe's own does not."""
    states, line = parts.polarization["bases"], alice.timeline
    numbers = dice.poisson(np.array(optics.intensities)[settings.decoy])
    for pulse in np.flatnonzero(numbers).tolist():
        state = states[settings.check[pulse]][settings.bit[pulse]]
        for _ in range(numbers[pulse]):
            photon = parts.photon(
                str(pulse), line, location=alice, encoding_type=parts.polarization, quantum_state=state
            )
            line.schedule(parts.event(pulse * period, parts.process(alice, "get", [photon])))


def _clicks(
    times: list[list[int]], delay: int, period: int, count: int, dice: np.random.Generator
) -> tuple[np.ndarray[Any, Any], Bits]:
    """Times to gates; both detectors in one gate: a coin."""
    fired = np.zeros(count, dtype=np.uint8)
    for number, each in enumerate(times):
        gates = np.rint((np.array(each, dtype=np.float64) - delay) / period).astype(np.int64)
        inside = gates[(gates >= 0) & (gates < count)]
        fired[np.unique(inside)] |= np.uint8(1 << number)
    where = np.flatnonzero(fired)
    ports = fired[where]
    bits = np.where(ports == 3, dice.integers(0, 2, len(where), dtype=np.uint8), ports >> np.uint8(1))
    return where, bits.astype(np.uint8)
