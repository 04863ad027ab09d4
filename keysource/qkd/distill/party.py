"""What both ends of a block have in common.  Sans-IO: a block is a generator of steps.

The driver performs each :data:`Step` and sends its result back in: a frame for :class:`Receive`, detections (Bob), or
None or recorded settings (Alice) for :class:`Fly`, None for the others.  The generator's return value is the
:class:`Outcome`.
:class:`~keysource.qkd.errors.BadFrame` and :class:`~keysource.qkd.errors.Forged` come out where the other end is not
who it should be: the block is dead, the connection too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np

from keysource.base import KEY_BYTES
from keysource.qkd.distill.bits import Bits
from keysource.qkd.distill.mac import TICKET_BYTES, Authenticator, Transcript
from keysource.qkd.distill.toeplitz import seed_bits, toeplitz_hash
from keysource.qkd.distill.wire import INTENSITY, Frame, Kind, Reason, Start, abort, abort_untrusted
from keysource.qkd.errors import BadFrame, Forged
from keysource.qkd.ledger import Ledger
from keysource.qkd.optics.monitors import Readings
from keysource.qkd.optics.pairs import Coincidences, chsh, passes
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.plan import Plan
from keysource.qkd.rates.finite import Bounds, Counts, Security, Tally
from keysource.qkd.rates.proofs import Source, intensities, judge
from keysource.qkd.rates.tomamichel import Entangled
from keysource.qkd.records import RecordedSettings


@dataclass(frozen=True, slots=True)
class Send:
    frame: Frame


@dataclass(frozen=True, slots=True)
class Receive:
    pass


@dataclass(frozen=True, slots=True)
class Fly:
    """The N pulses of the block: tell the fibre this site's settings and wait until all are measured.  The answer
    is what the site's hardware has: Bob's detections; None or recorded settings of Alice's, with pairs detections."""

    seed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Keep:
    """Both ends have confirmed: put these tickets on disk before going on."""

    tickets: list[bytes] = field(repr=False)


