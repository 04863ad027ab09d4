"""Entangled pairs between two receivers, pulse by pulse, for BBM92 and E91, with a CHSH test.  Every pulse is thrown
here; the links that deliver sample only where there is light (:mod:`keysource.qkd.optics.entangled`), with the same
photons.

A parametric source makes two independent thermal modes (H and V), each with the same number of photons at both sites;
seen in Bob's basis, turned by an angle, photons of a pulse interfere, with Wigner's d-matrix between Fock states.  So
the errors of multi-pair pulses come out by themselves; no visibility is put in.

S is computed from detected coincidences only (fair sampling).  Over a link with loss that proves nothing about the
devices; a low S may end a block, a high one never lengthens a key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill.bits import Bits
from keysource.qkd.rates.entropy import binary_entropy

MOST = 7
"""Photons of a pulse; of mean 0.2 one pulse in 10^7 has more."""
CHSH = (0.0, math.pi / 4.0, math.pi / 8.0, -math.pi / 8.0)
"""Polariser angles a0, a1, b0, b1 of the largest S."""


@dataclass(frozen=True, slots=True)
class PairLink:
    """``pairs`` per pulse on average; ``dark`` per gate and detector; ``e_d``: light at Bob's wrong port."""

    pairs: float
    eta_a: float
    eta_b: float
    dark: float
    e_d: float


@dataclass(frozen=True, slots=True)
class Coincidences:
    """Pulses that clicked at both sites: bits, and what was measured at each (index of the angle)."""

    a: Bits
    b: Bits
    angle_a: Bits
    angle_b: Bits


def fock_rotation(n: int, m: int, angle: float) -> npt.NDArray[np.float64]:
    """Probabilities of 0..n+m photons in the first port when ``n`` and ``m`` photons come in two orthogonal
    polarisations and the analyser is turned by ``angle``: |<k, n+m-k| U |n, m>|^2."""
    c, s, total = math.cos(angle), math.sin(angle), n + m
    result = np.zeros(total + 1)
    for k in range(total + 1):
        amplitude = 0.0
        for i in range(max(0, k - m), min(n, k) + 1):  # i of the k come from the first mode
            ways = math.comb(n, i) * math.comb(m, k - i)
            amplitude += ways * c**i * (-s) ** (n - i) * s ** (k - i) * c ** (m - k + i)
        factorials = math.factorial(k) * math.factorial(total - k) / (math.factorial(n) * math.factorial(m))
        result[k] = amplitude**2 * factorials
    return result


def fly(
    link: PairLink,
    pulses: int,
    angles: tuple[tuple[float, ...], tuple[float, ...]],
    nature: np.random.Generator,
    intercepted: float = 0.0,
) -> Coincidences:
    """``angles`` = (Alice's, Bob's) choices, each equally likely (nature draws them: no key comes of this).

    ``intercepted``: the fraction of Bob's pulses that Eve measures at 0 or 45 degrees and sends on as she found them.
    """
    choice_a = nature.integers(0, len(angles[0]), pulses, dtype=np.uint8)
    choice_b = nature.integers(0, len(angles[1]), pulses, dtype=np.uint8)
    stop = 1.0 / (1.0 + link.pairs / 2.0)
    first, second = (np.minimum(nature.geometric(stop, pulses) - 1, MOST) for _ in range(2))
    light = np.flatnonzero(first + second)
    at = np.array(angles[0])[choice_a[light]], np.array(angles[1])[choice_b[light]]
    bob_first, bob_second = at_bob(link, (first[light], second[light]), at, intercepted, nature)
    ones = np.zeros((2, pulses), dtype=np.int64), np.zeros((2, pulses), dtype=np.int64)
    for port, number in enumerate((first[light], second[light])):
        ones[0][port, light] = nature.binomial(number, link.eta_a)
    for port, number in enumerate((bob_first, bob_second)):
        ones[1][port, light] = nature.binomial(number, link.eta_b)
    clicks = [(site > 0) | (nature.random((2, pulses)) < link.dark) for site in ones]
    both = np.flatnonzero(clicks[0].any(axis=0) & clicks[1].any(axis=0))
    bits = [_bits(site[:, both], nature) for site in clicks]
    return Coincidences(bits[0], bits[1], choice_a[both], choice_b[both])


