"""``qvpn-qkd bench``: error correction, amplification and samplers, in CPU seconds of one process, beside peers that
are installed.

Both parties' work is in the same process, ours and the peers', so the figures compare; a link has two processes.
CPU seconds, not wall seconds: a busy machine changes them little.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from keysource.qkd import sequencesim
from keysource.qkd.acceptance import Accepted, acceptance
from keysource.qkd.distill.bits import Bits
from keysource.qkd.distill.cascade import Corrector, Reference, block_sizes
from keysource.qkd.distill.toeplitz import seed_bits, toeplitz_hash
from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.model import Optics, Recovery
from keysource.qkd.optics.sampler import Method, detect
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.presets import PRESETS
from keysource.qkd.rates.entropy import binary_entropy

RATIOS = (0.01, 0.02, 0.03, 0.05)
_RNG_SEED = 11


@dataclass(frozen=True, slots=True)
class Corrected:
    """Cascade: ``f`` leak over the entropy of the errors that were there (None: not counted), ``failed`` frames that
    still differed, ``mbits`` key bits per CPU second in millions."""

    who: str
    bits: int
    ratio: float
    frames: int
    f: float | None
    failed: int
    messages: float | None
    mbits: float


@dataclass(frozen=True, slots=True)
class Speed:
    """``per_second``: millions of ``unit`` per CPU second."""

    what: str
    unit: str
    per_second: float


Frame = tuple[Bits, Bits]
Correct = Callable[[Bits, Bits, float], tuple[Bits, int | None, int | None]]
"""(Alice's bits, Bob's, expected ratio) -> (Bob's corrected, parities disclosed, messages)."""


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One frame of each, shorter samples.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    blocks: Annotated[int, typer.Option(min=0, help="Also distil so many blocks each at 25, 50 and 100 km.")] = 0,
) -> None:
    """Cascade, amplification and samplers in CPU seconds, beside peers where they are installed; with --blocks how
    much of the formula's key is delivered."""
    corrected = [*_cascades(quick), *_peers(quick)]
    speeds = [*_amplification(quick), *_samplers(quick)]
    passed = [acceptance(km, blocks) for km in (25.0, 50.0, 100.0)] if blocks else []
    if as_json:
        where = {"machine": platform.machine(), "python": platform.python_version(), "numpy": np.__version__}
        print(
            json.dumps(
                {
                    **where,
                    "cascade": [asdict(c) for c in corrected],
                    "speeds": [asdict(s) for s in speeds],
                    "acceptance": [asdict(a) for a in passed],
                }
            )
        )
        return
    table = Table("Cascade", "bits", "errors", "f", "failed", "messages", "Mbit/s of CPU")
    for each in corrected:
        f = "not counted" if each.f is None else f"{each.f:.3f}"
        messages = "-" if each.messages is None else f"{each.messages:.0f}"
        row = (each.who, str(each.bits), f"{100 * each.ratio:g} %", f, f"{each.failed}/{each.frames}", messages)
        table.add_row(*row, f"{each.mbits:.3g}")
    other = Table("", "millions per CPU second")
    for speed in speeds:
        other.add_row(speed.what, f"{speed.per_second:.4g} M {speed.unit}")
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print(other)
    if passed:
        console.print(_delivered(passed))


def _delivered(passed: list[Accepted]) -> Table:
    table = Table("km", "key bits", "length", "accepted", "formula", "length x acceptance / formula")
    for a in passed:
        sizes = (str(a.key_bits), str(a.length), f"{a.accepted}/{a.blocks}", str(a.formula))
        table.add_row(f"{a.km:g}", *sizes, f"{a.share:.4f}")
    return table


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


# Error correction


def _frames(bits: int, ratio: float, count: int) -> list[Frame]:
    nature = np.random.default_rng(_RNG_SEED)
    alice = nature.integers(0, 2, (count, bits), dtype=np.uint8)
    return [(each, each ^ (nature.random(bits) < ratio).astype(np.uint8)) for each in alice]


def measured(who: str, correct: Correct, bits: int, ratio: float, count: int) -> Corrected:
    """``count`` frames through a Cascade, one after the other."""
    seconds, leak, failed, talk, entropy = 0.0, 0, 0, 0, 0.0
    counted = talked = True
    for alice, bob in _frames(bits, ratio, count):
        spent, (mine, parities, messages) = _timed(lambda a=alice, b=bob: correct(a, b, ratio))  # type: ignore[misc]
        seconds += spent
        failed += bool((np.asarray(mine) != alice).any())
        counted, talked = counted and parities is not None, talked and messages is not None
        leak, talk = leak + (parities or 0), talk + (messages or 0)
        entropy += bits * binary_entropy(float((alice ^ bob).mean()))
    f, said = leak / entropy if counted else None, talk / count if talked else None
    return Corrected(who, bits, ratio, count, f, failed, said, count * bits / seconds / 1e6)


def ours(schedule: str) -> Correct:
    def correct(alice: Bits, bob: Bits, ratio: float) -> tuple[Bits, int | None, int | None]:
        seed, sizes = os.urandom(32), block_sizes(len(alice), ratio, schedule)
        reference, corrector = Reference(alice, seed, len(sizes)), Corrector(bob, seed, sizes)
        work, asked, messages = corrector.run(), 0, 0
        question = next(work, None)
        while question is not None:
            answers = reference.answer_untrusted(question)
            asked, messages = asked + len(answers), messages + 1
            try:
                question = work.send(answers)
            except StopIteration:
                break
        return corrector.bits, asked, messages

    return correct


def _cascades(quick: bool) -> list[Corrected]:
    found = []
    for bits, count in ((1 << 14, 16), (1 << 17, 3)):
        for schedule in ("optimised", "original"):
            frames = 1 if quick else count
            found += [measured(f"qvpn, {schedule}", ours(schedule), bits, ratio, frames) for ratio in RATIOS]
    return found


