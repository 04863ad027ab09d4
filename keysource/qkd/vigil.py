"""How many published bits it takes to notice Eve: a sequential test of check bits, on clicks of the real sampler.

Wald's one-sided test adds up log-likelihood ratios of "errors as with Eve" over "errors as without", bit by bit, and
raises the alarm at ln(1 / a): whatever the length of the watch, an honest link raises it with a probability of at
most a.  On average it takes ln(1 / a) / D bits with Eve there, D the relative entropy of one bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.eve import Eve, InterceptResend
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.sampler import detect
from keysource.qkd.optics.settings import SEED_BYTES, ReceiverSeed, SourceSeed
from keysource.qkd.rates.finite import Decoy

BASELINE = 0.02
"""Error ratio of the honest link."""
LINK = Optics(Decoy(0.5, 0.15, 0.5), 0.5, 10.0, 0.2, 0.5, 1e-9, BASELINE, 1e6)
RATES = tuple(10.0**-k for k in range(1, 10))
FRACTIONS = (1.0, 0.25, 0.1, 0.05, 0.01)


@dataclass(frozen=True, slots=True)
class Delay:
    """Bits until the alarm.  ``measured`` is the mean of ``runs`` watches, ``spread`` its standard error."""

    fraction: float
    false_alarms: float
    expected: float
    measured: float
    spread: float
    runs: int


def with_eve(fraction: float) -> float:
    """Error ratio with intercept-resend of that fraction of the pulses."""
    return BASELINE + fraction * (0.25 - BASELINE / 2.0)


def expected_delay(fraction: float, false_alarms: float) -> float:
    """Bits, on average; the overshoot over the limit is left out."""
    p0, p1 = BASELINE, with_eve(fraction)
    entropy = p1 * math.log(p1 / p0) + (1.0 - p1) * math.log((1.0 - p1) / (1.0 - p0))
    return math.log(1.0 / false_alarms) / entropy


def sifted_errors(eve: Eve, bits: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which of so many sifted bits are wrong, in the order of their clicks.  The same ``seed``, the same errors."""
    nature, found = np.random.default_rng(seed), list[npt.NDArray[np.bool_]]()
    pulses = math.ceil(1.05 * 2.0 * bits / LINK.mean_gain()) + 1000
    while sum(len(part) for part in found) < bits:
        source = SourceSeed(nature.bytes(SEED_BYTES), LINK.p_z, LINK.decoy.p1)
        bob = ReceiverSeed(nature.bytes(SEED_BYTES), LINK.p_z)
        seen = detect(LINK, source, bob, (0, pulses), eve, nature)
        alice = source.at(seen.positions)
        same = alice.check == bob.at(seen.positions)
        found.append((alice.bit != seen.bits)[same])
    return np.concatenate(found)[:bits]


def alarms(wrong: npt.NDArray[np.bool_], fraction: float, limits: Sequence[float]) -> list[int | None]:
    """For each false-alarm rate the number of bits seen when the test for ``fraction`` fires; None: it does not."""
    p0, p1 = BASELINE, with_eve(fraction)
    steps = np.where(wrong, math.log(p1 / p0), math.log((1.0 - p1) / (1.0 - p0)))
    highest = np.maximum.accumulate(np.cumsum(steps))
    first = np.searchsorted(highest, [math.log(1.0 / limit) for limit in limits])
    return [int(at) + 1 if at < len(wrong) else None for at in first]


def measure(fraction: float, runs: int, seed: int = 1) -> list[Delay]:
    """Delays at each of :data:`RATES`.  Raises :class:`ValueError` where a watch of three times the expected delay
    sees nothing: no mean could be given."""
    length = math.ceil(3.0 * expected_delay(fraction, RATES[-1])) + 200
    wrong = sifted_errors(InterceptResend(fraction), runs * length, seed).reshape(runs, length)
    seen = [alarms(watch, fraction, RATES) for watch in wrong]
    result = []
    for i, rate in enumerate(RATES):
        delays = np.array([watch[i] for watch in seen], dtype=float)  # None becomes nan
        if np.isnan(delays).any():
            raise ValueError("a watch without an alarm")
        spread = float(delays.std(ddof=1) / math.sqrt(runs))
        result.append(Delay(fraction, rate, expected_delay(fraction, rate), float(delays.mean()), spread, runs))
    return result


def false_alarms(fraction: float, limit: float, runs: int, seed: int = 2) -> float:
    """Share of honest watches, ten expected delays long, in which the test fires."""
    length = math.ceil(10.0 * expected_delay(fraction, limit))
    wrong = sifted_errors(Eve(), runs * length, seed).reshape(runs, length)
    return sum(alarms(watch, fraction, [limit])[0] is not None for watch in wrong) / runs
