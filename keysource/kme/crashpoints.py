"""Named points at which a test can have this process killed: what a power cut at just that moment leaves behind.

A point is armed by one environment variable that is read once, when ``qvpn-kme serve`` starts::

    QVPN_KME_CRASH_AT=enc.committed        the first time that this point is reached
    QVPN_KME_CRASH_AT=enc.committed:3      the third time

The process then ends itself with SIGKILL: no handler, no flush, no goodbye.  Unarmed, :func:`at` compares two
strings and returns; it takes no lock, writes nothing and tells nobody anything.  Whoever can set the variable for
this process can kill it anyway.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

VARIABLE = "QVPN_KME_CRASH_AT"
POINTS = (
    # the device hands over a block
    "block.received",
    "block.in-transaction",
    "block.stored",
    "block.acknowledged",
    # a master asks for keys; its KME
    "enc.asked",
    "enc.chosen",
    "enc.reserved",
    "enc.in-transaction",
    "enc.committed",
    "enc.answered",
    # the KME of the slave hears of them
    "reserve.asked",
    "reserve.in-transaction",
    "reserve.committed",
    "reserve.answered",
    # the slave fetches them
    "dec.asked",
    "dec.in-transaction",
    "dec.committed",
    "dec.answered",
    # one key for slaves at several KMEs
    "multicast.in-transaction",
    "multicast.taken",
    "multicast.partly-reserved",
    "multicast.reserved",
    "deposit.in-transaction",
    "deposit.committed",
    "withdraw.in-transaction",
    "withdraw.committed",
    # the keys that wrap keys
    "epoch.begun",
    "epoch.in-rewrap",
    "epoch.rewrapped",
    "epoch.half-destroyed",
    "epoch.destroyed",
    # a store of an older release
    "migrate.in-transaction",
    "migrate.committed",
)
"""Every point there is; a test walks all of them."""


class CrashPoints:
    """Those of one program, of which one may be armed."""

    def __init__(self, variable: str, points: Sequence[str]) -> None:
        self._variable, self._points = variable, points
        self._armed, self._left = "", 0

    def arm(self, order: str) -> None:
        """``POINT`` or ``POINT:COUNT``; an empty order disarms.  Raises ``ValueError``, one sentence."""
        point, _, count = order.partition(":")
        if point and (point not in self._points or not (count or "1").isdigit() or int(count or 1) < 1):
            raise ValueError(f"{self._variable}: no such crash point: {order!r}")
        self._armed, self._left = point, int(count or 1)

    def arm_from_environment(self) -> bool:
        """True where a point is armed now.  The variable is taken out, so that no child inherits it."""
        self.arm(os.environ.pop(self._variable, ""))
        return bool(self._armed)

    def at(self, point: str) -> None:
        """This process dies here if it was told to."""
        if point != self._armed:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


_here = CrashPoints(VARIABLE, POINTS)
arm, arm_from_environment, at = _here.arm, _here.arm_from_environment, _here.at
