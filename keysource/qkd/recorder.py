"""Records of simulated blocks, as a pair of devices would leave them: for the recorded front end, and to show a
format.

Both sites' seeds are in this one process, so what it writes is for tests and demonstrations only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from keysource.qkd.errors import LinkSettings
from keysource.qkd.files import create_private
from keysource.qkd.optics.detectors import Receiver
from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.sampler import Detections, detect, join
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.presets import Preset
from keysource.qkd.records import encode_detections, encode_settings

_CHUNK = 1 << 20


def record_block(preset: Preset) -> tuple[bytes, bytes]:
    """(settings record, detection record) of one block."""
    optics, pulses = preset.optics, preset.plan().pulses
    source = SourceSeed(fresh_seed(), optics.p_z, optics.decoy.p1)
    bob = ReceiverSeed(fresh_seed(), optics.p_z)
    nature, receiver = np.random.default_rng(), Receiver(optics.recovery, optics.pulse_rate)
    parts: list[Detections] = []
    first = 0
    for share, part in optics.stretches():
        count = min(round(share * pulses), pulses - first)
        parts.append(detect(part, source, bob, (first, count), Eve(), nature, receiver))
        first += count
    seen = join(parts)
    seen = replace(seen, bases=bob.at(seen.positions))
    chunks = [source.at(np.arange(at, min(at + _CHUNK, pulses), dtype=np.uint64)) for at in range(0, pulses, _CHUNK)]
    planes = [np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("bit", "check", "decoy")]
    return encode_settings(*planes), encode_detections(seen, pulses)


def record_blocks(folder: Path, preset: Preset, blocks: Iterable[int]) -> Iterator[Path]:
    """Write ``alice/N.settings`` and ``bob/N.detections``; existing files are never replaced.

    Raises:
        LinkSettings: a file exists, or cannot be written.
    """
    for block in blocks:
        settings, detections = record_block(preset)
        names = (f"alice/{block}.settings", f"bob/{block}.detections")
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
