"""How often one SAE may ask, and how many keys it may draw.  ETSI GS QKD 014 is silent on it: the answer is 503."""

from __future__ import annotations

from collections.abc import Callable

from keysource.kme.config import KmeConfig, Limits, Sae

_KEYS_AT_ONCE = 10.0  # seconds' worth of keys that may be drawn after a rest


class TokenBucket:
    """``rate`` tokens a second, at most ``burst`` of them.  A rate of 0 is no limit.  Time is an argument."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at = burst, 0.0

    def wait(self, now: float, tokens: float = 1.0) -> float:
        """Take tokens and return 0, or take none and return the seconds until there are enough.  Who wants more than
        there can ever be gets them from a full bucket, which owes the rest."""
        if not self._rate:
            return 0.0
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now
        needed = min(tokens, self._burst)
        if needed > self._tokens:
            return (needed - self._tokens) / self._rate
        self._tokens -= tokens
        return 0.0


class RateLimits:
    """The buckets of every SAE of a configuration."""

    def __init__(self, config: KmeConfig) -> None:
        self._requests = _Buckets(lambda sae: _requests(config.limits, sae))
        self._keys = _Buckets(lambda sae: _keys(config.limits, sae))

    def request(self, sae: Sae, now: float) -> float:
        """Seconds that this SAE must wait with its request; 0 where it need not."""
        return self._requests.of(sae).wait(now)

    def keys(self, sae: Sae, number: int, now: float) -> float:
        """The same for drawing ``number`` units of 256 bits, which is what a key costs the link."""
        return self._keys.of(sae).wait(now, number)


class _Buckets:
    def __init__(self, make: Callable[[Sae], TokenBucket]) -> None:
        self._make = make
        self._buckets: dict[str, TokenBucket] = {}

    def of(self, sae: Sae) -> TokenBucket:
        if sae.id not in self._buckets:
            self._buckets[sae.id] = self._make(sae)
        return self._buckets[sae.id]


def _requests(limits: Limits, sae: Sae) -> TokenBucket:
    rate = limits.requests_per_second if sae.requests_per_second is None else sae.requests_per_second
    return TokenBucket(rate, sae.burst or limits.burst)


def _keys(limits: Limits, sae: Sae) -> TokenBucket:
    rate = limits.keys_per_second if sae.keys_per_second is None else sae.keys_per_second
    return TokenBucket(rate, max(rate * _KEYS_AT_ONCE, limits.max_key_per_request))
