"""Blocks whose statistics are exactly what the link's closed form says: the input of finite-key rate curves."""

from __future__ import annotations

from keysource.qkd.optics.entangled import AnyOptics
from keysource.qkd.optics.model import Optics
from keysource.qkd.rates import proofs
from keysource.qkd.rates.entropy import binary_entropy
from keysource.qkd.rates.finite import Counts, Decoy, Pair, Security, bounds, secret_bits
from keysource.qkd.rates.proofs import judge


def expected_counts(optics: Optics, n_z: float) -> Counts:
    """A block with ``n_z`` detections in the key basis."""
    gain = optics.mean_gain()
    n_x = n_z * ((1.0 - optics.p_z) / optics.p_z) ** 2

    def pairs(total: float) -> tuple[Pair, Pair]:
        parts = zip(optics.probabilities, optics.intensities, strict=True)
        n = [total * p * optics.gain(mu) / gain for p, mu in parts]
        return Pair(*n), Pair(*(k * optics.qber(mu) for k, mu in zip(n, optics.intensities, strict=True)))

    n_zp, m_z = pairs(n_z)
    n_xp, m_x = pairs(n_x)
    return Counts(n_zp, m_z, n_xp, m_x)


def sifted_per_pulse(optics: Optics, *, as_published: bool = False) -> float:
    """Key-basis detections per pulse.

    ``as_published``: with dead time as the figure of Rusca 2018 has it, where only sifted detections of the key basis
    rest the detectors.  That is more than a link gives: light in another basis clicks too.
    """
    if not as_published:
        return optics.mean_gain() * optics.p_z**2
    light = sum(p * optics.light_gain(mu) for p, mu in zip(optics.probabilities, optics.intensities, strict=True))
    sifted = light * optics.p_z**2
    return sifted / (1.0 + sifted * optics.recovery.dead_gates(optics.pulse_rate))


def delivering_finite(optics: AnyOptics, n_z: float, security: Security, f: float = 1.16) -> float:
    """Secret bits per pulse under the proof that delivers keys over a link with this source, error correction at f
    times Shannon's limit."""
    n_x = n_z * ((1.0 - optics.p_z) / optics.p_z) ** 2
    found = judge(optics.source, optics.expected(n_z, n_x), security)
    leak = f * n_z * binary_entropy(optics.mean_qber())
    return proofs.secret_bits(optics.source, found, leak, security) * optics.sifted()[0] / n_z


def one_decoy_finite(
    optics: Optics, n_z: float, security: Security, proof: str, f: float = 1.16, *, as_published: bool = False
) -> float:
    """Secret bits per pulse, error correction at f times Shannon's limit."""
    if not isinstance(optics.decoy, Decoy):
        raise ValueError("these proofs are of links with one decoy")
    counts = expected_counts(optics, n_z)
    found = bounds(optics.decoy, counts, security, proof)
    leak = f * n_z * binary_entropy(sum(counts.m_z) / n_z)
    per_pulse = sifted_per_pulse(optics, as_published=as_published)
    return secret_bits(found, leak, security, proof) * per_pulse / n_z
