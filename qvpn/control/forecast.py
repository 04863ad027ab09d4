"""How long a key source's stock lasts at the rekey intervals of the peers that draw from it."""

from __future__ import annotations

from collections.abc import Sequence

WARN_REKEYS, WARN_SECONDS = 10, 600.0
"""A stock that lasts for less than so many rekeys of the quickest peer, or seconds, is about to run dry."""


def lasts(stored: int | None, rekeys: Sequence[float]) -> float | None:
    """Seconds that ``stored`` keys last when each peer draws one per its rekey interval (seconds), and none arrives.

    An upper bound of what is used: the other end starts some of the epochs.  None where nothing can be said.
    """
    use = sum(1 / rekey for rekey in rekeys)
    return None if stored is None or use == 0 else stored / use


def runs_dry(stored: int | None, key_rate: float | None, rekeys: Sequence[float]) -> bool:
    """Is it time to warn?  Not while as many keys arrive as are used."""
    left = lasts(stored, rekeys)
    if left is None or (key_rate is not None and key_rate >= sum(1 / rekey for rekey in rekeys)):
        return False
    return left < max(WARN_SECONDS, WARN_REKEYS * min(rekeys))
