"""Alice's side of a block, in the order of its frames."""

from __future__ import annotations

import os
from collections.abc import Generator

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill import wire
from keysource.qkd.distill.bits import Bits, pack, random_bits, unpack_untrusted
from keysource.qkd.distill.cascade import Reference
from keysource.qkd.distill.party import Abort, Answer, Fly, Keep, Party, Step, by_intensity, is_decoy
from keysource.qkd.distill.toeplitz import toeplitz_hash
from keysource.qkd.distill.wire import CHECKED, KEY, Frame, Kind, Reason
from keysource.qkd.errors import BadFrame
from keysource.qkd.optics.settings import SourceSeed, fresh_seed
from keysource.qkd.rates.finite import Pair
from keysource.qkd.records import RecordedSettings


class AliceBlock(Party):
    """She decides nothing that Bob cannot check; her bits are the reference."""

    own, peer = b"A", b"B"

    def _distil(self) -> Generator[Step, Answer, Bits]:
        yield from self.send(self.start.frame())
        answer = yield from self.receive(Kind.READY)
        self.outcome.peer_spent = wire.ready_untrusted(answer.payload)
        source = SourceSeed(fresh_seed(), self.terms.p_z, self.terms.decoy.p1)
        flown = yield Fly(source.seed)
        chosen = flown if isinstance(flown, RecordedSettings) else source
        check_bits, check_decoy = yield from self._sift(chosen)
        n_x, m_x = yield from self._check(check_bits, check_decoy)
        yield from self._correct()
        m_z = yield from self._verify()
        self.judge(n_x, m_x, m_z)
        seed = random_bits(self.amplify_seed_bits)  # drawn only now, when all quantum data is fixed
        yield from self.send(wire.hashed(Kind.AMPLIFY, seed))
        return self.amplify(seed)

    def _sift(self, source: SourceSeed | RecordedSettings) -> Generator[Step, Answer, tuple[Bits, Bits]]:
        """Keep random subsets of the fixed sizes; tell Bob which, and the check bits."""
        frame = yield from self.receive(Kind.DETECTED)
        positions, bases = wire.detected_untrusted(frame.payload, self.plan.pulses)
        settings = source.at(positions)
        self.outcome.detected = by_intensity(settings.decoy)
        codes = np.zeros(len(positions), dtype=np.uint8)
        both_z = np.flatnonzero((settings.check == 0) & (bases == 0))
        both_x = np.flatnonzero((settings.check == 1) & (bases == 1))
        if len(both_z) < self.plan.n_z or len(both_x) < self.plan.n_x:
            self.ledger.raw = self.in_hand = len(positions)
            raise Abort(Reason.SHORT)
        codes[random_subset(both_z, self.plan.n_z)] = KEY
        codes[random_subset(both_x, self.plan.n_x)] = CHECKED
        codes |= (settings.decoy * np.uint8(wire.DECOY)) * (codes > 0)
        key, check = (codes & 3) == KEY, (codes & 3) == CHECKED
        self.key, self.key_decoy = settings.bit[key], is_decoy(codes[key])
        self.count_sifted(len(positions), int((codes == 0).sum()), len(self.key))
        yield from self.send(wire.sift(codes, settings.bit[check]))
        return settings.bit[check], is_decoy(codes[check])

    def _check(self, bits: Bits, decoy: Bits) -> Generator[Step, Answer, tuple[Pair, Pair]]:
        frame = yield from self.receive(Kind.CHECK)
        theirs = unpack_untrusted(frame.payload, self.plan.n_x)
        n_x, m_x = self.estimate(bits, theirs, decoy)
        if m_x.total > self.plan.check_errors:
            raise Abort(Reason.QBER)
        return n_x, m_x

    def _correct(self) -> Generator[Step, Answer, None]:
        seed = fresh_seed()
        yield from self.send(Frame(Kind.CORRECT, seed))
        reference = Reference(self.key, seed, len(self.plan.sizes))
        while True:
            frame = yield from self.receive(Kind.ASK, Kind.CORRECTED)
            if frame.kind is Kind.CORRECTED:
                if frame.payload:
                    raise BadFrame("a CORRECTED frame with a payload")
                return
            question = wire.ask_untrusted(frame.payload)
            self.budget.charge(len(question.positions))
            answers = reference.answer_untrusted(question)
            self.disclose(len(answers), len(question.positions))
            yield from self.send(Frame(Kind.PARITY, pack(answers)))

    def _verify(self) -> Generator[Step, Answer, Pair]:
        seed = random_bits(self.verify_seed_bits)
        tag = toeplitz_hash(self.key, seed, self.plan.verify_bits)
        self.count_verified(tag)
        yield from self.send(wire.hashed(Kind.VERIFY, seed, tag))
        frame = yield from self.receive(Kind.ACCEPT)
        signal, decoy = wire.accept_untrusted(frame.payload)
        return Pair(signal, decoy)

    def _authenticate(self, tickets: list[bytes]) -> Generator[Step, Answer, None]:
        yield from self.receive_tag(Kind.AUTH, 0)
        yield from self.send_tag(Kind.AUTH, 1)
        yield from self.receive_tag(Kind.COMMIT, 2)
        yield Keep(tickets)

    def _authenticate_abort(self) -> Generator[Step, Answer, None]:
        yield from self.receive_tag(Kind.AUTH, 0)
        yield from self.send_tag(Kind.AUTH, 1)


def random_subset(members: npt.NDArray[np.intp], size: int) -> npt.NDArray[np.intp]:
    """``size`` of them, every subset equally likely, by the system's randomness."""
    order = np.argsort(np.frombuffer(os.urandom(8 * len(members)), dtype=np.uint64), kind="stable")
    return members[np.sort(order[:size])]
