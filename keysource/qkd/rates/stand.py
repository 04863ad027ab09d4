"""One link seen by every analysis: what stands for it where an analysis is about another kind of source.

A link with one decoy has no third intensity and none has a source of pairs.  So that curves can lie side by side, an
analysis gets the link's fibre and detectors with a source of its own kind; where the link has that kind of source
itself, its settings are used as they are.
"""

from __future__ import annotations

from dataclasses import replace

from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.entangled import AnyOptics, PairOptics
from keysource.qkd.optics.model import Optics
from keysource.qkd.rates.finite import Decoy
from keysource.qkd.rates.optimise import Point
from keysource.qkd.rates.twodecoy import TwoDecoy

VACUUM = 2e-4
"""The third intensity, where the link has none; with three tenths of the pulses that are no signal."""
BRIGHTNESS = 0.05
"""Pairs a pulse, where the link has none."""
Box = list[tuple[float, float]]


def at_km(optics: AnyOptics, km: float) -> AnyOptics:
    """The link with ``km`` of fibre in all; a source of pairs stays at the same share of the way."""
    if isinstance(optics, Optics):
        return replace(optics, distance_km=km)
    whole = optics.km_a + optics.km_b
    share = optics.km_a / whole if whole > 0.0 else 0.5
    return replace(optics, km_a=share * km, km_b=(1.0 - share) * km)


def weak(optics: AnyOptics, analysis: str) -> Optics:
    """Raises :class:`LinkSettings` for a link of pairs."""
    if isinstance(optics, PairOptics):
        raise LinkSettings(f"--analysis {analysis}: of weak pulses, and this link has a source of pairs")
    return optics


def one_decoy_link(optics: AnyOptics, analysis: str) -> Optics:
    """The link without its faintest intensity."""
    link = weak(optics, analysis)
    if isinstance(link.decoy, Decoy):
        return link
    return replace(link, decoy=Decoy(link.decoy.mu1, link.decoy.mu2, link.decoy.p1))


def two_decoy_link(optics: AnyOptics, analysis: str) -> Optics:
    """The link with a third intensity, near vacuum."""
    link = weak(optics, analysis)
    if isinstance(link.decoy, TwoDecoy):
        return link
    mu1, mu2, p1 = link.decoy.mu1, link.decoy.mu2, link.decoy.p1
    if not mu1 > mu2 + VACUUM > 2.0 * VACUUM:
        raise LinkSettings(f"--analysis {analysis}: intensities {mu1:g} and {mu2:g} leave no room for {VACUUM:g}")
    return replace(link, decoy=TwoDecoy(mu1, mu2, VACUUM, p1, 0.7 * (1.0 - p1)))


def pair_link(optics: AnyOptics) -> PairOptics:
    """The link with a source of pairs in its middle and the same detectors at both ends, without after-pulses."""
    if isinstance(optics, PairOptics):
        return optics
    half, recovery = optics.distance_km / 2.0, replace(optics.recovery, after_pulse=0.0)
    fibre = optics.attenuation, optics.detector, optics.dark, optics.misalignment, optics.pulse_rate
    return PairOptics(BRIGHTNESS, optics.p_z, half, half, *fibre, recovery)


# What an optimiser may turn


def settings(optics: AnyOptics) -> dict[str, float]:
    """What the link's sites choose, by name."""
    if isinstance(optics, PairOptics):
        return {"pairs": optics.pairs, "p_z": optics.p_z}
    decoy = optics.decoy
    found = {"mu1": decoy.mu1, "mu2": decoy.mu2, "p1": decoy.p1, "p_z": optics.p_z}
    return found if isinstance(decoy, Decoy) else found | {"mu3": decoy.mu3, "p2": decoy.p2}


def turned(optics: AnyOptics, point: Point) -> AnyOptics:
    """The link with the settings of a point in :func:`box`."""
    if isinstance(optics, PairOptics):
        return replace(optics, pairs=point[0], p_z=point[1])
    mu1, share, p1, p_z = point[:4]
    if isinstance(optics.decoy, Decoy):
        return replace(optics, decoy=Decoy(mu1, share * mu1, p1), p_z=p_z)
    mu3 = optics.decoy.mu3
    mu2 = mu3 + share * (mu1 - 2.0 * mu3)
    return replace(optics, decoy=TwoDecoy(mu1, mu2, mu3, p1, point[4] * (1.0 - p1)), p_z=p_z)


def box(optics: AnyOptics) -> tuple[Box, list[Point]]:
    """(limits of each number that may be turned, where to begin)."""
    if isinstance(optics, PairOptics):
        return [(0.001, 0.4), (0.1, 0.999)], [(optics.pairs, optics.p_z), (0.1, 0.8)]
    if isinstance(optics.decoy, Decoy):
        start = (optics.decoy.mu1, optics.decoy.mu2 / optics.decoy.mu1, optics.decoy.p1, optics.p_z)
        return [(0.05, 1.0), (0.02, 0.95), (0.01, 0.99), (0.1, 0.999)], [start, (0.45, 0.35, 0.65, 0.9)]
    mu1, mu2, mu3 = optics.decoy.intensities
    low = max(0.05, 2.5 * mu3)
    share = (mu2 - mu3) / (mu1 - 2.0 * mu3)
    own = (mu1, share, optics.decoy.p1, optics.p_z, optics.decoy.p2 / (1.0 - optics.decoy.p1))
    limits = [(low, max(1.0, 2.0 * low)), (0.02, 0.95), (0.01, 0.99), (0.1, 0.999), (0.05, 0.95)]
    return limits, [own, (0.45, 0.35, 0.65, 0.9, 0.7)]
