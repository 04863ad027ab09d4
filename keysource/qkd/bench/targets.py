"""The goals for two cores, and whether a run met them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keysource.qkd.bench.chain import Chain, Slowness
from keysource.qkd.bench.correction import Corrected, Talked
from keysource.qkd.bench.light import Speed

RECORDS = (
    "Cascade on a CPU: 570 Mbit/s at f = 1.038 (arXiv:2101.12565)",
    "real-time post-processing: 13.72 Mbit/s of secret key (arXiv:1807.04484)",
    "secret key over 10 km: 115.8 Mbit/s (arXiv:2307.02364)",
    "amplification on a CPU: 261 Mbit/s, in blocks of 2.6 10^8 bits",
)
"""What others have reached; most of it is far above."""


@dataclass(frozen=True, slots=True)
class Target:
    """``least``: the measured value should be at least ``wanted``, else at most."""

    what: str
    wanted: float
    measured: float
    unit: str
    least: bool = True

    @property
    def met(self) -> bool:
        return self.measured >= self.wanted if self.least else self.measured <= self.wanted


def of_correction(corrected: Sequence[Corrected], talked: Sequence[Talked]) -> list[Target]:
    found = []
    for bits, wanted in ((1 << 14, 1.05), (1 << 17, 1.03)):
        own = [c for c in corrected if c.bits * c.side == bits and c.who.startswith("qvpn, optimised") and c.f]
        if own:
            worst = max(c.f or 0.0 for c in own)
            what = f"Cascade's f, keys of 2^{bits.bit_length() - 1} bits, worst of 1 to 5 %"
            found.append(Target(what, wanted, worst, "", least=False))
    every = [c for c in corrected if c.who.startswith("qvpn, optimised")]
    if every:
        share = sum(c.failed for c in every) / sum(c.frames for c in every)
        what = f"frames left with an error, of {sum(c.frames for c in every)}"
        found.append(Target(what, 1e-3, share, "", least=False))
    for schedule, mbits in (("original", 10.0), ("optimised", 3.0)):
        speeds = [t.mbits for t in talked if t.schedule == schedule]
        if speeds:
            what = f"Cascade through two processes, {schedule}, slowest of 1 to 5 %"
            found.append(Target(what, mbits, min(speeds), "Mbit/s"))
    return found


def of_speeds(speeds: Sequence[Speed]) -> list[Target]:
    wanted = (
        ("amplification by numpy, 1e+06", "bit in", 15.0, "Mbit/s"),
        ("amplification by FFTW", "bit in", 40.0, "Mbit/s"),
        ("dense sampler, 50 km", "pulses", 15.0, "M pulses/s"),
        ("sparse sampler, 50 km", "effective pulses", 700.0, "M effective pulses/s"),
        ("sparse, dead time", "detections", 8.0, "M detections/s"),
    )
    found = []
    for name, unit, least, said in wanted:
        own = [s for s in speeds if s.what.startswith(name) and s.unit == unit]
        rates = [s.per_wall_second if "FFTW" in name else s.per_second for s in own]  # threads: by the wall
        found += [Target(f"{name}{' bits' if 'numpy' in name else ''}", least, rate, said) for rate in rates[:1]]
    return found


def of_chain(chain: Chain | None, slow: Slowness | None) -> list[Target]:
    found = []
    if chain is not None:
        what = f"whole post-processing in processes for {chain.seconds:.0f} s, sifted"
        found.append(Target(what, 3.0, chain.sifted, "Mbit/s"))
    if slow is not None:
        what = f"{slow.preset} with its light, seconds here for one (stretch)"
        found.append(Target(what, 1.0, slow.seconds, "s", least=False))
    return found