def at_bob(
    link: PairLink,
    numbers: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    at: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    intercepted: float,
    nature: np.random.Generator,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Photons at Bob's two ports: the state as Alice's basis sees it, turned into his."""
    (n, m), (alice, bob) = numbers, at
    source = alice.copy()  # in which basis n and m are counted
    if intercepted > 0.0:
        caught = nature.random(len(n)) < intercepted
        eve = np.where(nature.integers(0, 2, len(n)) == 0, 0.0, math.pi / 4.0)
        found = turned(n, m, eve - alice, nature)
        total = n + m
        more = np.where(2 * found == total, nature.integers(0, 2, len(n)) == 1, 2 * found > total)
        n, m = np.where(caught, np.where(more, total, 0), n), np.where(caught, np.where(more, 0, total), m)
        source = np.where(caught, eve, source)
    k = turned(n, m, bob - source + math.asin(math.sqrt(link.e_d)), nature)
    return k, n + m - k


def turned(
    n: npt.NDArray[np.int64], m: npt.NDArray[np.int64], angle: npt.NDArray[np.float64], nature: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Photons in the first port after an analyser turned by ``angle``, drawn for each pulse."""
    steps, which = np.unique(np.round(angle, 9), return_inverse=True)
    case = (which * (MOST + 1) + n) * (MOST + 1) + m
    dice, result = nature.random(len(n)), np.zeros(len(n), dtype=np.int64)
    for value in np.unique(case).tolist():
        here = np.flatnonzero(case == value)
        (step, first), second = divmod(value // (MOST + 1), MOST + 1), value % (MOST + 1)
        edges = np.cumsum(fock_rotation(first, second, float(steps[step])))
        result[here] = np.minimum(np.searchsorted(edges, dice[here], side="right"), first + second)
    return result


def _bits(clicks: npt.NDArray[np.bool_], nature: np.random.Generator) -> Bits:
    """First port 0, second port 1, both a coin."""
    coin = nature.integers(0, 2, clicks.shape[1], dtype=np.uint8)
    return np.where(clicks[0] & clicks[1], coin, clicks[1]).astype(np.uint8)


# CHSH


def chsh(seen: Coincidences) -> tuple[float, float]:
    """(S, its standard deviation) for angles (a0, a1), (b0, b1): E00 + E01 + E10 - E11 with b1 = -b0.

    sigma^2 = sum of (1 - E^2) / N over the four settings.
    """
    total, variance = 0.0, 0.0
    for i in (0, 1):
        for j in (0, 1):
            chosen = (seen.angle_a == i) & (seen.angle_b == j)
            count = int(chosen.sum())
            e = 1.0 - 2.0 * float((seen.a != seen.b)[chosen].mean())
            total += -e if (i, j) == (1, 1) else e
            variance += (1.0 - e * e) / count
    return total, math.sqrt(variance)


def passes(s: float, sigma: float, least: float = 2.0) -> bool:
    """E91's test: five standard deviations above ``least``.  It can only end a block."""
    return s - 5.0 * sigma > least


def acin_rate(s: float, qber: float) -> float:
    """Device-independent rate of Acin et al. 2007 (collective attacks, one-way).  Shown as "not claimed": it needs
    detection of more than four fifths of the pairs, which no lossy link has."""
    eve = binary_entropy((1.0 + math.sqrt(max(0.0, (s / 2.0) ** 2 - 1.0))) / 2.0) if s > 2.0 else 1.0
    return 1.0 - binary_entropy(qber) - eve
