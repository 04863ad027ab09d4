"""The link in closed form: what a pulse of a given intensity does at Bob's two threshold detectors.

Phase-randomised weak coherent pulses; fibre and Bob's optics transmit ``eta`` together; the light of a pulse
prepared in Bob's basis leaves by the right port with the fraction 1 - e_d and by the wrong one with e_d, in the
other basis half and half; each detector has a dark count with probability p_d per gate; a double click is a
uniformly random bit (the squashing argument needs that; dropping them would be a security error).

*Light* gains are those of a detector that is always ready.  ``gain`` and ``qber`` have dead time and after-pulses in
them, in mean field: each live gate also has an after-pulse with one probability, whatever came before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from keysource.qkd.rates.finite import Counts, Decoy
from keysource.qkd.rates.twodecoy import TwoDecoy


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a click does to the detectors afterwards.  Both are gated off together: one alone would make its
    neighbour's bit more likely, which no proof covers."""

    dead_time: float = 0.0
    """Seconds; not paralysable: a gate that is off does not prolong it."""
    after_pulse: float = 0.0
    """Probability that a click leaves a trap that fires the same detector once it is on again."""
    trap_time: float = 0.0
    """Mean life of such a trap in seconds, counted from the end of the dead time."""

    def __post_init__(self) -> None:
        if self.dead_time < 0 or self.trap_time < 0 or not 0.0 <= self.after_pulse < 0.5:
            raise ValueError("times are not negative, after-pulses have a probability below 0.5")

    def dead_gates(self, pulse_rate: float) -> int:
        """Gates that are off after a click."""
        return math.ceil(self.dead_time * pulse_rate - 1e-9)

    def survival(self, pulse_rate: float) -> float:
        """Probability that a trap outlives one more live gate."""
        return math.exp(-1.0 / (self.trap_time * pulse_rate)) if self.trap_time > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a block with other optics: a satellite's pass is a row of them."""

    share: float
    """Of the block's pulses."""
    loss_db: float
    """On top of the link's own."""
    dark: float = 0.0
    """Background light, as dark counts per gate and detector, on top of the detector's own."""


