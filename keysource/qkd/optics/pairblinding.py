"""Blinding on a link of pairs: both sites' detectors are under bright light, and the source is Eve's.

For every pulse that shall click she chooses what each site should measure, and both bits, as an honest pair would
have shown them: with its errors, and for E91 with the correlations that violate Bell's inequality (Gerhardt et al.,
PRL 107, 170404, 2011).  A faked state clicks at a site that chose what she chose, and is silent else.  So each
of the c combinations of settings is there as often as on the honest link if she sends c times its coincidences; what
one site should see alone is added.  Errors, coincidences and S are what they were, and the key is hers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.blinding import Blinding
from keysource.qkd.optics.detectors import Clicks
from keysource.qkd.optics.eve import NOTHING, Notes, X
from keysource.qkd.optics.monitors import ATTENUATOR
from keysource.qkd.optics.pairs import CHSH
from keysource.qkd.optics.sampler import candidates
from keysource.qkd.optics.settings import Bits, Positions, ReceiverSeed

if TYPE_CHECKING:
    from keysource.qkd.optics.entangled import PairOptics

_JOINT, _ALICE, _BOB = 0, 1, 2
_ANGLES = np.array(CHSH)


@dataclass(frozen=True, slots=True)
class Faked:
    """What clicks at one site; ``choice`` and ``bit`` are what Eve meant by each click."""

    clicks: Clicks
    choice: Bits
    bit: Bits

    def notes(self, light: npt.NDArray[np.int64]) -> Notes:
        """Of the clicks with these indices: the bits of a basis; turned gates are no key."""
        choice = self.choice[light]
        how = np.where(choice <= X, choice, np.uint8(NOTHING)).astype(np.uint8)
        return Notes(how, self.bit[light])


def faked_pairs(
    optics: PairOptics,
    seeds: tuple[ReceiverSeed, ReceiverSeed],
    span: tuple[int, int],
    eve: Blinding,
    nature: np.random.Generator,
) -> tuple[Faked, Faked]:
    """(Alice's, Bob's) clicks of the pulses ``span``, before their detectors' dead time."""
    kinds = 2, 4 if optics.chsh > 0.0 else 2
    rates = _rates(optics, kinds)
    positions = candidates(*span, min(1.0, sum(rates)), nature)
    which = nature.choice(3, len(positions), p=np.array(rates) / sum(rates))
    choices = [nature.integers(0, count, len(positions), dtype=np.uint8) for count in kinds]
    bits = _bits(optics, choices[0], choices[1], nature)
    sites = []
    for site, alone in enumerate((_ALICE, _BOB)):
        sent = np.flatnonzero((which == _JOINT) | (which == alone))
        sites.append(_clicked(seeds[site], positions[sent], choices[site][sent], bits[site][sent], eve, nature))
    return sites[0], sites[1]


def _rates(optics: PairOptics, kinds: tuple[int, int]) -> list[float]:
    """Faked states per pulse: for both sites, for Alice alone, for Bob alone.  One for both clicks at a site with
    probability 1 / kinds."""
    joint = optics.ready_gain() * kinds[0] * kinds[1]
    lit = optics.lit(1.0, 0), optics.lit(1.0, 1)
    alone = [max(0.0, count * share - joint) for count, share in zip(kinds, lit, strict=True)]
    return [joint, *alone]


def _bits(optics: PairOptics, a: Bits, b: Bits, nature: np.random.Generator) -> tuple[Bits, Bits]:
    """As honest pairs would show: turned by the link's misalignment, and with its other errors at every angle."""
    drift = math.asin(math.sqrt(optics.misalignment))
    visible = (1.0 - 2.0 * optics.mean_qber()) / math.cos(2.0 * drift)
    agree = (1.0 + visible * np.cos(2.0 * (_ANGLES[b] - _ANGLES[a] + drift))) / 2.0
    hers = nature.integers(0, 2, len(a), dtype=np.uint8)
    return hers, hers ^ (nature.random(len(a)) >= agree).astype(np.uint8)


def _clicked(
    seed: ReceiverSeed, positions: Positions, choice: Bits, bit: Bits, eve: Blinding, nature: np.random.Generator
) -> Faked:
    tested = seed.both(positions)[1]
    let = np.flatnonzero(eve.clicks(choice, seed.angles(positions), tested, ATTENUATOR, nature))
    clicks = Clicks(positions[let].astype(np.int64), bit[let] + np.uint8(1))
    return Faked(clicks, choice[let], bit[let])
