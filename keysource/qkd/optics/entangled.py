"""A link with a source of entangled pairs in the fibre: its closed form, and sparse sampling of both sites' clicks.

The source sits between the sites, ``km_a`` from Alice and ``km_b`` from Bob; it may be Eve's, no proof trusts it.
Both sites choose a basis for every pulse from their own seeds and measure: Z at 0, X at 45 degrees; for E91 Bob turns
some of his gates to 22.5 or -22.5 degrees (:data:`B_0`, :data:`B_1`), and S comes of those and both of Alice's bases.

Photons are those of :mod:`keysource.qkd.optics.pairs`, the state seen in Alice's basis and turned into Bob's, so
the errors of several pairs in one pulse come out by themselves.  Only pulses with light or a dark click anywhere are
looked at (geometric skipping); what happens there is drawn under just that condition: the dense distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.blinding import Blinding
from keysource.qkd.optics.detectors import Clicks, Receiver, bits_of
from keysource.qkd.optics.eve import Eve, InterceptResend
from keysource.qkd.optics.model import Optics, Recovery, Stretch
from keysource.qkd.optics.monitors import ATTENUATOR, TEST_SHARE, Readings, read
from keysource.qkd.optics.pairblinding import faked_pairs
from keysource.qkd.optics.pairs import MOST, PairLink, at_bob
from keysource.qkd.optics.sampler import Detections, candidates
from keysource.qkd.optics.settings import Positions, ReceiverSeed
from keysource.qkd.rates.asymptotic import Pairs
from keysource.qkd.rates.finite import Counts
from keysource.qkd.rates.tomamichel import Entangled

Z, X, B_0, B_1 = 0, 1, 2, 3
"""What a site measures, as it is announced."""
ANGLES = np.array([0.0, math.pi / 4.0, math.pi / 8.0, -math.pi / 8.0])
NEVER_DEAD = Recovery()


@dataclass(frozen=True, slots=True)
class PairOptics:
    """One link.  Probabilities are per pulse; both sites have the same kind of detectors."""

    pairs: float
    """Mean number of pairs of a pulse."""
    p_z: float
    """Probability of the key basis Z, at both sites."""
    km_a: float
    km_b: float
    attenuation: float
    """Fibre loss in dB/km."""
    detector: float
    """Transmission of a site's optics times detector efficiency, 0..1."""
    dark: float
    """Dark count probability per gate and detector."""
    misalignment: float
    """e_d: fraction of the light at Bob's wrong port."""
    pulse_rate: float
    recovery: Recovery = NEVER_DEAD
    chsh: float = 0.0
    """Share of Bob's gates that test for CHSH (E91)."""

    def __post_init__(self) -> None:
        if self.recovery.after_pulse > 0.0:
            raise ValueError("after-pulses have no closed form on a link of pairs")
        if not 0.0 < self.pairs < 0.5:
            raise ValueError("a mean of 0 to 0.5 pairs a pulse is what the model holds for")

    @property
    def source(self) -> Entangled:
        return Entangled(self.chsh)

    @property
    def line_a(self) -> float:
        return float(10.0 ** (-self.attenuation * self.km_a / 10.0))

    @property
    def line(self) -> float:
        """Transmission of Bob's fibre alone."""
        return float(10.0 ** (-self.attenuation * self.km_b / 10.0))

    @property
    def link(self) -> PairLink:
        return PairLink(
            self.pairs, self.line_a * self.detector, self.line * self.detector, self.dark, self.misalignment
        )

    @property
    def intensities(self) -> tuple[float, ...]:
        """Pulses are of one kind."""
        return (self.pairs,)

    @property
    def probabilities(self) -> tuple[float, ...]:
        return (1.0,)

    def changed(self, loss_db: float = 0.0, dark: float = 0.0, misalignment: float | None = None) -> PairOptics:
        """With other loss before both sites' detectors, more background, another alignment."""
        at_port = self.misalignment if misalignment is None else misalignment
        eta = self.detector * 10.0 ** (-loss_db / 10.0)
        return replace(self, detector=eta, dark=self.dark + dark, misalignment=at_port)

    def stretches(self) -> list[tuple[float, PairOptics]]:
        return [(1.0, self)]

    @property
    def course(self) -> tuple[Stretch, ...]:
        return ()

    # The closed form

    def _closed(self) -> Pairs:
        link, dark = self.link, 1.0 - (1.0 - self.dark) ** 2
        return Pairs(link.pairs, link.eta_a, link.eta_b, dark, dark, link.e_d)

    def singles(self) -> tuple[float, float]:
        """(Alice, Bob): detections per pulse, whatever the other has."""
        dead = self.recovery.dead_gates(self.pulse_rate)
        alice, bob = (p / (1.0 + p * dead) for p in (self.lit(1.0, 0), self.lit(1.0, 1)))
        return alice, bob

    def lit(self, transmission: float, site: int) -> float:
        """Clicks per pulse of detectors that are always ready, at Alice's (``site`` 0) or Bob's (1), behind an
        attenuator."""
        eta = transmission * (self.link.eta_a, self.link.eta_b)[site]
        return 1.0 - (1.0 - self.dark) ** 2 / (1.0 + eta * self.pairs / 2.0) ** 2

    def ready_gain(self) -> float:
        """Coincidences per pulse of detectors that are always ready."""
        return self._closed().gain()

    def live(self) -> float:
        """Share of the gates in which both sites' detectors are on, at least: their pauses are counted as unrelated,
        though a coincidence makes both pause at once."""
        dead = self.recovery.dead_gates(self.pulse_rate)
        alice, bob = self.singles()
        return (1.0 - alice * dead) * (1.0 - bob * dead)

    def gain(self, mu: float) -> float:
        """Coincidences per pulse, of its one kind of pulses."""
        return self.mean_gain()

    def mean_gain(self) -> float:
        """Coincidences per pulse."""
        return self.ready_gain() * self.live()

    def mean_qber(self) -> float:
        """Error ratio of coincidences in the same basis."""
        closed = self._closed()
        return closed.error_gain() / closed.gain()

    def sifted(self) -> tuple[float, float]:
        """(key basis, check basis): coincidences per pulse where both sites chose it."""
        gain = self.mean_gain() * (1.0 - self.chsh)
        return gain * self.p_z**2, gain * (1.0 - self.p_z) ** 2

    def expected(self, n_z: float, n_x: float) -> Counts:
        """The statistics of a block of so many sifted coincidences, on average."""
        qber = self.mean_qber()
        return Counts((n_z,), (n_z * qber,), (n_x,), (n_x * qber,))


