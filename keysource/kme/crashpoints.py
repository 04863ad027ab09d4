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

_armed = ""
_left = 0


def arm(order: str) -> None:
    """``POINT`` or ``POINT:COUNT``; an empty order disarms.  Raises ``ValueError``, one sentence."""
    global _armed, _left
    point, _, count = order.partition(":")
    if point and (point not in POINTS or not (count or "1").isdigit() or int(count or 1) < 1):
        raise ValueError(f"{VARIABLE}: no such crash point: {order!r}")
    _armed, _left = point, int(count or 1)


def arm_from_environment() -> bool:
    """True where a point is armed now.  The variable is taken out, so that no child inherits it."""
    arm(os.environ.pop(VARIABLE, ""))
    return bool(_armed)


def at(point: str) -> None:
    """This process dies here if it was told to."""
    global _left
    if point != _armed:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
