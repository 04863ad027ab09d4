"""Bob's side of a block, in the order of its frames.  He got the START frame already: it is in ``start``."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import numpy as np

from keysource.qkd.distill import wire
from keysource.qkd.distill.bits import Bits, unpack_untrusted
from keysource.qkd.distill.cascade import Corrector
from keysource.qkd.distill.party import Abort, Answer, Fly, Keep, Party, Step, intensity_of
from keysource.qkd.distill.toeplitz import toeplitz_hash
from keysource.qkd.distill.wire import CHECKED, KEY, TEST, Frame, Kind, Reason
from keysource.qkd.errors import BadFrame
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.optics.settings import SEED_BYTES, ReceiverSeed, fresh_seed
from keysource.qkd.rates.finite import Tally


class BobBlock(Party):
    """``spent``: how many tickets he has spent, this one included."""

    own, peer = b"B", b"A"
    spent: int = 0

    def _distil(self) -> Generator[Step, Answer, Bits]:
        started = self.start.frame()
        self.transcript.add(self.peer, started.kind, started.payload)
        self.outcome.peer_spent = self.start.spent
        yield from self.send(wire.ready(self.spent))
        n_x, m_x = yield from self._sift()
        errors = yield from self._correct()
        yield from self._verify()
        m_z = self.by_intensity(self.key_intensity[errors == 1])
        self.judge(n_x, m_x, m_z)
        yield from self.send(wire.accept(tuple(int(count) for count in m_z)))
        frame = yield from self.receive(Kind.AMPLIFY)
        seed, _ = wire.hashed_untrusted(frame.payload, self.amplify_seed_bits, 0)
        return self.amplify(seed)

    def _sift(self) -> Generator[Step, Answer, tuple[Tally, Tally]]:
        receiver = ReceiverSeed(self.seed or fresh_seed(), self.terms.p_z, chsh=self.terms.chsh)
        seen = yield Fly(receiver.seed)
        if not isinstance(seen, Detections):
            raise TypeError("a step that wants detections got none")
        bases = receiver.angles(seen.positions) if seen.bases is None else seen.bases
        self.ledger.raw = self.in_hand = len(seen.positions)
        if self.guard(seen.readings) is not None:
            raise Abort(Reason.MONITOR)
        yield from self.send(wire.detected(seen.positions, bases, self.terms.angles))
        frame = yield from self.receive(Kind.SIFT)
        sizes = self.plan.n_z, self.plan.n_x
        codes, checked, tested = wire.sift_untrusted(frame.payload, bases, *sizes, self.terms.intensities)
        key, check, test = ((codes & 3) == role for role in (KEY, CHECKED, TEST))
        self.key, self.key_intensity = seen.bits[key], intensity_of(codes[key])
        self.count_sifted(len(seen.positions), int(((codes & 3) == wire.DROPPED).sum()), len(self.key))
        yield from self.send(wire.check(seen.bits[check], seen.bits[test]))
        estimates = self.estimate(seen.bits[check], checked, intensity_of(codes[check]))
        with contextlib.suppress(Abort):  # Alice, who has the same numbers, says it
            self.test_chsh(tested, seen.bits[test], intensity_of(codes[test]), bases[test] - np.uint8(2))
        return estimates

    def _correct(self) -> Generator[Step, Answer, Bits]:
        """The errors that were found, as a bit string."""
        frame = yield from self.receive(Kind.CORRECT)
        if len(frame.payload) != SEED_BYTES:
            raise BadFrame("a CORRECT frame of a wrong length")
        corrector = Corrector(self.key, frame.payload, self.plan.sizes)
        work = corrector.run()
        question = next(work, None)
        while question is not None:
            self.budget.charge(len(question.positions))
            yield from self.send(wire.ask(question))
            frame = yield from self.receive(Kind.PARITY)
            answers = unpack_untrusted(frame.payload, len(question.positions))
            self.disclose(len(answers), len(question.positions))
            try:
                question = work.send(answers)
            except StopIteration:
                break
        corrected = corrector.bits
        errors: Bits = (self.key ^ corrected).astype(np.uint8)
        self.key = corrected
        yield from self.send(Frame(Kind.CORRECTED))
        return errors

    def _verify(self) -> Generator[Step, Answer, None]:
        frame = yield from self.receive(Kind.VERIFY)
        seed, tag = wire.hashed_untrusted(frame.payload, self.verify_seed_bits, self.plan.verify_bits)
        self.count_verified(tag)
        if (toeplitz_hash(self.key, seed, self.plan.verify_bits) != tag).any():
            raise Abort(Reason.VERIFY)

    def _authenticate(self, tickets: list[bytes]) -> Generator[Step, Answer, None]:
        yield from self.send_tag(Kind.AUTH, 0)
        yield from self.receive_tag(Kind.AUTH, 1)
        yield Keep(tickets)
        yield from self.send_tag(Kind.COMMIT, 2)

    def _authenticate_abort(self) -> Generator[Step, Answer, None]:
        yield from self.send_tag(Kind.AUTH, 0)
        yield from self.receive_tag(Kind.AUTH, 1)
