"""When a connection may send: congestion control's rate in batches, as a TUN and a loop have them."""

from __future__ import annotations


class BatchPacer:
    """In the place of aioquic's pacer, which lets 16 packets go at once and then wants a timer for each.

    A TUN hands over up to 64 packets at a time and loops have a millisecond's resolution, so bursts of that length
    are allowed; the rate over a few milliseconds is the congestion window per round trip (RFC 9002, 7.7).
    """

    BURST = 64

    def __init__(self, size: int) -> None:
        self._size = size
        self.open = False
        """Let everything go."""
        self._tokens = float(self.BURST)
        self._at = 0.0
        self._rate = 0.0
        """Packets per second; 0: not known yet."""

    def next_send_time(self, now: float) -> float | None:
        if not self._rate or self.open:
            return None
        self._tokens = min(float(self.BURST), self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now
        if self._tokens >= 1:
            return None
        return now + max(0.001, min(self.BURST / 4, 8) / self._rate)

    def update_after_send(self, now: float) -> None:
        self._tokens -= 1

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        self._rate = 1.25 * congestion_window / max(smoothed_rtt, 1e-4) / self._size
