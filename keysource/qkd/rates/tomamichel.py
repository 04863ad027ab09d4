"""Finite key of single photons or of an entangled source: Tomamichel, Lim, Gisin, Renner, Nat. Commun. 3 634 (2012).

The proof that delivers keys for BBM92.  n key bits in one basis, k check bits in the other; the test "at most q_tol k
errors" is part of it, and so is that n, k, q_tol and the leak are fixed before the block.
"""

from __future__ import annotations

import math

from keysource.qkd.rates.entropy import binary_entropy


def deviation(n: float, k: float, eps_sec: float) -> float:
    """How far the key basis' error ratio may lie above the check's: sqrt((n+k)/(nk) (k+1)/k ln(4/eps))."""
    return math.sqrt((n + k) / (n * k) * (k + 1.0) / k * math.log(4.0 / eps_sec))


def length(n: float, k: float, q_tol: float, leak: float, eps_sec: float, eps_cor: float) -> float:
    """n (1 - h(q_tol + mu)) - leak - log2(2 / (eps_sec^2 eps_cor)), 0 where there is none; not rounded."""
    error = q_tol + deviation(n, k, eps_sec)
    if error >= 0.5:
        return 0.0
    return max(0.0, n * (1.0 - binary_entropy(error)) - leak - math.log2(2.0 / (eps_sec**2 * eps_cor)))
