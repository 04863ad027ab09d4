"""Log lines that a caller can cause at will, bounded: a stranger must neither fill the disk nor drown the others.

Of one reason and one source the first few go out at once and then one now and then, which says how many were left out
since; and of all together only so many a second.  What is left out after the last line is told by :meth:`summary`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import structlog

from keysource.kme.ratelimit import TokenBucket

_AT_ONCE, _EVERY = 5, 10.0
"""Lines of one reason and source after a rest; seconds for each further one."""
_ALL = 10.0
"""Lines a second of all reasons and sources, ten times that many after a rest."""
_SOURCES = 1024
"""Pairs of reason and source that are told apart; the one that was silent longest goes."""
_LONGEST = 64
log = structlog.get_logger("kme")


class BoundedLog:
    """See the module.  ``now`` is in seconds, of a clock that does not jump."""

    def __init__(self) -> None:
        self._all = TokenBucket(_ALL, 10 * _ALL)
        self._buckets: OrderedDict[tuple[str, str], TokenBucket] = OrderedDict()
        self._left_out: Counter[tuple[str, str]] = Counter()
        self._forgotten: Counter[str] = Counter()

    def info(self, event: str, source: str, now: float, **facts: Any) -> None:
        """``event`` is one of a few sentences of ours; ``source`` is what a caller may choose."""
        if self._may(event, source, now):
            log.info(event, **facts, **self._since(event, source))

    def warning(self, event: str, source: str, now: float, **facts: Any) -> None:
        """The same, louder."""
        if self._may(event, source, now):
            log.warning(event, **facts, **self._since(event, source))

    def error(self, event: str, source: str, now: float, **facts: Any) -> None:
        """The same for what should not happen, and happens at every request once it does."""
        if self._may(event, source, now):
            log.error(event, **facts, **self._since(event, source))

    def summary(self) -> None:
        """Tell what no line has told yet; for a housekeeping."""
        counts = self._forgotten
        for (event, _source), number in self._left_out.items():
            counts[event] += number
        self._left_out, self._forgotten = Counter(), Counter()
        if counts:
            log.warning("lines were left out of this log", number=counts.total(), of=dict(counts))

    def _may(self, event: str, source: str, now: float) -> bool:
        key = event, source[:_LONGEST]
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(1 / _EVERY, _AT_ONCE)
            if len(self._buckets) > _SOURCES:
                oldest, _bucket = self._buckets.popitem(last=False)
                if left_out := self._left_out.pop(oldest, 0):
                    self._forgotten[oldest[0]] += left_out
        self._buckets.move_to_end(key)
        if bucket.wait(now) == 0 and self._all.wait(now) == 0:
            return True
        self._left_out[key] += 1
        return False

    def _since(self, event: str, source: str) -> dict[str, int]:
        left_out = self._left_out.pop((event, source[:_LONGEST]), 0)
        return {"left_out": left_out} if left_out else {}
