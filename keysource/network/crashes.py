"""Named points at which a test can have a node killed, as :mod:`keysource.kme.crashpoints` has them for the KME."""

from __future__ import annotations

import os
import signal

VARIABLE = "QVPN_RELAY_CRASH_AT"
POINTS = (
    "block.in-transaction",
    "block.stored",
    # a sender
    "pad.in-transaction",
    "pad.drawn",
    "share.sent",
    # a receiver
    "share.asked",
    "share.in-transaction",
    "share.spent",
    # the target
    "proof.made",
    "commit.in-transaction",
    "commit.stored",
    # the initiator
    "prepare.in-transaction",
    "prepare.stored",
    "settle.in-transaction",
    "settle.stored",
    # both, when a block has gone to whoever uses it
    "delivered.stored",
    # a store of an older release
    "migrate.in-transaction",
)
_armed = ""
_left = 0


def arm_from_environment() -> bool:
    """``POINT`` or ``POINT:COUNT``.  The variable is taken out.  Raises ``ValueError``, one sentence."""
    global _armed, _left
    order = os.environ.pop(VARIABLE, "")
    point, _, count = order.partition(":")
    if point and (point not in POINTS or not (count or "1").isdigit() or int(count or 1) < 1):
        raise ValueError(f"{VARIABLE}: no such crash point: {order!r}")
    _armed, _left = point, int(count or 1)
    return bool(point)


def at(point: str) -> None:
    """This process dies here if it was told to."""
    global _left
    if point != _armed:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
