"""The one proof per protocol under which keys are delivered, chosen by the source.

===============  =====================================================================================================
source           proof
===============  =====================================================================================================
``Decoy``        one-decoy BB84: arXiv:2405.16578 (``rates.finite``, ``wiesemann2024``)
``TwoDecoy``     two-decoy BB84: the same proof with the bounds of two decoys (``rates.twodecoy``)
``Entangled``    BBM92 and E91: Tomamichel et al. 2012 (``rates.tomamichel``); the CHSH value can only end a block
===============  =====================================================================================================

All are fixed-length proofs: sizes, thresholds, leak and length are fixed before the block.
"""

from __future__ import annotations

import math
from typing import Literal

from keysource.qkd.rates import finite, tomamichel, twodecoy
from keysource.qkd.rates.finite import Bounds, Counts, Decoy, Security
from keysource.qkd.rates.tomamichel import Entangled
from keysource.qkd.rates.twodecoy import TwoDecoy

Source = Decoy | TwoDecoy | Entangled
Protocol = Literal["bb84-1decoy", "bb84-2decoy", "bbm92", "e91"]


def proof_name(source: Source) -> str:
    match source:
        case Decoy():
            return finite.DELIVERING
        case TwoDecoy():
            return twodecoy.NAME
    return tomamichel.NAME


def protocol_name(source: Source) -> Protocol:
    """As a configuration says it."""
    match source:
        case Decoy():
            return "bb84-1decoy"
        case TwoDecoy():
            return "bb84-2decoy"
    return "e91" if source.chsh > 0.0 else "bbm92"


def intensities(source: Source) -> int:
    """Of a pulse: how many classes are counted apart.  Pairs have one."""
    return 1 if isinstance(source, Entangled) else len(source.intensities)


def probabilities(source: Source) -> tuple[float, ...]:
    """Of the intensities."""
    return (1.0,) if isinstance(source, Entangled) else source.probabilities


def judge(source: Source, counts: Counts, security: Security) -> Bounds:
    """What a block's statistics prove: its single photons (or pairs) in the key, its phase errors."""
    match source:
        case Decoy():
            return finite.bounds(source, counts, security)
        case TwoDecoy():
            return twodecoy.bounds(source, counts, security)
    return tomamichel.bounds(sum(counts.n_z), sum(counts.n_x), sum(counts.m_x), security.secrecy)


def secret_bits(source: Source, found: Bounds, leak: float, security: Security) -> int:
    """Length of the key of a block with these bounds; ``leak``: bits disclosed by error correction."""
    match source:
        case Decoy():
            return finite.secret_bits(found, leak, security)
        case TwoDecoy():
            return twodecoy.secret_bits(found, leak, security)
    return math.floor(tomamichel.secret_bits(found, leak, security.secrecy, security.correctness))