# Peers: what their packages offer as Cascade, called as their own examples do


def _peers(quick: bool) -> list[Corrected]:
    found = []
    for who, make, bits, count in (("tno qkd_key_rate", _tno, 1 << 14, 2), ("qkdpy", _qkdpy, 2000, 4)):
        correct = make()
        if correct is None:
            print(f"{who}: not installed, left out", file=sys.stderr)
            continue
        frames = 1 if quick else count
        found += [measured(who, correct, bits, ratio, frames) for ratio in RATIOS]
    return found


def _tno() -> Correct | None:
    try:
        from tno.quantum.communication.qkd_key_rate import classical  # type: ignore[import-not-found,unused-ignore]
        from tno.quantum.communication.qkd_key_rate.classical import (  # type: ignore[import-not-found,unused-ignore]
            cascade,
        )
    except ImportError:
        return None
    passes = 8

    def correct(alice: Bits, bob: Bits, ratio: float) -> tuple[Bits, int | None, int | None]:
        permutations = classical.Permutations.random_permutation(number_of_passes=passes, message_size=len(alice))
        strategy = classical.ParityStrategy(
            error_rate=ratio, sampling_fraction=0.34, number_of_passes=passes, switch_after_pass=None
        )
        hers, his = (classical.Message([int(bit) for bit in bits]) for bits in (alice, bob))
        sender = cascade.CascadeSender(message=hers, permutations=permutations)
        receiver = cascade.CascadeReceiver(message=his, permutations=permutations, parity_strategy=strategy)
        result = cascade.CascadeCorrector(alice=sender, bob=receiver).correct_errors()
        fixed = np.array([result.output_bob[i] for i in range(len(alice))], dtype=np.uint8)
        return fixed, int(result.number_of_exposed_bits), None

    return correct


def _qkdpy() -> Correct | None:
    try:
        from qkdpy.key_management.error_correction import (  # type: ignore[import-not-found,unused-ignore]
            ErrorCorrection,
        )
    except ImportError:
        return None

    def correct(alice: Bits, bob: Bits, ratio: float) -> tuple[Bits, int | None, int | None]:
        hers, his = ErrorCorrection.cascade(alice.tolist(), bob.tolist())
        if (np.array(hers) == alice).all():
            return np.array(his, dtype=np.uint8), None, None
        order: Bits = (
            alice if hers == his else alice ^ np.uint8(1)
        )  # it hands back both keys in another order: equal, or failed
        return order, None, None

    return correct


# Amplification and light


def _amplification(quick: bool) -> list[Speed]:
    found, nature = [], np.random.default_rng(_RNG_SEED)
    for n in (100_000, 1_000_000) if quick else (1_000_000, 10_000_000):
        key, seed = (nature.integers(0, 2, size, dtype=np.uint8) for size in (n, seed_bits(n, n // 2)))
        seconds, _hash = _timed(lambda k=key, s=seed, m=n // 2: toeplitz_hash(k, s, m))  # type: ignore[misc]
        found.append(Speed(f"Toeplitz by numpy FFT, {n:.0e} bits to half", "bit in", n / seconds / 1e6))
    return found


def _samplers(quick: bool) -> list[Speed]:
    far, found = PRESETS["metro50"].optics, list[Speed]()
    if not isinstance(far, Optics):
        raise TypeError("metro50 sends weak pulses")
    near, tired = replace(far, distance_km=1.0, pulse_rate=1e6), replace(far, recovery=Recovery(50e-9, 0.01, 50e-9))
    runs: tuple[tuple[str, Optics, Method, int], ...] = (
        ("dense sampler, 1 km", near, "dense", 5_000_000),
        ("dense sampler, 50 km", far, "dense", 5_000_000),
        ("sparse sampler, 50 km", far, "sparse", 200_000_000),
        ("sparse, dead time, after-pulses", tired, "sparse", 200_000_000),
    )
    for name, optics, method, pulses in runs:
        count = pulses // 10 if quick else pulses
        source, bob = SourceSeed(fresh_seed(), optics.p_z, 0.5), ReceiverSeed(fresh_seed(), optics.p_z)
        nature = np.random.default_rng(_RNG_SEED)
        seconds, seen = _timed(
            lambda o=optics, s=source, b=bob, c=count, m=method, n=nature: detect(o, s, b, (0, c), Eve(), n, method=m)  # type: ignore[misc]
        )
        unit = "pulses" if method == "dense" else "effective pulses"
        found.append(Speed(name, unit, count / seconds / 1e6))
        found.append(Speed(name, "detections", len(seen.positions) / seconds / 1e6))
    found += _sequence(near, 20_000 if quick else 100_000)
    return found


def _sequence(near: Optics, pulses: int) -> list[Speed]:
    """Dense against dense: the same link, SeQUeNCe's photons."""
    source = SourceSeed.of(fresh_seed(), near.p_z, near.probabilities)
    settings = source.at(np.arange(pulses, dtype=np.uint64))
    bob = ReceiverSeed(fresh_seed(), near.p_z)
    few = SourceSeed.of(fresh_seed(), near.p_z, near.probabilities).at(np.arange(100, dtype=np.uint64))
    try:
        sequencesim.fly(near, few, bob, _RNG_SEED)  # the first flight imports it, which takes seconds
        seconds, seen = _timed(lambda: sequencesim.fly(near, settings, bob, _RNG_SEED))
    except LinkSettings:
        return []
    rates = pulses / seconds / 1e6, len(seen.positions) / seconds / 1e6
    return [Speed("SeQUeNCe, 1 km", unit, rate) for unit, rate in zip(("pulses", "detections"), rates, strict=True)]
