"""Rate against distance under a named analysis: the table, JSON and plot of ``qvpn-qkd rate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keysource.qkd.errors import LinkSettings
from keysource.qkd.optics.entangled import AnyOptics, PairOptics
from keysource.qkd.optics.model import Optics
from keysource.qkd.rates import stand, tomamichel, twodecoy
from keysource.qkd.rates.asymptotic import (
    Pairs,
    ThresholdChannel,
    infinite_decoys,
    no_decoys,
    one_decoy,
    one_node,
    plob,
    two_decoys,
    vacuum_and_weak,
)
from keysource.qkd.rates.expected import delivering_finite, one_decoy_finite
from keysource.qkd.rates.finite import DELIVERING, Security
from keysource.qkd.rates.lim2014 import Line, Settings, Three, evaluate
from keysource.qkd.rates.optimise import maximise
from keysource.qkd.rates.proofs import proof_name
from keysource.qkd.rates.twodecoy import TwoDecoy

DELIVERS = (DELIVERING, twodecoy.NAME, tomamichel.NAME)
"""One per protocol: one decoy, two decoys, pairs."""
FINITE = (*DELIVERS, "rusca2018", "lim2014")
BOUNDS = ("plob", "one-node")
PAIRS = (tomamichel.NAME, "bbm92")
THREE = (twodecoy.NAME, "lim2014", "two-decoys")
ANALYSES = (*FINITE, "one-decoy", "two-decoys", "vacuum-weak", "infinite", "no-decoys", "bbm92", *BOUNDS)
PAPER_ERRORS = Security()


@dataclass(frozen=True, slots=True)
class Curve:
    """``f``: efficiency of error correction; ``n_z``: key-basis bits of a block, for finite analyses."""

    analysis: str
    optics: AnyOptics
    f: float = 1.16
    n_z: float = 1e7
    security: Security = PAPER_ERRORS
    optimise: bool = False

    def at(self, km: float) -> tuple[float, dict[str, float]]:
        """(secret bits per pulse at this distance, the settings that give it).

        Raises :class:`LinkSettings` for an analysis that says nothing of this kind of link.
        """
        optics = self._seen(stand.at_km(self.optics, km))
        if self.optimise and self.analysis not in (*BOUNDS, "no-decoys"):
            return self._best(optics)
        if self.analysis in PAIRS and isinstance(self.optics, Optics):
            return self._best(optics, rounds=60)  # it has no source of pairs: the best one stands for it
        return self._rate(optics), stand.settings(optics)

    def _seen(self, optics: AnyOptics) -> AnyOptics:
        if self.analysis in BOUNDS:
            return optics
        if self.analysis in PAIRS:
            return stand.pair_link(optics)
        if self.analysis in THREE:
            return stand.two_decoy_link(optics, self.analysis)
        if self.analysis in ("infinite", "no-decoys"):  # of the signal alone
            return stand.weak(optics, self.analysis)
        return stand.one_decoy_link(optics, self.analysis)

    def _rate(self, optics: AnyOptics) -> float:
        if self.analysis in BOUNDS:
            line = optics.line * (optics.line_a if isinstance(optics, PairOptics) else 1.0)
            return plob(line) if self.analysis == "plob" else one_node(line)
        if self.analysis in DELIVERS:
            return delivering_finite(optics, self.n_z, self.security, self.f)
        return self._pairs(optics) if isinstance(optics, PairOptics) else self._weak(optics)

    def _pairs(self, optics: PairOptics) -> float:
        link, dark = optics.link, 1.0 - (1.0 - optics.dark) ** 2
        closed = Pairs(link.pairs, link.eta_a, link.eta_b, dark, dark, link.e_d)
        return closed.rate(f=self.f, q=optics.p_z**2 * optics.live() * (1.0 - optics.chsh))

    def _weak(self, optics: Optics) -> float:
        channel, mu, nu, q = ThresholdChannel(optics), optics.decoy.mu1, optics.decoy.mu2, optics.p_z**2
        rates: dict[str, Callable[[], float]] = {
            "rusca2018": lambda: one_decoy_finite(optics, self.n_z, self.security, "rusca2018", self.f),
            "one-decoy": lambda: one_decoy(channel, mu, nu, f=self.f, q=q),
            "two-decoys": lambda: two_decoys(channel, _three(optics), f=self.f, q=q),
            "vacuum-weak": lambda: vacuum_and_weak(channel, mu, nu, f=self.f, q=q),
            "infinite": lambda: infinite_decoys(channel, mu, f=self.f, q=q),
            "lim2014": lambda: self._lim(optics),
            "no-decoys": lambda: max(no_decoys(channel, optics.eta * k / 100, f=self.f, q=q) for k in range(1, 200)),
        }
        return rates[self.analysis]()

    def _lim(self, optics: Optics) -> float:
        recovery = optics.recovery
        chosen = Settings(Three(*optics.intensities), Three(*optics.probabilities), optics.p_z)
        parts = optics.detector, optics.dark, recovery.after_pulse, optics.misalignment, optics.attenuation
        line = Line(optics.distance_km, *parts, self.f)
        if not chosen.sound:
            return 0.0
        return evaluate(line, chosen, self.n_z, self.security.secrecy, self.security.correctness).rate

    def _best(self, optics: AnyOptics, rounds: int = 250) -> tuple[float, dict[str, float]]:
        limits, starts = stand.box(optics)
        point, rate = maximise(lambda p: self._rate(stand.turned(optics, p)), limits, starts, rounds=rounds)
        return rate, stand.settings(stand.turned(optics, point) if rate > 0.0 else optics)


def _three(optics: Optics) -> tuple[float, float, float]:
    mu1, mu2, mu3 = optics.intensities
    return mu1, mu2, mu3


def usual(optics: AnyOptics) -> list[str]:
    """The analyses that say most of a link of this kind: the one that delivers, without finite size, the bound."""
    if isinstance(optics, PairOptics):
        return [tomamichel.NAME, "bbm92", "plob"]
    more = ["two-decoys"] if isinstance(optics.decoy, TwoDecoy) else []
    return [proof_name(optics.source), *more, "infinite", "plob"]


def claim(analysis: str) -> str:
    """What a curve under this analysis is worth, in a few words."""
    if analysis in DELIVERS:
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
