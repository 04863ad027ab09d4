"""The link in closed form: what a pulse of a given intensity does at Bob's two threshold detectors.

Phase-randomised weak coherent pulses; fibre and Bob's optics transmit ``eta`` together; the light of a pulse
prepared in Bob's basis leaves by the right port with the fraction 1 - e_d and by the wrong one with e_d, in the
other basis half and half; each detector has a dark count with probability p_d per gate; a double click is a
uniformly random bit (the squashing argument needs that; dropping them would be a security error).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from keysource.qkd.rates.finite import Decoy


@dataclass(frozen=True, slots=True)
class Optics:
    """One link.  Probabilities are per pulse."""

    decoy: Decoy
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

    @property
    def eta(self) -> float:
        """Total transmission."""
        return float(10.0 ** (-self.attenuation * self.distance_km / 10.0) * self.detector)

    @property
    def intensities(self) -> tuple[float, float]:
        return self.decoy.mu1, self.decoy.mu2

    @property
    def probabilities(self) -> tuple[float, float]:
        return self.decoy.p1, 1.0 - self.decoy.p1

    def port_click(self, mu: float, fraction: float) -> float:
        """Probability that the detector clicks at a port that gets ``fraction`` of the light."""
        return 1.0 - (1.0 - self.dark) * math.exp(-mu * self.eta * fraction)

    def gain(self, mu: float) -> float:
        """Q_mu: probability of at least one click; the same in both bases."""
        return 1.0 - (1.0 - self.dark) ** 2 * math.exp(-mu * self.eta)

    def error_gain(self, mu: float) -> float:
        """E_mu Q_mu: probability of a click with the wrong bit where the bases agree."""
        right = self.port_click(mu, 1.0 - self.misalignment)
        wrong = self.port_click(mu, self.misalignment)
        return wrong * (1.0 - right) + right * wrong / 2.0

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
