"""Finite key of single photons or of an entangled source: Tomamichel, Lim, Gisin, Renner, Nat. Commun. 3 634 (2012).

The proof that delivers keys for BBM92.  n key bits in one basis, k check bits in the other; the test "at most q_tol k
errors" is part of it, and so is that n, k, q_tol and the leak are fixed before the block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from keysource.qkd.rates.entropy import binary_entropy
from keysource.qkd.rates.finite import Bounds

NAME = "tomamichel2012"


@dataclass(frozen=True, slots=True)
class Entangled:
    """A source of pairs.  ``chsh``: the share of Bob's gates at the angles of the CHSH test (E91); 0: BBM92."""

    chsh: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.chsh < 1.0:
            raise ValueError("the CHSH test takes a share of the gates from 0 to below 1")


def deviation(n: float, k: float, eps_sec: float) -> float:
    """How far the key basis' error ratio may lie above the check's: sqrt((n+k)/(nk) (k+1)/k ln(4/eps))."""
    return math.sqrt((n + k) / (n * k) * (k + 1.0) / k * math.log(4.0 / eps_sec))


def length(n: float, k: float, q_tol: float, leak: float, eps_sec: float, eps_cor: float) -> float:
    """n (1 - h(q_tol + mu)) - leak - log2(2 / (eps_sec^2 eps_cor)), 0 where there is none; not rounded."""
    return secret_bits(bounds(n, k, q_tol * k, eps_sec), leak, eps_sec, eps_cor)


def bounds(n: float, k: float, errors: float, eps_sec: float) -> Bounds:
    """All ``n`` key bits count; their phase error ratio is at most the check's and the deviation of its sampling."""
    if n <= 0.0 or k <= 0.0:
        return Bounds(0.0, 0.0, errors, 0.5)
    return Bounds(n, k, errors, min(0.5, errors / k + deviation(n, k, eps_sec)))


def secret_bits(found: Bounds, leak: float, eps_sec: float, eps_cor: float) -> float:
    """:func:`length` of bounds that hold already."""
    if found.phi >= 0.5:
        return 0.0
    constant = math.log2(2.0 / (eps_sec**2 * eps_cor))
    return max(0.0, found.s_z1 * (1.0 - binary_entropy(found.phi)) - leak - constant)