Step = Send | Receive | Fly | Keep
Answer = Frame | Detections | RecordedSettings | None
Steps = Generator[Step, Answer, "Outcome"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What both ends agreed on before any block."""

    plan: Plan
    source: Source
    p_z: float
    security: Security

    @property
    def intensities(self) -> int:
        """Classes of pulses that are counted apart."""
        return intensities(self.source)

    @property
    def chsh(self) -> float:
        """Share of Bob's gates that test for CHSH; 0 in all protocols but E91."""
        return self.source.chsh if isinstance(self.source, Entangled) else 0.0

    @property
    def angles(self) -> int:
        """How many Bob may announce to have measured at."""
        return 4 if self.chsh > 0.0 else 2


class Abort(Exception):
    """The block gives nothing.  ``said`` where the other end told us."""

    def __init__(self, reason: Reason, *, said: bool = False) -> None:
        super().__init__(reason.name)
        self.reason = reason
        self.said = said


@dataclass(slots=True)
class Outcome:
    """What a block came to.  ``keys`` is empty unless ``reason`` is None."""

    block: int
    reason: Reason | None
    ledger: Ledger
    keys: bytearray = field(default_factory=bytearray, repr=False)
    qber: float | None = None
    """Error ratio of the check basis."""
    detected: Tally | None = None
    """All detections of the block, per intensity (of pairs: coincidences); only Alice knows."""
    found: Bounds | None = None
    chsh: tuple[float, float] | None = None
    """E91: S and its standard deviation."""
    peer_spent: int = 0
    messages: int = 0
    forgery: float = 0.0
    """Bound on the probability that the authentication was passed by a forger; of signatures there is none."""


class LeakBudget:
    """Parities that may still be disclosed, both ends' counted apart."""

    def __init__(self, plan: Plan) -> None:
        self._answers = self._questions = plan.leak_budget

    def charge(self, parities: int) -> None:
        """Raises :class:`Abort` before the budget is exceeded."""
        if parities > self._answers:
            raise Abort(Reason.LEAK)
        self._answers -= parities
        self._questions -= parities

    @property
    def unspent(self) -> int:
        return self._answers + self._questions


class Party(ABC):
    """One end of one block."""

    own: bytes
    """Its name in the transcript."""
    peer: bytes
    seed: bytes | None = None
    """Of its settings, where its pulses have begun to fly before the block does; None: drawn when they fly."""
    guard: Callable[[Readings | None], str | None] = staticmethod(lambda readings: None)
    """A sentence where a monitor of this site's detectors fires."""

    def __init__(self, terms: Terms, start: Start, ticket: Authenticator) -> None:
        self.terms, self.plan = terms, terms.plan
        self.start, self.block, self.ticket = start, start.block, ticket
        self.transcript = Transcript()
        self.ledger = Ledger()
        self.budget = LeakBudget(terms.plan)
        self.outcome = Outcome(start.block, None, self.ledger)
        self.key: Bits = np.empty(0, dtype=np.uint8)
        self.key_intensity: Bits = np.empty(0, dtype=np.uint8)
        self.in_hand = 0
        """Bits of the block that are neither published, dropped nor hashed away: lost by an abort."""

    # Frames

    def send(self, frame: Frame) -> Generator[Step, Answer, None]:
        self.transcript.add(self.own, frame.kind, frame.payload)
        self.outcome.messages += 1
        yield Send(frame)

    def receive(self, *kinds: Kind) -> Generator[Step, Answer, Frame]:
        """The next frame, which is of one of these kinds.  Raises :class:`Abort` where the other end gives up."""
        frame = yield Receive()
        if not isinstance(frame, Frame):
            raise TypeError("a step that wants a frame got none")
        self.transcript.add(self.peer, frame.kind, frame.payload)
        self.outcome.messages += 1
        if frame.kind is Kind.ABORT:
            raise Abort(abort_untrusted(frame.payload), said=True)
        if frame.kind not in kinds:
            raise BadFrame(f"a {frame.kind.name} frame where {' or '.join(k.name for k in kinds)} belongs")
        return frame

    def send_tag(self, kind: Kind, index: int) -> Generator[Step, Answer, None]:
        yield from self.send(Frame(kind, self.ticket.tag(index, self.transcript)))

    def receive_tag(self, kind: Kind, index: int) -> Generator[Step, Answer, None]:
        """Raises :class:`Forged`."""
        frame = yield Receive()
        if not isinstance(frame, Frame) or frame.kind is not kind or len(frame.payload) != self.ticket.tag_bytes:
            raise BadFrame(f"no tag where {kind.name} belongs")
        self.outcome.forgery += self.ticket.forgery(self.transcript)
        if not self.ticket.fits(index, self.transcript, frame.payload):
            raise Forged(f"block {self.block}: the classical channel was tampered with (tag {index})")
        self.transcript.add(self.peer, frame.kind, frame.payload)

    # The block

    def run(self) -> Steps:
        """From the first frame to the outcome."""
        try:
            secret = yield from self._distil()
        except Abort as verdict:
            if not verdict.said:
                yield from self.send(abort(verdict.reason))
            self.outcome.reason = verdict.reason
            self.ledger.lost = self.in_hand
            yield from self._authenticate_abort()
            return self.outcome
        tickets, keys = self._divide(secret)
        yield from self._authenticate(tickets)
        self.outcome.keys = keys
        return self.outcome

    @abstractmethod
    def _distil(self) -> Generator[Step, Answer, Bits]:
        """From the flight to the secret bits."""

    @abstractmethod
    def _authenticate(self, tickets: list[bytes]) -> Generator[Step, Answer, None]:
        """Prove the whole transcript, and have it proved."""

    @abstractmethod
    def _authenticate_abort(self) -> Generator[Step, Answer, None]:
        """The same of a transcript that ends early."""

    # Counting

    def count_sifted(self, raw: int, dropped: int, key: int) -> None:
        """Detections announced, of those dropped, of those kept for the key; the published ones are counted apart."""
        self.ledger.raw = raw
        self.ledger.discarded = dropped
        self.in_hand = key

    def estimate(self, mine: Bits, theirs: Bits, intensity: Bits) -> tuple[Tally, Tally]:
        """(detections, errors) of the published check bits, per intensity."""
        self.ledger.check += len(theirs)
        wrong = mine ^ theirs
        self.outcome.qber = float(wrong.mean())
        return self.by_intensity(intensity), self.by_intensity(intensity[wrong == 1])

    def test_chsh(self, alice: Bits, bob: Bits, angle_a: Bits, angle_b: Bits) -> None:
        """E91: S of the published test bits.  It can only end the block.  Raises :class:`Abort`."""
        self.ledger.check += len(alice)
        if self.terms.chsh <= 0.0:
            return
        if np.bincount(2 * angle_a.astype(np.int64) + angle_b, minlength=4).min() < 2:
            raise Abort(Reason.CHSH)
        self.outcome.chsh = chsh(Coincidences(alice, bob, angle_a, angle_b))
        if not passes(*self.outcome.chsh):
            raise Abort(Reason.CHSH)

    def by_intensity(self, intensity: Bits) -> Tally:
        """How many there are of each."""
        return tuple(int(np.count_nonzero(intensity == each)) for each in range(self.terms.intensities))

    def disclose(self, answers: int, questions: int) -> None:
        self.ledger.leaked += answers
        self.ledger.mirrored += questions
        self.in_hand -= answers + questions

    def count_verified(self, tag: Bits) -> None:
        self.ledger.verified = len(tag)
        self.in_hand -= len(tag)

    def judge(self, n_x: Tally, m_x: Tally, m_z: Tally) -> None:
        """The statistical test.  Raises :class:`Abort`."""
        counts = Counts(self.by_intensity(self.key_intensity), m_z, n_x, m_x)
        self.outcome.found = judge(self.terms.source, counts, self.terms.security)
        if not self.plan.accepts(self.outcome.found, self.terms.source, self.terms.security):
            raise Abort(Reason.STATISTICS)

    def amplify(self, seed: Bits) -> Bits:
        """Hash the corrected key to the length of the plan."""
        secret = toeplitz_hash(self.key, seed, self.plan.length)
        removed = len(self.key) - len(secret)
        self.ledger.unspent = self.budget.unspent
        self.ledger.amplified = removed - 2 * self.plan.leak_budget - self.plan.verify_bits
        self.in_hand = 0
        return secret

    @property
    def amplify_seed_bits(self) -> int:
        return seed_bits(self.plan.n_z, self.plan.length)

    @property
    def verify_seed_bits(self) -> int:
        return seed_bits(self.plan.n_z, self.plan.verify_bits)

    def _divide(self, secret: Bits) -> tuple[list[bytes], bytearray]:
        """The pad's share first, then whole keys; what fills no key is dropped."""
        share = 8 * TICKET_BYTES * self.start.refills
        pad, rest = np.packbits(secret[:share]).tobytes(), secret[share:]
        tickets = [pad[i : i + TICKET_BYTES] for i in range(0, len(pad), TICKET_BYTES)]
        whole = len(rest) - len(rest) % (8 * KEY_BYTES)
        keys = bytearray(np.packbits(rest[:whole]).tobytes())
        self.ledger.authenticated = 8 * sum(len(ticket) for ticket in tickets)
        self.ledger.remainder = len(rest[whole:])
        self.ledger.delivered = 8 * len(keys)
        return tickets, keys


def intensity_of(codes: Bits) -> Bits:
    """From sifting codes: the number of the intensity, of a test Alice's basis."""
    found: Bits = (codes >> np.uint8(INTENSITY)).astype(np.uint8)
    return found
