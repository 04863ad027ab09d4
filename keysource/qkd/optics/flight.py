"""The light of one block, slice by slice: from both sites' seeds to what their detectors report."""

from __future__ import annotations

import numpy as np

from keysource.qkd.optics.blinding import Blinding
from keysource.qkd.optics.detectors import Receiver
from keysource.qkd.optics.entangled import AnyOptics, PairOptics, detect_pairs
from keysource.qkd.optics.eve import Eve, InterceptResend
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import TEST_SHARE
from keysource.qkd.optics.sampler import Detections, detect, join
from keysource.qkd.optics.settings import ReceiverSeed, SourceSeed


class WeakPulses:
    """Alice sends, Bob measures."""

    def __init__(self, optics: Optics, alice: bytes, bob: bytes, *, test: bool) -> None:
        """``alice``, ``bob``: seeds of their settings; ``test``: Bob's attenuator is in some of his gates."""
        self.source = SourceSeed.of(alice, optics.p_z, optics.probabilities)
        self.receiver = ReceiverSeed(bob, optics.p_z, TEST_SHARE if test else 0.0)
        self._detectors = Receiver(optics.recovery, optics.pulse_rate)
        self._parts: list[Detections] = []

    def slice(self, now: AnyOptics, span: tuple[int, int], eve: Eve, nature: np.random.Generator) -> None:
        """Fly the pulses ``span`` = (first, count) through the link as it is ``now``."""
        if not isinstance(now, Optics):
            raise TypeError("weak pulses need a link that has some")
        self._parts.append(detect(now, self.source, self.receiver, span, eve, nature, self._detectors))

    def reports(self) -> tuple[Detections | None, Detections]:
        """(Alice's, Bob's)."""
        return None, join(self._parts)


class EntangledPairs:
    """Both sites measure."""

    def __init__(self, optics: PairOptics, alice: bytes, bob: bytes, *, test: bool) -> None:
        """``test``: an attenuator is in some of the gates of each site."""
        share = TEST_SHARE if test else 0.0
        self.seeds = ReceiverSeed(alice, optics.p_z, share), ReceiverSeed(bob, optics.p_z, share, optics.chsh)
        self._detectors = tuple(Receiver(optics.recovery, optics.pulse_rate) for _ in self.seeds)
        self._parts: list[tuple[Detections, Detections]] = []

    def slice(self, now: AnyOptics, span: tuple[int, int], eve: Eve, nature: np.random.Generator) -> None:
        """Fly the pulses ``span`` = (first, count) through the link as it is ``now``."""
        if not isinstance(now, PairOptics):
            raise TypeError("pairs need a link that has a source of them")
        here, there = self._detectors
        self._parts.append(detect_pairs(now, *self.seeds, span, eve, nature, (here, there)))

    def reports(self) -> tuple[Detections | None, Detections]:
        """(Alice's, Bob's)."""
        alice, bob = zip(*self._parts, strict=True)
        return join(list(alice)), join(list(bob))


Flight = WeakPulses | EntangledPairs


def make_flight(optics: AnyOptics, alice: bytes, bob: bytes, *, test: bool = False) -> Flight:
    if isinstance(optics, PairOptics):
        return EntangledPairs(optics, alice, bob, test=test)
    return WeakPulses(optics, alice, bob, test=test)


def acts_on(eve: Eve, optics: AnyOptics) -> bool:
    """Does this attack have a meaning on this link?  The others need pulses of many photons."""
    return isinstance(optics, Optics) or eve.fraction <= 0.0 or isinstance(eve, InterceptResend | Blinding)
