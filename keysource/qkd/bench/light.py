"""Privacy amplification and the samplers, measured, with SeQUeNCe's photons beside them where it is installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keysource.qkd import sequencesim
from keysource.qkd.bench.correction import RNG_SEED
from keysource.qkd.distill import fftw
from keysource.qkd.distill.toeplitz import rows_alone, seed_bits, toeplitz_hash
from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.model import Optics, Recovery
from keysource.qkd.optics.sampler import Method, detect
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.presets import PRESETS


@dataclass(frozen=True, slots=True)
class Speed:
    """Millions of ``unit`` per second of CPU and of wall clock."""

    what: str
    unit: str
    per_second: float
    per_wall_second: float


def timed(work: Callable[[], Any], times: int = 1) -> tuple[float, float, Any]:
    """(CPU seconds, wall seconds, result) of one; the mean of ``times``."""
    used, began = time.process_time(), time.perf_counter()
    for _ in range(times):
        result = work()
    return (time.process_time() - used) / times, (time.perf_counter() - began) / times, result


def amplification(quick: bool) -> list[Speed]:
    """The hash as the link uses it, numpy's way, and where FFTW is there, FFTW's."""
    nature, found = np.random.default_rng(RNG_SEED), list[Speed]()
    ways = [("numpy", False)] + ([(f"FFTW, {fftw.THREADS} threads", True)] if fftw.HERE else [])
    for n, times in ((100_000, 1), (1_000_000, 1)) if quick else ((1_000_000, 5), (10_000_000, 1)):
        m = n // 2
        key, seed = (nature.integers(0, 2, size, dtype=np.uint8) for size in (n, seed_bits(n, m)))
        for name, how in ways:
            toeplitz_hash(key, seed, m, with_fftw=how)  # memory and plans
            cpu, wall, _hash = timed(
                lambda k=key, s=seed, m=m, h=how: toeplitz_hash(k, s, m, with_fftw=h),  # type: ignore[misc]
                times,
            )
            what = f"amplification by {name}, {n:.0e} bits to half"
            found.append(Speed(what, "bit in", n / cpu / 1e6, n / wall / 1e6))
    cpu, wall, _tag = timed(lambda: rows_alone(key, seed, range(50)))
    found.append(Speed(f"verification tag of 50 bits, {n:.0e} bits", "bit in", n / cpu / 1e6, n / wall / 1e6))
    return found


def samplers(quick: bool) -> list[Speed]:
    far, found = PRESETS["metro50"].optics, list[Speed]()
    if not isinstance(far, Optics):
        raise TypeError("metro50 sends weak pulses")
    near, tired = replace(far, distance_km=1.0, pulse_rate=1e6), replace(far, recovery=Recovery(50e-9, 0.01, 50e-9))
    runs: tuple[tuple[str, Optics, Method, int], ...] = (
        ("dense sampler, 1 km", near, "dense", 5_000_000),
        ("dense sampler, 50 km", far, "dense", 10_000_000),
        ("sparse sampler, 50 km", far, "sparse", 400_000_000),
        ("sparse, dead time, after-pulses", tired, "sparse", 400_000_000),
    )
    for name, optics, method, pulses in runs:
        count = pulses // 20 if quick else pulses
        source = SourceSeed.of(fresh_seed(), optics.p_z, optics.probabilities)
        bob = ReceiverSeed(fresh_seed(), optics.p_z)
        nature = np.random.default_rng(RNG_SEED)
        cpu, wall, seen = timed(
            lambda o=optics, s=source, b=bob, c=count, m=method, n=nature: detect(o, s, b, (0, c), Eve(), n, method=m)  # type: ignore[misc]
        )
        unit = "pulses" if method == "dense" else "effective pulses"
        for what, number in ((unit, count), ("detections", len(seen.positions))):
            found.append(Speed(name, what, number / cpu / 1e6, number / wall / 1e6))
    return found + _sequence(near, 20_000 if quick else 100_000)


def _sequence(near: Optics, pulses: int) -> list[Speed]:
    """Dense against dense: the same link, SeQUeNCe's photons."""
    source = SourceSeed.of(fresh_seed(), near.p_z, near.probabilities)
    settings = source.at(np.arange(pulses, dtype=np.uint64))
    bob = ReceiverSeed(fresh_seed(), near.p_z)
    few = SourceSeed.of(fresh_seed(), near.p_z, near.probabilities).at(np.arange(100, dtype=np.uint64))
    try:
        sequencesim.fly(near, few, bob, RNG_SEED)  # the first flight imports it, which takes seconds
        cpu, wall, seen = timed(lambda: sequencesim.fly(near, settings, bob, RNG_SEED))
    except LinkSettings:
        return []
    counts = (("pulses", pulses), ("detections", len(seen.positions)))
    return [Speed("SeQUeNCe, 1 km", unit, count / cpu / 1e6, count / wall / 1e6) for unit, count in counts]
