"""Detection records: the one format between front ends (simulator, recorded file, device) and the post-processing.

All numbers are big-endian; a bit string is packed, first bit = highest bit of byte 0, padded with zeros.

*Detection record*, Bob's, and with a source of pairs Alice's too::

    magic "QDR1" | flags u8 | pulses u64 | count u32 | positions, count x u32, ascending | bits, packed
    | bases, packed, 1 = X           (flag 1; without it the site's own seed of the block says the bases)
    | turned gates, packed           (flag 4, E91: there the base plane says which of the two angles of the CHSH test)
    | clicks u32, tested u32, current f64, seconds f64            (flag 2: readings of the monitors)

*Settings record*, Alice's, for every pulse of the block::

    magic "QSR1" | pulses u64 | bits, packed | bases, packed, 1 = X | decoys, packed, 1 = mu2
    magic "QSR2" | the same          | vacuum, packed, 1 = mu3       (three intensities; its decoy bit is 0)

What a device must promise is in :data:`ASSUMPTIONS`; no post-processing can check it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

from keysource.qkd.distill.bits import Bits, pack, unpack_untrusted
from keysource.qkd.errors import BadFrame
from keysource.qkd.optics.monitors import Readings
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.optics.settings import AliceSettings, Positions

_DETECTED, _SETTINGS = b"QDR1", {b"QSR1": 2, b"QSR2": 3}
_HEAD = struct.Struct(">4sBQI")
_SOURCE_HEAD = struct.Struct(">4sQ")
_READINGS = struct.Struct(">IIdd")
_BASES, _MONITORED, _TURNED = 1, 2, 4

ASSUMPTIONS = (
    "pulses are phase-randomised coherent states of the stated intensities, and nothing but the photon number"
    " depends on the intensity (decoy-state BB84; a source of pairs may be anybody's)",
    "bits, bases and intensities are uniform or as stated, independent, and unknown outside of the site",
    "Bob's efficiency, with pairs Alice's too, does not depend on the basis; double clicks are reported with a random"
    " bit, none is dropped",
    "both detectors are off together after a click; clicks in test gates are not reported as detections",
    "nothing about a block leaves a site before its last pulse is measured",
    "no light enters a device but by the fibre, and none leaves it (no Trojan horse, no back-flash)",
)


@dataclass(frozen=True, slots=True)
class RecordedSettings:
    """Alice's settings of a whole block, as a device has stored them."""

    bit: Bits = field(repr=False)
    check: Bits = field(repr=False)
    decoy: Bits = field(repr=False)
    intensities: int = 2

    def at(self, positions: Positions) -> AliceSettings:
        where = positions.astype(np.int64)
        return AliceSettings(self.bit[where], self.check[where], self.decoy[where])


def encode_detections(seen: Detections, pulses: int) -> bytes:
    """Eve's notes are not part of it."""
    flags = (_BASES if seen.bases is not None else 0) | (_MONITORED if seen.readings is not None else 0)
    if seen.bases is not None and (seen.bases > 1).any():
        flags |= _TURNED
    parts = [_HEAD.pack(_DETECTED, flags, pulses, len(seen.positions)), seen.positions.astype(">u4").tobytes()]
    parts.append(pack(seen.bits))
    if seen.bases is not None:
        parts.append(pack(seen.bases & np.uint8(1)))
        if flags & _TURNED:
            parts.append(pack(seen.bases >> np.uint8(1)))
    if (r := seen.readings) is not None:
        parts.append(_READINGS.pack(r.clicks, r.tested, r.current, r.seconds))
    return b"".join(parts)


def detections_untrusted(record: bytes, pulses: int) -> Detections:
    """Raises :class:`BadFrame` for anything but a record of a block of ``pulses`` pulses."""
    try:
        magic, flags, length, count = _HEAD.unpack_from(record)
    except struct.error:
        raise BadFrame("a detection record that is too short") from None
    packed = (count + 7) // 8
    planes = 1 + bool(flags & _BASES) + bool(flags & _TURNED)
    wanted = _HEAD.size + 4 * count + packed * planes + (_READINGS.size if flags & _MONITORED else 0)
    if magic != _DETECTED or flags > 7 or flags & (_TURNED | _BASES) == _TURNED or len(record) != wanted:
        raise BadFrame("not a detection record, or one of a wrong length")
    if length != pulses:
        raise BadFrame(f"a detection record of {length} pulses where a block has {pulses}")
    positions = np.frombuffer(record, dtype=">u4", count=count, offset=_HEAD.size).astype(np.uint32)
    if count and (int(positions[-1]) >= pulses or (positions[1:] <= positions[:-1]).any()):
        raise BadFrame("detections that do not ascend inside the block")
    at = _HEAD.size + 4 * count
    bits = unpack_untrusted(record[at : at + packed], count)
    at += packed
    bases = None
    if flags & _BASES:
        bases = unpack_untrusted(record[at : at + packed], count)
        at += packed
        if flags & _TURNED:
            bases = bases | unpack_untrusted(record[at : at + packed], count) << np.uint8(1)
            at += packed
    return Detections(
        positions.astype(np.uint64), bits, bases, _readings_untrusted(record[at:]) if flags & _MONITORED else None
    )


def _readings_untrusted(data: bytes) -> Readings:
    clicks, tested, current, seconds = _READINGS.unpack(data)
    if not (tested <= clicks and 0.0 <= current < 1e3 and 0.0 < seconds < 1e9):
        raise BadFrame("monitor readings that cannot be")
    return Readings(clicks, tested, current, seconds)


def encode_settings(bit: Bits, check: Bits, decoy: Bits, intensities: int = 2) -> bytes:
    magic = {count: name for name, count in _SETTINGS.items()}[intensities]
    planes = [bit, check, decoy & np.uint8(1)] + ([decoy >> np.uint8(1)] if intensities > 2 else [])
    return _SOURCE_HEAD.pack(magic, len(bit)) + b"".join(pack(plane) for plane in planes)


def settings_untrusted(record: bytes, pulses: int) -> RecordedSettings:
    """Raises :class:`BadFrame`."""
    packed = (pulses + 7) // 8
    intensities = _SETTINGS.get(record[:4])
    if len(record) < _SOURCE_HEAD.size or intensities is None:
        raise BadFrame("not a settings record")
    length = _SOURCE_HEAD.unpack_from(record)[1]
    if length != pulses or len(record) != _SOURCE_HEAD.size + (1 + intensities) * packed:
        raise BadFrame(f"a settings record of {length} pulses where a block has {pulses}, or of a wrong length")
    planes = [
        unpack_untrusted(record[at : at + packed], pulses) for at in range(_SOURCE_HEAD.size, len(record), packed)
    ]
    bit, check, decoy = planes[:3]
    if intensities > 2:
        if (decoy & planes[3]).any():
            raise BadFrame("a settings record with a pulse of two intensities")
        decoy = decoy | planes[3] << np.uint8(1)
    return RecordedSettings(bit, check, decoy, intensities)
