"""What one end saw of a block, as plain numbers for its status socket: no bit of any key."""

from __future__ import annotations

from typing import Any

from keysource.base import KEY_BYTES
from keysource.qkd.distill.party import Outcome
from keysource.qkd.plan import Plan
from keysource.qkd.presets import Preset

KEPT_REPORTS = 48
"""Of the newest blocks; together they fit one line of the control socket."""


def report(outcome: Outcome, preset: Preset, plan: Plan) -> dict[str, Any]:
    """``gains`` (detections per pulse of each intensity) only where Alice could count them; ``s_z1`` and ``phi`` only
    where the block came to its statistical test."""
    found = outcome.found
    return {
        "block": outcome.block,
        "result": "passed" if outcome.reason is None else outcome.reason.name.lower(),
        "keys": len(outcome.keys) // KEY_BYTES,
        "qber": outcome.qber,
        "gains": _gains(outcome, preset, plan),
        "s_z1": None if found is None else found.s_z1,
        "phi": None if found is None else found.phi,
        "chsh": outcome.chsh,
        "messages": outcome.messages,
        "ledger": outcome.ledger.as_dict(),
    }


def _gains(outcome: Outcome, preset: Preset, plan: Plan) -> list[float] | None:
    if outcome.detected is None:
        return None
    shares = preset.optics.probabilities
    return [count / (plan.pulses * share) for count, share in zip(outcome.detected, shares, strict=True)]
