"""Records of simulated blocks, as a pair of devices would leave them: for the recorded front end, and to show a
format.

Both sites' seeds are in this one process, so what it writes is for tests and demonstrations only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from keysource.private import create_private
from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.flight import EntangledPairs, make_flight
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.optics.settings import ReceiverSeed, fresh_seed
from keysource.qkd.presets import Preset
from keysource.qkd.rates.proofs import intensities
from keysource.qkd.records import encode_detections, encode_settings

_CHUNK = 1 << 20


def record_block(preset: Preset) -> tuple[bytes, bytes]:
    """(Alice's record, Bob's) of one block; with a source of pairs both are of detections."""
    optics, pulses = preset.optics, preset.plan().pulses
    light = make_flight(optics, fresh_seed(), fresh_seed())
    nature, first = np.random.default_rng(), 0
    for share, part in optics.stretches():
        count = min(round(share * pulses), pulses - first)
        light.slice(part, (first, count), Eve(), nature)
        first += count
    alice, seen = light.reports()
    if isinstance(light, EntangledPairs):
        return _measured(alice, light.seeds[0], pulses), _measured(seen, light.seeds[1], pulses)
    source = light.source
    chunks = [source.at(np.arange(at, min(at + _CHUNK, pulses), dtype=np.uint64)) for at in range(0, pulses, _CHUNK)]
    planes = [np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("bit", "check", "decoy")]
    bit, check, decoy = planes
    return encode_settings(bit, check, decoy, intensities(optics.source)), _measured(seen, light.receiver, pulses)


def _measured(seen: Detections | None, seed: ReceiverSeed, pulses: int) -> bytes:
    if seen is None:
        raise TypeError("a site that measures has a record")
    return encode_detections(replace(seen, bases=seed.angles(seen.positions)), pulses)


def record_blocks(
    folder: Path, preset: Preset, blocks: Iterable[int], fly: Callable[[Preset], tuple[bytes, bytes]] = record_block
) -> Iterator[Path]:
    """Write ``alice/N.settings``, of pairs ``alice/N.detections``, and ``bob/N.detections``; existing files are never
    replaced.

    Raises:
        LinkSettings: a file exists, or cannot be written.
    """
    for block in blocks:
        settings, detections = fly(preset)
        kind = "settings" if isinstance(preset.optics, Optics) else "detections"
        names = (f"alice/{block}.{kind}", f"bob/{block}.detections")
        for name, record in zip(names, (settings, detections), strict=True):
            path = folder / name
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                create_private(path, record)
            except FileExistsError:
                raise LinkSettings(f"{path}: exists already; nothing is replaced") from None
            except OSError as error:
                raise LinkSettings(f"{path}: {error.strerror}") from None
            yield path