AnyOptics = Optics | PairOptics


@dataclass(frozen=True, slots=True)
class PairSite:
    """One site of a link of pairs, as a monitor there knows it: Alice's (``site`` 0) or Bob's (1)."""

    optics: PairOptics
    site: int

    def expected_share(self) -> float:
        """Share of all clicks that an honest link has in gates with the attenuator in."""
        weak, plain = (self.optics.lit(transmission, self.site) for transmission in (ATTENUATOR, 1.0))
        return TEST_SHARE * weak / (TEST_SHARE * weak + (1.0 - TEST_SHARE) * plain)


def watched(optics: AnyOptics, site: int) -> Optics | PairSite:
    """What a monitor at Alice's (0) or Bob's (1) compares its readings with."""
    return optics if isinstance(optics, Optics) else PairSite(optics, site)


# Both sites' clicks


def detect_pairs(
    optics: PairOptics,
    alice: ReceiverSeed,
    bob: ReceiverSeed,
    span: tuple[int, int],
    eve: Eve,
    nature: np.random.Generator,
    receivers: tuple[Receiver, Receiver] | None = None,
) -> tuple[Detections, Detections]:
    """Fly the pulses ``span`` = (first, count): what Alice's and what Bob's electronics report."""
    both = receivers or _receivers(optics)
    if isinstance(eve, Blinding) and eve.fraction > 0.0:
        return _blinded(optics, (alice, bob), span, eve, nature, both)
    link, (first, count) = optics.link, span
    empty, quiet = 1.0 / (1.0 + link.pairs / 2.0) ** 2, (1.0 - link.dark) ** 4
    something = 1.0 - empty * quiet
    positions = candidates(first, count, something, nature)
    lit = nature.random(len(positions)) * something < 1.0 - empty
    photons = np.flatnonzero(lit)
    taps = _photons(link, positions[photons], (alice, bob), eve, nature)
    darks = nature.random((4, len(positions))) < link.dark
    alone = np.flatnonzero(~lit)
    darks[:, alone] = _some_dark(link.dark, len(alone), nature)
    sites = []
    for site, (seed, receiver) in enumerate(zip((alice, bob), both, strict=True)):
        ports = darks[2 * site : 2 * site + 2].copy()
        ports[:, photons] |= taps[site]
        pattern = ports[0].astype(np.uint8) + ports[1].astype(np.uint8) * np.uint8(2)
        clicked = np.flatnonzero(pattern)
        clicks = Clicks(positions[clicked].astype(np.int64), pattern[clicked])
        sites.append(_report(clicks, seed, span, optics, receiver, nature)[0])
    return sites[0], sites[1]


