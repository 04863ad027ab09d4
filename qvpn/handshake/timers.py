"""Times of PROTOCOL.md chapter 9, as functions of ``rekey``.  Seconds."""

from __future__ import annotations

DEADLINE = 30.0
SOURCE_CALL = 2.0
HALF_OPEN = 30.0
ANSWER_LIFE = 40.0
"""M4 cache and unconfirmed epoch: 10 s longer than I may accept the M4."""
HELD_KEY = 60.0
RETRY_WINDOW = 1.0
RETRIES = 8
"""RETRY that are taken in a window: an observer may have forged some of them."""
BAD_M3 = 8
"""Bad M3 or M3R after which an entry is let go: each costs two signature checks."""
ANSWER_SPACING = 0.4
ANSWER_REPEATS = 12
MOVES = 3.0
EPOCH_OK_FIRST = 0.2
EPOCH_OK_CAP = 2.0
RESEND_FIRST = 0.5
BACKOFF_FIRST = 1.0
BUCKET_BURST = 3
SECOND_TRY = 3.0


def overlap(rekey: float) -> float:
    return min(10.0, rekey)


def resend_cap(rekey: float) -> float:
    return min(8.0, rekey)


def backoff_cap(rekey: float) -> float:
    return min(60.0, rekey)


def keepalive(rekey: float) -> float:
    return min(10.0, rekey)


def dead_peer(rekey: float) -> float:
    return min(30.0, 2 * rekey)


def no_reply(rekey: float) -> float:
    """Silence after which an inner attempt goes cold, and an unconfirmed epoch is not sent on any more."""
    return min(10.0, rekey)


def rekey_after(rekey: float, preferred: bool, jitter: float) -> float:
    """Age of an epoch at which this side starts the next; ``jitter`` in [0, 1)."""
    return (rekey if preferred else rekey * 7 / 6) * (1 - 0.1 * jitter)


def longest_rekey(rekey: float, hard_end: float) -> float:
    """As far apart as epochs may be begun where keys are short: a rekey that fails needs time for a second try."""
    return max(rekey, (hard_end - SECOND_TRY) / 2)


def spread(value: float, jitter: float) -> float:
    """``value`` ± 25 %."""
    return value * (0.75 + 0.5 * jitter)


class Bucket:
    """Draws of one peer: burst 3, one token per half ``rekey``."""

    def __init__(self, rekey: float, now: float) -> None:
        self._refill = rekey / 2
        self._tokens = float(BUCKET_BURST)
        self._at = now

    def take(self, now: float) -> bool:
        self._tokens = min(float(BUCKET_BURST), self._tokens + max(0.0, now - self._at) / self._refill)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
