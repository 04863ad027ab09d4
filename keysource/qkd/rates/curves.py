"""Rate against distance under a named analysis: the table, JSON and plot of ``qvpn-qkd rate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.model import Optics
from keysource.qkd.rates.asymptotic import (
    Pairs,
    ThresholdChannel,
    infinite_decoys,
    no_decoys,
    one_decoy,
    one_node,
    plob,
    vacuum_and_weak,
)
from keysource.qkd.rates.expected import one_decoy_finite
from keysource.qkd.rates.finite import DELIVERING, Decoy, Security
from keysource.qkd.rates.lim2014 import Line, Settings, Three, evaluate
from keysource.qkd.rates.optimise import Point, maximise

FINITE = ("wiesemann2024", "rusca2018", "lim2014")
BOUNDS = ("plob", "one-node")
ANALYSES = (*FINITE, "one-decoy", "vacuum-weak", "infinite", "no-decoys", "bbm92", *BOUNDS)
PAPER_ERRORS = Security()
VACUUM = 2e-4
"""The third intensity of ``lim2014``, with three tenths of the pulses that are no signal."""


@dataclass(frozen=True, slots=True)
class Curve:
    """``f``: efficiency of error correction; ``n_z``: key-basis bits of a block, for finite analyses."""

    analysis: str
    optics: Optics
    f: float = 1.16
    n_z: float = 1e7
    security: Security = PAPER_ERRORS
    optimise: bool = False

    def at(self, km: float) -> tuple[float, dict[str, float]]:
        """(secret bits per pulse at this distance, the settings that give it)."""
        optics = replace(self.optics, distance_km=km)
        if self.optimise and self.analysis not in (*BOUNDS, "bbm92", "no-decoys"):
            return self._best(optics)
        return self._rate(optics), _settings(optics)

    def _rate(self, optics: Optics) -> float:
        channel, mu, nu, q = ThresholdChannel(optics), optics.decoy.mu1, optics.decoy.mu2, optics.p_z**2
        half = 10.0 ** (-optics.attenuation * optics.distance_km / 20.0) * optics.detector
        rates: dict[str, Callable[[], float]] = {
            "wiesemann2024": lambda: one_decoy_finite(optics, self.n_z, self.security, "wiesemann2024", self.f),
            "rusca2018": lambda: one_decoy_finite(optics, self.n_z, self.security, "rusca2018", self.f),
            "one-decoy": lambda: one_decoy(channel, mu, nu, f=self.f, q=q),
            "vacuum-weak": lambda: vacuum_and_weak(channel, mu, nu, f=self.f, q=q),
            "infinite": lambda: infinite_decoys(channel, mu, f=self.f, q=q),
            "lim2014": lambda: self._lim(optics),
            "no-decoys": lambda: max(no_decoys(channel, optics.eta * k / 100, f=self.f, q=q) for k in range(1, 200)),
            "bbm92": lambda: max(
                Pairs(k / 200, half, half, channel.y0, channel.y0, optics.misalignment).rate(f=self.f)
                for k in range(1, 80)
            ),
            "plob": lambda: plob(optics.line),
            "one-node": lambda: one_node(optics.line),
        }
        return rates[self.analysis]()

    def _lim(self, optics: Optics) -> float:
        decoy, recovery = optics.decoy, optics.recovery
        mu = Three(decoy.mu1, decoy.mu2, VACUUM)
        chosen = Settings(mu, Three(decoy.p1, (1.0 - decoy.p1) * 0.7, (1.0 - decoy.p1) * 0.3), optics.p_z)
        parts = optics.detector, optics.dark, recovery.after_pulse, optics.misalignment, optics.attenuation
        line = Line(optics.distance_km, *parts, self.f)
        if not chosen.sound:
            return 0.0
        return evaluate(line, chosen, self.n_z, self.security.secrecy, self.security.correctness).rate

    def _best(self, optics: Optics) -> tuple[float, dict[str, float]]:
        def chosen(point: Point) -> Optics:
            mu1, share, p1, p_z = point
            return replace(optics, decoy=Decoy(mu1, share * mu1, p1), p_z=p_z)

        box = [(0.05, 1.0), (0.02, 0.95), (0.01, 0.99), (0.1, 0.999)]
        start = (optics.decoy.mu1, optics.decoy.mu2 / optics.decoy.mu1, optics.decoy.p1, optics.p_z)
        point, rate = maximise(lambda p: self._rate(chosen(p)), box, [start, (0.45, 0.35, 0.65, 0.9)], rounds=250)
        return rate, _settings(chosen(point) if rate > 0.0 else optics)


def claim(analysis: str) -> str:
    """What a curve under this analysis is worth, in a few words."""
    if analysis == DELIVERING:
        return "finite key; the analysis that delivers keys"
    if analysis in FINITE:
        return "finite key, for curves only"
    return "upper bound" if analysis in BOUNDS else "infinitely many pulses"


def plot(
    curves: list[tuple[str, list[float], list[float]]], path: Path, title: str, unit: str = "secret bits per pulse"
) -> None:
    """(label, km, bits per pulse) each.  Raises :class:`LinkSettings` without matplotlib or where it cannot write."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LinkSettings("--plot needs matplotlib: pip install 'qvpn[plots]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for label, kms, rates in curves:
        shown = [(km, rate) for km, rate in zip(kms, rates, strict=True) if 0.0 < rate < float("inf")]
        axes.semilogy([km for km, _rate in shown], [rate for _km, rate in shown], label=label)
    axes.set_xlabel("fibre in km")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.grid(visible=True, which="major", alpha=0.4)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise LinkSettings(f"{path}: {error}") from None


def _settings(optics: Optics) -> dict[str, float]:
    return {"mu1": optics.decoy.mu1, "mu2": optics.decoy.mu2, "p1": optics.decoy.p1, "p_z": optics.p_z}
