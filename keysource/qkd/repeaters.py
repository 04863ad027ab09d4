"""Repeaters beside the link, small: heralded elementary links, memories that dephase, swapping, purification.

A simulation and closed forms that it is held against; no key of qvpn comes from here.  States are Werner states
F |Phi+><Phi+| + (1 - F) / 3 (the rest), or Bell-diagonal (A, B, C, D).  Sources: waiting times Bernardes, Praxmeyer,
van Loock, arXiv:1010.0106; purification Bennett et al. 1996 (BBPSSW) and Deutsch et al. 1996 (DEJMPS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keysource.qkd.rates.asymptotic import plob
from keysource.qkd.rates.entropy import binary_entropy

FIBRE_KM_S = 2e5
_Numbers = npt.NDArray[np.float64]
Bell = tuple[float, float, float, float]


def waiting_rounds(links: int, p: float) -> float:
    """Expected rounds until all of ``links`` heralded links have succeeded, each with ``p`` a round: Z_n(p).

    Summed as E = sum over k of P(not all done after k rounds), which loses no digits where the alternating form does.
    """
    if links <= 8:
        terms = (math.comb(links, j) * (-1) ** (j + 1) / -math.expm1(j * math.log1p(-p)) for j in range(1, links + 1))
        return math.fsum(terms)
    total, k = 0.0, 0
    while (left := 1.0 - (-math.expm1(k * math.log1p(-p))) ** links) > 1e-15:
        total, k = total + left, k + 1
    return total


def nested_rounds(levels: int, p: float, q_swap: float) -> float:
    """For p << 1: (3/2)^m / (p q^m) for swaps that succeed with ``q_swap`` at each of m levels."""
    return 1.5**levels / (p * q_swap**levels)


# States


def dephased(f: float, t: float, t2: float, memories: int = 1) -> float:
    """Fidelity after ``t`` in memory of a pair that is Phi+ with ``f`` and Phi- otherwise."""
    flip = -math.expm1(-t / t2) / 2.0
    for _ in range(memories):
        f = f * (1.0 - flip) + (1.0 - f) * flip
    return f


def swapped(f_a: float, f_b: float) -> float:
    """Fidelity of two Werner pairs joined by a perfect Bell measurement: w = w_a w_b."""
    return (1.0 + 3.0 * _w(f_a) * _w(f_b)) / 4.0


def _w(f: float) -> float:
    return (4.0 * f - 1.0) / 3.0


def bbpssw(f: float) -> tuple[float, float]:
    """(fidelity after, probability of success) of one round on two Werner pairs."""
    g = (1.0 - f) / 3.0
    p = f * f + 2.0 * f * g + 5.0 * g * g
    return (f * f + g * g) / p, p


def dejmps(state: Bell) -> tuple[Bell, float]:
    """(state after, probability of success) of one round on two equal Bell-diagonal pairs."""
    a, b, c, d = state
    n = (a + b) ** 2 + (c + d) ** 2
    return ((a * a + b * b) / n, 2.0 * c * d / n, (c * c + d * d) / n, 2.0 * a * b / n), n


def key_of_werner(f: float) -> float:
    """Secret bits of a Werner pair, one-way, infinitely many: 1 - 2 h(2 (1 - F) / 3), not below 0."""
    return max(0.0, 1.0 - 2.0 * binary_entropy(2.0 * (1.0 - f) / 3.0))


# Chains


@dataclass(frozen=True, slots=True)
class Chain:
    """Equal links in a row; all try at once, keep what they have, and swap when all are there."""

    km: float
    links: int
    efficiency: float = 0.5
    """Of coupling a photon out of a memory and detecting it."""
    fidelity: float = 0.98
    """Of a fresh elementary pair, Werner."""
    t2: float = 1.0
    """Dephasing time of a memory in seconds."""
    attenuation: float = 0.2
    parallel: int = 1
    """Memories per link that try in the same round."""

    @property
    def round_seconds(self) -> float:
        """One attempt: light to the middle and the herald back."""
        return self.km / self.links / FIBRE_KM_S

    @property
    def success(self) -> float:
        """Per round and link: linear optics in the middle, so a half; then the best of ``parallel``."""
        eta = 10.0 ** (-self.attenuation * self.km / self.links / 10.0)
        one = 0.5 * self.efficiency**2 * eta
        return -math.expm1(self.parallel * math.log1p(-one))

    def seconds(self) -> float:
        """Expected time to an end-to-end pair."""
        return waiting_rounds(self.links, self.success) * self.round_seconds

    def simulate(self, pairs: int, nature: np.random.Generator) -> tuple[_Numbers, _Numbers]:
        """(seconds, fidelity) of each of ``pairs`` end-to-end pairs: every link's wait is drawn, and the two memories
        of a link dephase until the last one is there."""
        rounds = nature.geometric(self.success, (pairs, self.links)).astype(np.float64)
        last = rounds.max(axis=1)
        idle = (last[:, None] - rounds) * self.round_seconds
        flip = -np.expm1(-2.0 * idle / self.t2) / 2.0  # both memories of a link
        return last * self.round_seconds, _joined(self.fidelity, flip)

    def key_rate(self, pairs: int, nature: np.random.Generator) -> float:
        """Secret bits per second, the mean state taken as a Werner state (too little where dephasing is all)."""
        seconds, fidelity = self.simulate(pairs, nature)
        w = float(((4.0 * fidelity - 1.0) / 3.0).mean())
        return key_of_werner((1.0 + 3.0 * max(0.0, w)) / 4.0) / float(seconds.mean())


def _joined(fresh: float, flip: _Numbers) -> _Numbers:
    """Bell-diagonal states of all links composed: in characters (x, z, y) a swap is a product, and a phase flip with
    probability l scales x and y by 1 - 2 l."""
    w = _w(fresh)
    links = flip.shape[1]
    dephasing = np.prod(1.0 - 2.0 * flip, axis=1)
    strength = w**links
    result: _Numbers = (1.0 + strength + 2.0 * strength * dephasing) / 4.0
    return result


def direct(km: float, pulse_rate: float, attenuation: float = 0.2) -> float:
    """Bits per second that no direct transmission passes (PLOB)."""
    return pulse_rate * plob(10.0 ** (-attenuation * km / 10.0))


def trusted_chain(km: float, links: int, pulse_rate: float, attenuation: float = 0.2) -> float:
    """Of trusted nodes: the rate of one hop, however many there are.  Every node sees every key."""
    return direct(km / links, pulse_rate, attenuation)
