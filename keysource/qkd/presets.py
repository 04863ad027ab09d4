"""Links by name.  A preset fixes optics, block and error budget; both ends and the fibre must have the same.

``demo`` is a slow laboratory source over 20 km, so that two cores simulate and distil it in real time beside
everything else; ``metro50`` a 1 GHz link over 50 km, which takes longer than real time here and says so;
``satellite`` one pass as one block, whose loss follows the elevation: the satellite is a trusted node that stores
and forwards.

``lim2014``, ``rusca2018`` and ``boaron2018`` have the optics of those publications; intensities and biases are chosen
for the analysis that delivers here, which has one decoy.  ``small10`` and ``small50`` are for ``qvpn-qkd attack``:
blocks so small that what Eve knows of a key can be counted exactly, under an error budget of one in a hundred that a
link refuses unless its ``error_limit`` is raised.
"""

from __future__ import annotations

from dataclasses import dataclass

from keysource.qkd.optics.entangled import PairOptics
from keysource.qkd.optics.model import Optics, Recovery
from keysource.qkd.optics.weather import Pass
from keysource.qkd.plan import Plan, make_plan
from keysource.qkd.rates.finite import Decoy, Security
from keysource.qkd.rates.proofs import Protocol, protocol_name
from keysource.qkd.rates.twodecoy import TwoDecoy

SECURITY = Security(secrecy=1e-9, correctness=1e-15)


@dataclass(frozen=True, slots=True)
class Preset:
    name: str
    about: str
    optics: Optics | PairOptics
    pulses: int
    """Pulses of a block."""
    schedule: str
    """Cascade's, see ``distill.cascade``."""
    abort_wait: float
    """Longest pause after aborted blocks in a row, in seconds: each costs a ticket of pad."""
    security: Security = SECURITY
    reference: str = ""
    """The publication whose link it is."""
    weather: str = "calm"
    """See ``optics.weather``; nature's, the ends do not know it."""

    def plan(self, *, tests: bool = False) -> Plan:
        """``tests``: some of Bob's gates test the efficiency of his detectors (``monitor`` = efficiency or both)."""
        return make_plan(self.optics, self.pulses, self.security, self.schedule, tests=tests)

    @property
    def protocol(self) -> Protocol:
        return protocol_name(self.optics.source)

    @property
    def block_seconds(self) -> float:
        """How long the pulses of a block take on the simulated link."""
        return self.pulses / self.optics.pulse_rate