def _blinded(
    optics: PairOptics,
    seeds: tuple[ReceiverSeed, ReceiverSeed],
    span: tuple[int, int],
    eve: Blinding,
    nature: np.random.Generator,
    receivers: tuple[Receiver, Receiver],
) -> tuple[Detections, Detections]:
    """With Eve's notes on what Bob's detectors report."""
    faked = faked_pairs(optics, seeds, span, eve, nature)
    alice, _light = _report(faked[0].clicks, seeds[0], span, optics, receivers[0], nature, eve.current())
    bob, light = _report(faked[1].clicks, seeds[1], span, optics, receivers[1], nature, eve.current())
    return alice, replace(bob, notes=faked[1].notes(light))


def _receivers(optics: PairOptics) -> tuple[Receiver, Receiver]:
    return Receiver(optics.recovery, optics.pulse_rate), Receiver(optics.recovery, optics.pulse_rate)


def _photons(
    link: PairLink,
    positions: Positions,
    seeds: tuple[ReceiverSeed, ReceiverSeed],
    eve: Eve,
    nature: np.random.Generator,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which ports see light at Alice's and at Bob's, shape (2, pulses) each, of pulses that have some."""
    first, second = _numbers(link.pairs, len(positions), nature)
    at = ANGLES[seeds[0].angles(positions)], ANGLES[seeds[1].angles(positions)]
    intercepted = eve.fraction if isinstance(eve, InterceptResend) else 0.0
    there = at_bob(link, (first, second), at, intercepted, nature)
    eta_a, eta_b = link.eta_a * _passing(seeds[0], positions), link.eta_b * _passing(seeds[1], positions)
    here = np.stack([nature.binomial(number, eta_a) > 0 for number in (first, second)])
    return here, np.stack([nature.binomial(number, eta_b) > 0 for number in there])


def _passing(seed: ReceiverSeed, positions: Positions) -> npt.NDArray[np.float64] | float:
    """Transmission of a site's attenuator in each gate."""
    if seed.test_share <= 0.0:
        return 1.0
    return np.where(seed.both(positions)[1] == 1, ATTENUATOR, 1.0)


def _numbers(
    mean: float, count: int, nature: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs in each of two thermal modes, given that there is at least one.  The sum of two geometric numbers is
    negative binomial, and given the sum every split is equally likely."""
    ratio = (mean / 2.0) / (1.0 + mean / 2.0)
    weights = np.array([(total + 1) * ratio**total for total in range(1, 2 * MOST + 1)])
    edges = np.cumsum(weights / weights.sum())
    total = np.minimum(np.searchsorted(edges, nature.random(count), side="right") + 1, MOST)
    first = nature.integers(0, total + 1)
    return first, total - first


def _some_dark(dark: float, count: int, nature: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Dark clicks of four detectors, given that there is one at least."""
    patterns = np.array([[bool(number >> i & 1) for number in range(1, 16)] for i in range(4)])
    many = patterns.sum(axis=0)
    weights = dark**many * (1.0 - dark) ** (4 - many)
    if not count or weights.sum() <= 0.0:
        return np.zeros((4, count), dtype=bool)
    edges = np.cumsum(weights / weights.sum())
    chosen: npt.NDArray[np.bool_] = patterns[:, np.minimum(np.searchsorted(edges, nature.random(count)), 14)]
    return chosen


def _report(
    clicks: Clicks,
    seed: ReceiverSeed,
    span: tuple[int, int],
    optics: PairOptics,
    receiver: Receiver,
    nature: np.random.Generator,
    current: float = 0.0,
) -> tuple[Detections, npt.NDArray[np.int64]]:
    """(one site's clicks through its detectors' dead time as a record, which click each detection is).  ``current``:
    what somebody's bright light causes."""
    fired, light = receiver.take(clicks, span[0] + span[1], nature)
    positions, bits = fired.gates.astype(np.uint64), bits_of(fired.ports, nature)
    tested = seed.both(positions)[1] if seed.test_share > 0.0 else np.zeros(len(positions), dtype=np.uint8)
    readings: Readings = read(len(positions), int(tested.sum()), span[1] / optics.pulse_rate, current)
    plain = np.flatnonzero(tested == 0)  # test gates are no key: chosen before anything was measured
    return Detections(positions[plain], bits[plain], None, readings), light[plain]
