"""Named points at which a test can have a node killed, as :mod:`keysource.kme.crashpoints` has them for the KME."""

from __future__ import annotations

from keysource.kme.crashpoints import CrashPoints

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
_here = CrashPoints(VARIABLE, POINTS)
arm_from_environment, at = _here.arm_from_environment, _here.at
