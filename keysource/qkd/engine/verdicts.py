"""What an end says of itself and of a block that gave nothing, and what of it is an alarm."""

from __future__ import annotations

from keysource.qkd.config import EndConfig
from keysource.qkd.distill.party import Outcome
from keysource.qkd.distill.wire import Reason

ALARMS = {
    Reason.SHORT: "device",
    Reason.QBER: "qber",
    Reason.LEAK: "qber",
    Reason.VERIFY: "qber",
    Reason.STATISTICS: "qber",
    Reason.MONITOR: "monitor",
    Reason.CHSH: "qber",
}
"""The kind of each, once it is more than chance: see :mod:`~.doubt`."""
SENTENCES = {
    Reason.SHORT: "fewer detections than a block needs",
    Reason.QBER: "too many errors in the check basis",
    Reason.LEAK: "error correction needed more than its leak budget",
    Reason.VERIFY: "the keys differed after error correction",
    Reason.STATISTICS: "the block's statistics miss their thresholds",
    Reason.MONITOR: "a monitor of the detectors has fired",
    Reason.CHSH: "the pairs do not violate Bell's inequality by five standard deviations",
}


def withhold(outcome: Outcome) -> None:
    """In the deterministic test mode: what would have been key or pad is lost."""
    ledger = outcome.ledger
    ledger.lost += ledger.delivered + ledger.authenticated
    ledger.delivered = ledger.authenticated = 0
    outcome.keys = bytearray()


def authenticity(*, signs: bool, unproven: bool) -> str:
    """What the next block's authenticity rests on, and what that of the first one did."""
    if not signs:
        return "one-time key, from a couriered pad on"
    if unproven:
        return "SIGNATURES: computational, until a block under a one-time key has passed"
    return "one-time key, made from blocks whose authenticity was computational (signatures) when they ran"


def randomness(config: EndConfig) -> str:
    """Where an end's choices come from."""
    if config.test_seed is not None:
        return "REPEATABLE: deterministic test mode, no key is delivered"
    return "operating system" + (f", mixed with {config.qrng[0]}" if config.qrng is not None else "")