@dataclass(frozen=True, slots=True)
class Optics:
    """One link.  Probabilities are per pulse."""

    decoy: Decoy | TwoDecoy
    p_z: float
    """Probability of the key basis Z, at both sites."""
    distance_km: float
    attenuation: float
    """Fibre loss in dB/km."""
    detector: float
    """Transmission of Bob's optics times detector efficiency, 0..1."""
    dark: float
    """Dark count probability per gate and detector."""
    misalignment: float
    """e_d: fraction of the light at the wrong port."""
    pulse_rate: float
    """Pulses per second."""
    recovery: Recovery = Recovery()
    course: tuple[Stretch, ...] = ()
    """Empty: the same all the block long."""

    def __post_init__(self) -> None:
        if self.course and not math.isclose(sum(part.share for part in self.course), 1.0, abs_tol=1e-9):
            raise ValueError("the stretches of a block have shares that sum to 1")

    @property
    def line(self) -> float:
        """Transmission of the fibre alone."""
        return float(10.0 ** (-self.attenuation * self.distance_km / 10.0))

    @property
    def eta(self) -> float:
        """Total transmission."""
        return self.line * self.detector

    @property
    def source(self) -> Decoy | TwoDecoy:
        return self.decoy

    @property
    def intensities(self) -> tuple[float, ...]:
        return self.decoy.intensities

    @property
    def probabilities(self) -> tuple[float, ...]:
        return self.decoy.probabilities

    # Pieces of a block

    def changed(self, loss_db: float = 0.0, dark: float = 0.0, misalignment: float | None = None) -> Optics:
        """The link with more loss before Bob, more background, another alignment; no course."""
        at_port = self.misalignment if misalignment is None else misalignment
        eta = self.detector * 10.0 ** (-loss_db / 10.0)
        return replace(self, detector=eta, dark=self.dark + dark, misalignment=at_port, course=())

    def stretches(self) -> list[tuple[float, Optics]]:
        """(share of the block, optics), one or several."""
        if not self.course:
            return [(1.0, self)]
        return [(part.share, self.changed(part.loss_db, part.dark)) for part in self.course]

    # Detectors that are always ready

    def port_click(self, mu: float, fraction: float) -> float:
        """Probability that the detector clicks at a port that gets ``fraction`` of the light."""
        return 1.0 - (1.0 - self.dark) * math.exp(-mu * self.eta * fraction)

    def light_gain(self, mu: float) -> float:
        """Probability of at least one click; the same in both bases."""
        return 1.0 - (1.0 - self.dark) ** 2 * math.exp(-mu * self.eta)

    def light_error(self, mu: float) -> float:
        """Probability of a click with the wrong bit where the bases agree."""
        right = self.port_click(mu, 1.0 - self.misalignment)
        wrong = self.port_click(mu, self.misalignment)
        return wrong * (1.0 - right) + right * wrong / 2.0

    def load(self) -> tuple[float, float]:
        """(share of the gates that are live, probability of an after-pulse in a live gate).

        Renewal theory: a live gate clicks with p, ``dead`` gates follow, so 1 / (1 + p dead) of them are live; a trap
        that lives on over j live gates with probability z^j fires in a live gate with
        (1 - z) / (1 - (1 - p) z - p z^(dead + 1)).
        """
        plain = sum(p * self.light_gain(mu) for p, mu in zip(self.probabilities, self.intensities, strict=True))
        dead, z = self.recovery.dead_gates(self.pulse_rate), self.recovery.survival(self.pulse_rate)
        after, clicks = 0.0, plain
        for _ in range(60 if self.recovery.after_pulse > 0.0 else 0):
            live_again = (1.0 - z) / (1.0 - (1.0 - clicks) * z - clicks * z ** (dead + 1))
            after = self.recovery.after_pulse * clicks * live_again
            clicks = 1.0 - (1.0 - plain) * (1.0 - after)
        return 1.0 / (1.0 + clicks * dead), after

    # What is observed

    def gain(self, mu: float) -> float:
        """Q_mu: detections per pulse."""
        return sum(share * part._observed(mu)[0] for share, part in self.stretches())

    def error_gain(self, mu: float) -> float:
        """E_mu Q_mu."""
        return sum(share * part._observed(mu)[1] for share, part in self.stretches())

    def _observed(self, mu: float) -> tuple[float, float]:
        live, after = self.load()
        right = self.port_click(mu, 1.0 - self.misalignment)
        wrong = self.port_click(mu, self.misalignment)
        only_right, only_wrong, both = right * (1.0 - wrong), wrong * (1.0 - right), right * wrong
        none = 1.0 - only_right - only_wrong - both
        # an after-pulse falls on either port; with light on the other one it makes a double click, a coin
        touched = only_right / 4.0 + 3.0 * only_wrong / 4.0 + both / 2.0 + none / 2.0
        error = (1.0 - after) * (only_wrong + both / 2.0) + after * touched
        return live * (1.0 - none * (1.0 - after)), live * error

    def qber(self, mu: float) -> float:
        """E_mu."""
        return self.error_gain(mu) / self.gain(mu)

    def mean_gain(self) -> float:
        """Gain averaged over the intensities."""
        return sum(p * self.gain(mu) for p, mu in zip(self.probabilities, self.intensities, strict=True))

    def mean_qber(self) -> float:
        """Error ratio of the detections, averaged over the intensities."""
        pairs = zip(self.probabilities, self.intensities, strict=True)
        return sum(p * self.error_gain(mu) for p, mu in pairs) / self.mean_gain()

    def sifted(self) -> tuple[float, float]:
        """(key basis, check basis): detections per pulse where both sites chose it."""
        gain = self.mean_gain()
        return gain * self.p_z**2, gain * (1.0 - self.p_z) ** 2

    def expected(self, n_z: float, n_x: float) -> Counts:
        """The statistics of a block of so many sifted detections, on average."""
        gain = self.mean_gain()
        pairs = list(zip(self.probabilities, self.intensities, strict=True))
        share = [p * self.gain(mu) / gain for p, mu in pairs]
        wrong = [p * self.error_gain(mu) / gain for p, mu in pairs]
        tallies = (tuple(total * each for each in row) for total in (n_z, n_x) for row in (share, wrong))
        return Counts(*tallies)
