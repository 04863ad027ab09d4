"""Everything about a block that is fixed before its first pulse: sizes, thresholds, leak budget, key length.

The delivering proof is a fixed-length one: the length must not depend on what the block shows.  So a block is
accepted if its statistics lie in a set that was fixed before, and the length is at most the smallest that the proof
allows anywhere in the set.  The set here: *bounds that prove as much as the length wants* (and each bound by itself
within :data:`FLOOR_MARGIN`).  The length is what the link's closed form expects less a margin for chance; a block
whose bounds prove less gives nothing, one whose bounds prove more gives no bit more.  All statistics that the set
speaks of are announced and authenticated.  Both ends work the plan out by themselves and compare its digest.

That the set is one condition on what both bounds prove together, and not a threshold for each, costs nothing in the
proof, which only wants it fixed beforehand, and saves key: both bounds are rarely at their worst at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import numpy as np

from keysource.qkd.distill.cascade import block_sizes
from keysource.qkd.optics.entangled import PairOptics
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.monitors import TEST_SHARE
from keysource.qkd.rates.entropy import binary_entropy
from keysource.qkd.rates.finite import Bounds, Counts, Security
from keysource.qkd.rates.proofs import Source, judge, proof_name, secret_bits

_NO_KEY = "blocks of this size give no key over this link: longer blocks or a shorter link"
SIZE_MARGIN = 5.0
"""Standard deviations between the expected sifted bits and the fixed block sizes."""
LEAK_MARGIN = 4.0
"""Standard deviations between the expected errors and those that the leak budget pays for."""
TEST_MARGIN = 3.5
"""Standard deviations between the key that an expected block proves and the length: an honest block falls short about
once in 4,000."""
FLOOR_MARGIN = 5.0
"""Standard deviations of each bound between what the link's closed form expects and its threshold."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One block.  Bits unless said otherwise."""

    pulses: int
    n_z: int
    n_x: int
    check_errors: int
    """At most so many errors among the ``n_x`` check bits: beyond, error correction is not even begun."""
    s_z1: float
    """Single-photon events in the key basis, of pairs all key bits: at least; see also :meth:`accepts`."""
    phi: float
    """Phase error ratio: at most."""
    leak_budget: int
    """Alice's parities; Bob's mirror of them has a budget of its own, of the same size."""
    verify_bits: int
    length: int
    """Secret bits that a passed block gives, always."""
    sizes: tuple[int, ...]
    """Block length of each Cascade pass, in one of its frames; 0: a random half of everything."""
    expected_qber: float

    def __post_init__(self) -> None:
        if self.length <= 0 or self.n_z < 1 or self.n_x < 1:
            raise ValueError(_NO_KEY)
        if self.length > self.n_z - 2 * self.leak_budget - self.verify_bits:
            raise ValueError("a plan that gives more key than it has bits")

    def digest(self, optics: Optics | PairOptics, security: Security) -> str:
        """Both ends must have the same plan, optics, error budget and proof."""
        parts = [asdict(self), asdict(optics), asdict(security), proof_name(optics.source)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def accepts(self, found: Bounds, source: Source, security: Security) -> bool:
        """The statistical test of a corrected block: do its bounds prove the length, with the whole leak budget
        spent?"""
        if found.s_z1 < self.s_z1 or found.phi > self.phi:
            return False
        return secret_bits(source, found, 2.0 * self.leak_budget, security) >= self.length


def make_plan(
    optics: Optics | PairOptics, pulses: int, security: Security, schedule: str, *, tests: bool = False
) -> Plan:
    """Work out a plan for blocks of ``pulses`` pulses.  ``tests``: some of Bob's gates test his detectors, and
    their clicks are no detections; with pairs some of Alice's, too.

    Raises:
        ValueError: no key at this size and loss.
    """
    receivers = 2 if isinstance(optics, PairOptics) else 1
    used = (1.0 - TEST_SHARE) ** receivers if tests else 1.0
    n_z, n_x = (_sure_size(used * pulses * share) for share in optics.sifted())
    if n_z < 1 or n_x < 1:
        raise ValueError(_NO_KEY)
    expected = optics.expected(n_z, n_x)
    worst, margin = thresholds(optics.source, expected, security)
    qber = optics.mean_qber()
    budget = leak_budget(n_z, qber, schedule)
    proved = secret_bits(optics.source, judge(optics.source, expected, security), 2.0 * budget, security)
    return Plan(
        pulses=pulses,
        n_z=n_z,
        n_x=n_x,
        check_errors=math.floor(n_x * qber + 6.0 * math.sqrt(n_x * qber) + 6.0),
        s_z1=worst.s_z1,
        phi=worst.phi,
        leak_budget=budget,
        verify_bits=math.ceil(math.log2(1.0 / security.correctness)),
        length=max(0, proved - math.ceil(margin)),
        sizes=tuple(block_sizes(n_z, qber, schedule)),
        expected_qber=qber,
    )


def leak_budget(n_z: int, qber: float, schedule: str) -> int:
    """Parities for a block with more errors than nearly all, at an efficiency that Cascade nearly always reaches.

    Against the errors that there are, the optimised schedule needs 1.026 to 1.037 times Shannon's limit in every
    block of 10^5 to 10^6 bits that was tried, and a little more in smaller ones.
    """
    unlucky = qber + LEAK_MARGIN * math.sqrt(qber * (1.0 - qber) / n_z)
    efficiency = 1.16 if schedule == "original" else 1.03 + 6.0 / math.sqrt(n_z)
    return math.ceil(efficiency * n_z * binary_entropy(unlucky)) + 64


def thresholds(source: Source, expected: Counts, security: Security) -> tuple[Bounds, float]:
    """(each bound of an expected block :data:`FLOOR_MARGIN` of its own standard deviations to the bad side, bits of
    key that :data:`TEST_MARGIN` standard deviations of both together are)."""
    mean = judge(source, expected, security)
    spread = {"s_z1": 0.0, "phi": 0.0, "proved": 0.0}
    for change in _fluctuations(expected):
        more, less = (judge(source, _moved(expected, change, sign), security) for sign in (1.0, -1.0))
        steps = {"s_z1": more.s_z1 - less.s_z1, "phi": more.phi - less.phi, "proved": _proved(more) - _proved(less)}
        for name, step in steps.items():
            spread[name] += (step / 2.0) ** 2
    s_z1 = max(0.0, mean.s_z1 - FLOOR_MARGIN * math.sqrt(spread["s_z1"]))
    phi = min(0.5, mean.phi + FLOOR_MARGIN * math.sqrt(spread["phi"]))
    return Bounds(s_z1, mean.s_x1, mean.v_x1, phi), TEST_MARGIN * math.sqrt(spread["proved"])


def _proved(found: Bounds) -> float:
    """Bits of key that two bounds give together, before what every block pays alike."""
    return found.s_z1 * (1.0 - binary_entropy(found.phi)) if found.phi < 0.5 else 0.0


_Change = dict[str, tuple[float, ...]]


def _fluctuations(expected: Counts) -> list[_Change]:
    """Independent changes of the counts, each of one standard deviation: those of a block of fixed size, how its
    detections fall to the intensities (multinomial: principal axes), and how many are wrong (Poisson)."""
    changes: list[_Change] = []
    for name in ("n_z", "n_x"):
        counts = np.array(getattr(expected, name))
        share = counts / counts.sum()
        values, axes = np.linalg.eigh(counts.sum() * (np.diag(share) - np.outer(share, share)))
        steps = np.sqrt(np.maximum(values, 0.0)) * axes
        changes += [{name: tuple(step)} for step in steps.T if np.abs(step).max() > 1e-9]
    for name in ("m_z", "m_x"):
        errors = getattr(expected, name)
        for i, count in enumerate(errors):
            changes.append({name: tuple(math.sqrt(count) if i == j else 0.0 for j in range(len(errors)))})
    return changes


def _moved(expected: Counts, change: _Change, sign: float) -> Counts:
    def shifted(name: str) -> tuple[float, ...]:
        counts = getattr(expected, name)
        steps = change.get(name, (0.0,) * len(counts))
        return tuple(max(0.0, count + sign * step) for count, step in zip(counts, steps, strict=True))

    return Counts(shifted("n_z"), shifted("m_z"), shifted("n_x"), shifted("m_x"))


def _sure_size(left: float) -> int:
    """``left``: expected without the gates that Bob may spend on efficiency tests, whose clicks are no detections."""
    return max(0, math.floor(left - SIZE_MARGIN * math.sqrt(left)))
