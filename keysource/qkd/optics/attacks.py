"""Eve by name, as the fibre's control socket and ``qvpn-qkd eve`` order her."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keysource.qkd.errors import LinkError
from keysource.qkd.optics.blinding import Blinding
from keysource.qkd.optics.eve import BeamSplitting, Eve, InterceptResend, PhotonNumber

ATTACKS = ("intercept-resend", "photon-number", "beam-splitting", "blinding", "none")
MODES = ("cw", "pulsed")


def make_eve(request: Mapping[str, Any]) -> Eve:
    """From ``attack``, ``fraction`` (default 1), ``mode``; a fraction alone is intercept-resend.

    Raises:
        LinkError: none of these, with the sentence for the user.
    """
    name, fraction, mode = request.get("attack", ATTACKS[0]), request.get("fraction", 1.0), request.get("mode", "cw")
    if name not in ATTACKS:
        raise LinkError(f"attack is one of {', '.join(ATTACKS)}")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        raise LinkError("fraction is a number from 0 to 1")
    if mode not in MODES:
        raise LinkError(f"mode is one of {', '.join(MODES)}")
    if name == "blinding" and fraction not in (0, 1):
        raise LinkError("blinding takes all pulses or none: fraction is 0 or 1")
    match name:
        case "intercept-resend" if fraction > 0:
            return InterceptResend(float(fraction))
        case "photon-number":
            return PhotonNumber(float(fraction))
        case "beam-splitting":
            return BeamSplitting(float(fraction))
        case "blinding":
            return Blinding(float(fraction), mode)
    return Eve()
