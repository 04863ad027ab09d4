"""Links that give no key under the analysis that delivers here: their quantum part alone, as detectors see it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.table import Table

from keysource.qkd.optics.eve import Eve
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.sampler import detect
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.plan import make_plan
from keysource.qkd.rates.asymptotic import ThresholdChannel, infinite_decoys
from keysource.qkd.rates.finite import Decoy, Security

GYS = Optics(Decoy(0.48, 0.05, 0.5), 0.5**0.5, 0.0, 0.21, 0.045, 0.85e-6, 0.033, 2e6)
OPTICS_ONLY = {
    "gys": (
        GYS,
        "Gobby, Yuan, Shields, APL 84 3762 (2004); decoys as in Ma et al., PRA 72 012326",
        (20.0, 60.0, 100.0),
    )
}
"""(optics at 0 km, reference, distances in km)."""
_PULSES = 400_000_000
_SECONDS = 3600.0
"""A block of an hour: still no key where there is none."""


def observe(name: str, as_json: bool) -> None:
    """Print gains and errors that simulated detectors count at several distances, beside the closed form."""
    optics, reference, distances = OPTICS_ONLY[name]
    rows = [_at(replace(optics, distance_km=km)) for km in distances]
    sentence = _no_key(replace(optics, distance_km=distances[0]))
    if as_json:
        print(json.dumps({"preset": name, "reference": reference, "key": sentence, "distances": rows}))
        return
    table = Table("km", "pulses", "gain", "closed form", "QBER", "closed form", "rate, infinite decoys", title=name)
    for row in rows:
        cells = (
            f"{row['gain']:.4e}",
            f"{row['expected_gain']:.4e}",
            f"{row['qber']:.4f}",
            f"{row['expected_qber']:.4f}",
        )
        table.add_row(f"{row['km']:g}", f"{row['pulses']:.0e}", *cells, f"{row['rate']:.4g}")
    Console().print(table)
    print(f"reference: {reference}\n{sentence}")


def _at(optics: Optics) -> dict[str, float]:
    """Of the signal intensity: gain of all, QBER of pulses whose bases agree."""
    source = SourceSeed(fresh_seed(), optics.p_z, optics.decoy.p1)
    bob = ReceiverSeed(fresh_seed(), optics.p_z)
    seen = detect(optics, source, bob, (0, _PULSES), Eve(), np.random.default_rng())
    alice = source.at(seen.positions)
    signal = alice.decoy == 0
    same = signal & (alice.check == bob.at(seen.positions))
    mu = optics.decoy.mu1
    return {
        "km": optics.distance_km,
        "pulses": _PULSES,
        "gain": float(signal.sum()) / (_PULSES * optics.decoy.p1),
        "expected_gain": optics.gain(mu),
        "qber": float((alice.bit != seen.bits)[same].mean()),
        "expected_qber": optics.qber(mu),
        "rate": infinite_decoys(ThresholdChannel(optics), mu, f=1.22, q=0.5),
    }


def _no_key(optics: Optics) -> str:
    pulses = math.floor(_SECONDS * optics.pulse_rate)
    try:
        length = make_plan(optics, pulses, Security(), "optimised").length
    except ValueError as error:
        return (
            f"optics only: a block of an hour at {optics.distance_km:g} km has no key under the analysis that"
            f" delivers here, which counts Cascade's parities in both directions ({error})"
        )
    return f"a block of an hour at {optics.distance_km:g} km has {length} bits of key"
