"""Links by name.  A preset fixes optics, block and error budget; both ends and the fibre must have the same.

``demo`` is a slow laboratory source over 20 km, so that two cores simulate and distil it in real time beside
everything else; ``metro50`` a 1 GHz link over 50 km, which takes longer than real time here and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from keysource.qkd.optics.model import Optics
from keysource.qkd.plan import Plan, make_plan
from keysource.qkd.rates.finite import Decoy, Security

SECURITY = Security(secrecy=1e-9, correctness=1e-15)


@dataclass(frozen=True, slots=True)
class Preset:
    name: str
    about: str
    optics: Optics
    pulses: int
    """Pulses of a block."""
    schedule: str
    """Cascade's, see ``distill.cascade``."""
    abort_wait: float
    """Longest pause after aborted blocks in a row, in seconds: each costs a ticket of pad."""
    security: Security = SECURITY

    def plan(self) -> Plan:
        return make_plan(self.optics, self.pulses, self.security, self.schedule)

    @property
    def block_seconds(self) -> float:
        """How long the pulses of a block take on the simulated link."""
        return self.pulses / self.optics.pulse_rate


_LAB = Decoy(mu1=0.45, mu2=0.15, p1=0.45)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "demo",
            "20 km, 4 MHz laboratory source, blocks of 2 s",
            Optics(Decoy(mu1=0.5, mu2=0.15, p1=0.4), 0.65, 20.0, 0.2, 0.2, 1e-7, 0.005, 4e6),
            pulses=8_000_000,
            schedule="original",
            abort_wait=0.5,
        ),
        Preset(
            "lab10",
            "10 km, 20 MHz laboratory source, blocks of 1 s, optimised Cascade",
            Optics(_LAB, 0.7, 10.0, 0.2, 0.2, 1e-7, 0.01, 20e6),
            pulses=20_000_000,
            schedule="optimised",
            abort_wait=30.0,
        ),
        Preset(
            "metro25",
            "25 km, 100 MHz, blocks of 0.5 s",
            Optics(_LAB, 0.75, 25.0, 0.2, 0.2, 1e-7, 0.01, 100e6),
            pulses=50_000_000,
            schedule="optimised",
            abort_wait=30.0,
        ),
        Preset(
            "metro50",
            "50 km, 1 GHz, blocks of 0.2 s",
            Optics(Decoy(0.5, 0.15, 0.5), 0.75, 50.0, 0.2, 0.2, 1e-7, 0.01, 1e9),
            pulses=200_000_000,
            schedule="optimised",
            abort_wait=30.0,
        ),
    )
}
