"""``qvpn-qkd rate`` and ``repeater``: secret bits against distance."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from keysource.qkd.errors import LinkSettings
from keysource.qkd.observe import OPTICS_ONLY
from keysource.qkd.optics.entangled import AnyOptics, PairOptics
from keysource.qkd.optics.model import Optics, Recovery
from keysource.qkd.presets import PRESETS
from keysource.qkd.rates.curves import ANALYSES, Curve, claim, plot, usual
from keysource.qkd.rates.finite import Decoy, Security
from keysource.qkd.rates.twodecoy import TwoDecoy
from keysource.qkd.repeaters import Chain, direct, trusted_chain

_RUSCA = Optics(Decoy(0.5, 0.15, 0.7), 0.9, 0.0, 0.2, 0.5, 5e-9, 0.01, 1e9, Recovery(dead_time=100e-9))
PUBLISHED = {
    "gys": OPTICS_ONLY["gys"][:2],
    "rusca2018": (_RUSCA, "Rusca et al., APL 112 171104 (2018), parameters of its figure"),
}
"""Links of publications, for curves; those of ``qvpn-qkd presets`` go as well."""


def rate(
    analysis: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(ANALYSES)}; may be given several times.")
    ] = None,
    link: Annotated[str, typer.Option(help=f"{', '.join(PUBLISHED)}, or one of qvpn-qkd presets.")] = "metro50",
    start: Annotated[float, typer.Option("--from", min=0.0, help="km")] = 0.0,
    end: Annotated[float, typer.Option("--to", min=0.0, max=2000.0, help="km")] = 200.0,
    step: Annotated[float, typer.Option(min=0.1, help="km")] = 20.0,
    mu: Annotated[tuple[float, float] | None, typer.Option(help="Signal and decoy, mean photons a pulse.")] = None,
    mu3: Annotated[float | None, typer.Option(help="Third intensity: makes it a link with two decoys.")] = None,
    p1: Annotated[float | None, typer.Option(help="Probability of the signal.")] = None,
    p2: Annotated[float | None, typer.Option(help="Probability of the brighter decoy, of two.")] = None,
    pairs: Annotated[float | None, typer.Option(help="Mean pairs a pulse, of a source of pairs.")] = None,
    p_z: Annotated[float | None, typer.Option(help="Probability of the key basis.")] = None,
    attenuation: Annotated[float | None, typer.Option(help="dB/km")] = None,
    detector: Annotated[float | None, typer.Option(help="Efficiency with Bob's optics, 0 to 1.")] = None,
    dark: Annotated[float | None, typer.Option(help="Dark counts per gate and detector.")] = None,
    misalignment: Annotated[float | None, typer.Option(help="Share of the light at the wrong port.")] = None,
    pulse_rate: Annotated[float | None, typer.Option(min=1.0, help="Pulses a second.")] = None,
    dead_time: Annotated[float | None, typer.Option(min=0.0, help="Of the detectors after a click, seconds.")] = None,
    after_pulse: Annotated[float | None, typer.Option(help="Probability that a click leaves an after-pulse.")] = None,
    n_z: Annotated[float, typer.Option(min=1.0, help="Key-basis bits of a block, for finite analyses.")] = 1e7,
    f: Annotated[float, typer.Option(min=1.0, help="Efficiency of error correction.")] = 1.16,
    secrecy: Annotated[float, typer.Option(help="Error of secrecy of a block.")] = 1e-9,
    correctness: Annotated[float, typer.Option(help="Error of correctness of a block.")] = 1e-15,
    optimise: Annotated[bool, typer.Option("--optimise", help="The best intensities and biases everywhere.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a plot (.png, .svg, .pdf).")] = None,
) -> None:
    """Secret bits per pulse against distance, under one or more analyses."""
    for name in analysis or ():
        if name not in ANALYSES:
            raise LinkSettings(f"--analysis {name}: none of {', '.join(ANALYSES)}")
    if end < start or not 0.0 < secrecy < 1.0 or not 0.0 < correctness < 1.0:
        raise LinkSettings("--to is not before --from, and errors lie between 0 and 1")
    parts = {"attenuation": attenuation, "detector": detector, "dark": dark, "misalignment": misalignment}
    optics = _changed(_source(_link(link), mu, mu3, p1, p2, pairs), parts | {"p_z": p_z})
    optics = _resting(optics, pulse_rate, dead_time, after_pulse)
    wanted = analysis or usual(optics)
    kms = [start + step * i for i in range(int((end - start) / step + 1e-9) + 1)]
    security = Security(secrecy, correctness)
    curves = [Curve(name, optics, f, n_z, security, optimise) for name in wanted]
    found = [[curve.at(km) for km in kms] for curve in curves]
    if picture is not None:
        plot([(name, kms, [r for r, _s in row]) for name, row in zip(wanted, found, strict=True)], picture, link)
    if as_json:
        rows = {
            name: [
                {"km": km, "rate": r if math.isfinite(r) else None, **s} for km, (r, s) in zip(kms, row, strict=True)
            ]
            for name, row in zip(wanted, found, strict=True)
        }
        print(json.dumps({"link": link, "optics": asdict(optics), "f": f, "n_z": n_z, "rates": rows}))
        return
    table = Table("km", *(f"{name}\n[dim]{claim(name)}[/dim]" for name in wanted), title=f"{link}: bits per pulse")
    for i, km in enumerate(kms):
        table.add_row(f"{km:g}", *(f"{row[i][0]:.5g}" if row[i][0] else "-" for row in found))
    Console().print(table)


def repeater(
    end: Annotated[float, typer.Option("--to", min=10.0, max=5000.0, help="km")] = 1000.0,
    step: Annotated[float, typer.Option(min=1.0, help="km")] = 100.0,
    links: Annotated[int, typer.Option(min=1, max=64, help="Elementary links of the chain.")] = 8,
    memories: Annotated[int, typer.Option(min=1, max=1_000_000, help="Per link, trying in parallel.")] = 1000,
    efficiency: Annotated[float, typer.Option(min=0.01, max=1.0, help="Memory to detector.")] = 0.9,
    fidelity: Annotated[float, typer.Option(min=0.25, max=1.0, help="Of a fresh pair.")] = 0.995,
    t2: Annotated[float, typer.Option(min=1e-9, help="Dephasing time of a memory, seconds.")] = 10.0,
    pairs: Annotated[int, typer.Option(min=10, max=1_000_000, help="Simulated end-to-end pairs per point.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a plot (.png, .svg, .pdf).")] = None,
) -> None:
    """Secret bits per second: a chain of repeaters (simulated) beside what no direct transmission passes (1 GHz)."""
    kms = [step * (i + 1) for i in range(int(end / step + 1e-9))]
    nature = np.random.default_rng()
    chains = [Chain(km, links, efficiency, fidelity, t2, parallel=memories) for km in kms]
    columns = {
        f"chain of {links}": [chain.key_rate(pairs, nature) for chain in chains],
        "direct, at most (PLOB)": [direct(km, 1e9) for km in kms],
        f"{links - 1} trusted nodes, at most": [trusted_chain(km, links, 1e9) for km in kms],
    }
    if picture is not None:
        curves = [(name, kms, rates) for name, rates in columns.items()]
        plot(curves, picture, "repeaters, direct transmission, trusted nodes", "secret bits per second")
    if as_json:
        print(json.dumps({"km": kms, "rates": columns}))
        return
    table = Table("km", *columns, title="secret bits per second; trusted nodes see every key")
    for i, km in enumerate(kms):
        table.add_row(f"{km:g}", *(f"{rates[i]:.4g}" if rates[i] else "-" for rates in columns.values()))
    Console().print(table)


def _link(name: str) -> AnyOptics:
    if name in PUBLISHED:
        return PUBLISHED[name][0]
    if name in PRESETS:
        optics = PRESETS[name].optics
        return optics if isinstance(optics, PairOptics) else replace(optics, course=())
    raise LinkSettings(f"--link {name}: none of {', '.join((*PUBLISHED, *PRESETS))}")


def _source(
    optics: AnyOptics,
    mu: tuple[float, float] | None,
    mu3: float | None,
    p1: float | None,
    p2: float | None,
    pairs: float | None,
) -> AnyOptics:
    """The link with what was said of its source.  Raises :class:`LinkSettings`."""
    of_pulses = {"--mu": mu, "--mu3": mu3, "--p1": p1, "--p2": p2}
    try:
        if isinstance(optics, PairOptics):
            if given := [name for name, value in of_pulses.items() if value is not None]:
                raise LinkSettings(f"{given[0]}: is of weak pulses, and this link has a source of pairs")
            return optics if pairs is None else replace(optics, pairs=pairs)
        if pairs is not None:
            raise LinkSettings("--pairs: is of a source of pairs, and this link has weak pulses")
        return replace(optics, decoy=_decoy(optics, mu, mu3, p1, p2))
    except ValueError as error:
        raise LinkSettings(f"--mu, --mu3, --p1, --p2, --pairs: {error}") from None


def _decoy(
    optics: Optics, mu: tuple[float, float] | None, mu3: float | None, p1: float | None, p2: float | None
) -> Decoy | TwoDecoy:
    old = optics.decoy
    mus, first = mu or (old.mu1, old.mu2), old.p1 if p1 is None else p1
    if mu3 is None and isinstance(old, Decoy):
        if p2 is not None:
            raise LinkSettings("--p2: with one decoy all that is no signal is decoy; two need --mu3")
        return Decoy(*mus, first)
    third = old.mu3 if mu3 is None and isinstance(old, TwoDecoy) else float(mu3 or 0.0)
    share = old.p2 / (1.0 - old.p1) if isinstance(old, TwoDecoy) else 0.7
    return TwoDecoy(*mus, third, first, share * (1.0 - first) if p2 is None else p2)


def _changed(optics: AnyOptics, given: dict[str, float | None]) -> AnyOptics:
    """Raises :class:`LinkSettings` for a value outside of 0 to 1."""
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        if not (0.0 < value < 1.0 if name == "p_z" else 0.0 <= value <= 1.0):
            raise LinkSettings(f"--{name.replace('_', '-')} {value}: lies between 0 and 1")
    return replace(optics, **values)  # type: ignore[arg-type]


def _resting(
    optics: AnyOptics, pulse_rate: float | None, dead_time: float | None, after_pulse: float | None
) -> AnyOptics:
    """What the detectors do after a click.  Raises :class:`LinkSettings`."""
    old = optics.recovery
    try:
        recovery = Recovery(
            old.dead_time if dead_time is None else dead_time,
            old.after_pulse if after_pulse is None else after_pulse,
            old.trap_time,
        )
        return replace(optics, recovery=recovery, pulse_rate=pulse_rate or optics.pulse_rate)
    except ValueError as error:
        raise LinkSettings(f"--dead-time, --after-pulse: {error}") from None