_LAB = Decoy(mu1=0.45, mu2=0.15, p1=0.45)
_SPACE = Decoy(mu1=0.6, mu2=0.2, p1=0.5)
_SMALL = Security(secrecy=1e-2, correctness=1e-6)
_PASS = Pass(altitude_km=500.0, top_deg=75.0, least_deg=20.0, zenith_loss_db=22.0, air_db=0.9)

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
            "demo-2decoy",
            "as demo, with two decoys",
            Optics(TwoDecoy(mu1=0.6, mu2=0.2, mu3=2e-4, p1=0.3, p2=0.4), 0.65, 20.0, 0.2, 0.2, 1e-7, 0.005, 4e6),
            pulses=8_000_000,
            schedule="original",
            abort_wait=0.5,
        ),
        Preset(
            "demo-bbm92",
            "pairs over 10 km, 10 MHz, blocks of 2 s",
            PairOptics(0.04, 0.75, 0.0, 10.0, 0.2, 0.5, 1e-6, 0.005, 10e6, Recovery(50e-9)),
            pulses=20_000_000,
            schedule="original",
            abort_wait=0.5,
        ),
        Preset(
            "demo-e91",
            "as demo-bbm92, with a test of Bell's inequality in a fifth of Bob's gates",
            PairOptics(0.04, 0.75, 0.0, 10.0, 0.2, 0.5, 1e-6, 0.005, 10e6, Recovery(50e-9), chsh=0.2),
            pulses=20_000_000,
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
        Preset(
            "apd25",
            "25 km, 100 MHz, avalanche diodes with 5 us dead time and after-pulses, blocks of 4 s",
            Optics(_LAB, 0.75, 25.0, 0.2, 0.1, 1e-6, 0.01, 100e6, Recovery(5e-6, 0.01, 2e-6)),
            pulses=400_000_000,
            schedule="optimised",
            abort_wait=30.0,
        ),
        Preset(
            "satellite",
            "one pass of a satellite at 500 km, 10 MHz, one block of 5 minutes",
            Optics(_SPACE, 0.8, 0.0, 0.0, 0.5, 5e-7, 0.01, 10e6, Recovery(50e-9), _PASS.course(30)),
            pulses=round(10e6 * _PASS.seconds()),
            schedule="optimised",
            abort_wait=30.0,
        ),
        Preset(
            "lim2014",
            "50 km, 1 GHz, avalanche diodes with 4 % after-pulses, blocks of 1 s",
            Optics(Decoy(0.35, 0.126, 0.3), 0.7, 50.0, 0.2, 0.1, 6e-7, 0.005, 1e9, Recovery(0.0, 0.04, 1e-8)),
            pulses=1_000_000_000,
            schedule="optimised",
            abort_wait=30.0,
            reference="channel of Lim et al., PRA 89 022307 (2014), arXiv:1311.7129",
        ),
        Preset(
            "rusca2018",
            "50 km, 1 GHz, 100 ns dead time, blocks of 0.5 s",
            Optics(Decoy(0.35, 0.126, 0.45), 0.8, 50.0, 0.2, 0.5, 5e-9, 0.01, 1e9, Recovery(dead_time=100e-9)),
            pulses=500_000_000,
            schedule="optimised",
            abort_wait=30.0,
            reference="parameters of the figure of Rusca et al., APL 112 171104 (2018), arXiv:1801.03443",
        ),
        Preset(
            "boaron2018",
            "150 km of ultra-low-loss fibre (25.5 dB), 2.5 GHz, superconducting detectors, blocks of 1.6 s",
            Optics(Decoy(0.42, 0.15, 0.45), 0.8, 150.0, 0.17, 0.45, 4e-11, 0.01, 2.5e9, Recovery(dead_time=30e-9)),
            pulses=4_000_000_000,
            schedule="optimised",
            abort_wait=30.0,
            reference="after Boaron et al., PRL 121 190502 (2018): its clock and kind of fibre, usual detectors",
        ),
        Preset(
            "tabletop",
            "both ends on one table, 100 MHz: many detections for few pulses, for `qvpn-qkd bench --chain`",
            Optics(Decoy(0.5, 0.15, 0.5), 0.8, 0.0, 0.2, 0.9, 1e-7, 0.01, 100e6),
            pulses=7_000_000,
            schedule="original",
            abort_wait=0.5,
        ),
        Preset(
            "small10",
            "10 km, 1 MHz, small blocks for demonstrations of Eve",
            Optics(Decoy(0.6, 0.168, 0.3), 0.7, 10.0, 0.2, 0.3, 1e-7, 0.005, 1e6),
            pulses=1_200_000,
            schedule="optimised",
            abort_wait=0.1,
            security=_SMALL,
        ),
        Preset(
            "small50",
            "50 km, 1 GHz, small blocks for demonstrations of photon-number splitting",
            Optics(Decoy(0.5, 0.14, 0.3), 0.6, 50.0, 0.2, 0.2, 1e-6, 0.01, 1e9),
            pulses=20_000_000,
            schedule="optimised",
            abort_wait=0.1,
            security=_SMALL,
        ),
    )
}


def variant(name: str, protocol: Protocol | None) -> str:
    """The preset of this protocol in the family of preset ``name``: itself, or ``NAME-2decoy``, ``NAME-bbm92``,
    ``NAME-e91``.  Raises :class:`ValueError` where there is none."""
    family = name.rsplit("-", 1)[0]
    for each in (PRESETS[name], PRESETS[family] if family in PRESETS else PRESETS[name]):
        if protocol in (None, each.protocol):
            return each.name
    found = f"{family}-{str(protocol).removeprefix('bb84-')}"
    if found not in PRESETS:
        raise ValueError(f'preset "{name}" has no variant of {protocol}')
    return found
