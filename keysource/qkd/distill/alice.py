"""Alice's side of a block, in the order of its frames."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill import wire
from keysource.qkd.distill.bits import Bits, pack, random_bits
from keysource.qkd.distill.cascade import Reference
from keysource.qkd.distill.party import Abort, Answer, Fly, Keep, Party, Step, intensity_of
from keysource.qkd.distill.toeplitz import toeplitz_hash
from keysource.qkd.distill.wire import CHECKED, INTENSITY, KEY, TEST, Frame, Kind, Reason
from keysource.qkd.errors import BadFrame, LinkError
from keysource.qkd.optics.monitors import Readings
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.optics.settings import AliceSettings, Positions, ReceiverSeed, SourceSeed, fresh_seed
from keysource.qkd.randomness import draw
from keysource.qkd.rates.finite import Tally
from keysource.qkd.rates.proofs import probabilities
from keysource.qkd.rates.tomamichel import Entangled
from keysource.qkd.records import RecordedSettings


class Measured:
    """With a source of pairs she chooses bases only; her bits are what her own detectors found."""

    def __init__(self, seen: Detections, bases: Bits) -> None:
        self._seen, self._bases = seen, bases

    @property
    def readings(self) -> Readings | None:
        """Of the monitors of her detectors."""
        return self._seen.readings

    def at(self, positions: Positions) -> AliceSettings:
        """At Bob's detections; ``heard`` is 0 where she has none."""
        mine = self._seen.positions
        if not len(mine):
            nothing = np.zeros(len(positions), dtype=np.uint8)
            return AliceSettings(nothing, nothing, nothing, nothing)
        where = np.minimum(np.searchsorted(mine, positions), len(mine) - 1)
        heard = (mine[where] == positions).astype(np.uint8)
        return AliceSettings(self._seen.bits[where], self._bases[where], np.zeros_like(heard), heard)


Chosen = SourceSeed | RecordedSettings | Measured
"""Where her bits and bases come from."""


class AliceBlock(Party):
    """She decides nothing that Bob cannot check; her bits are the reference."""

    own, peer = b"A", b"B"

    def _distil(self) -> Generator[Step, Answer, Bits]:
        yield from self.send(self.start.frame())
        answer = yield from self.receive(Kind.READY)
        self.outcome.peer_spent = wire.ready_untrusted(answer.payload)
        chosen = yield from self._fly()
        published = yield from self._sift(chosen)
        n_x, m_x = yield from self._check(*published)
        yield from self._correct()
        m_z = yield from self._verify()
        self.judge(n_x, m_x, m_z)
        seed = random_bits(self.amplify_seed_bits)  # drawn only now, when all quantum data is fixed
        yield from self.send(wire.hashed(Kind.AMPLIFY, seed))
        return self.amplify(seed)

    def _fly(self) -> Generator[Step, Answer, Chosen]:
        """Raises :class:`LinkError` where the hardware gives something else than the protocol has."""
        seed, entangled = self.seed or fresh_seed(), isinstance(self.terms.source, Entangled)
        flown = yield Fly(seed)
        if entangled != isinstance(flown, Detections):
            raise LinkError("Alice's hardware gave another kind of record than the link's protocol has")
        if isinstance(flown, Detections):
            bases = ReceiverSeed(seed, self.terms.p_z).at(flown.positions) if flown.bases is None else flown.bases
            return Measured(flown, bases)
        if isinstance(flown, RecordedSettings):
            if flown.intensities != self.terms.intensities:
                raise LinkError(f"a settings record of {flown.intensities} intensities, not {self.terms.intensities}")
            return flown
        return SourceSeed.of(seed, self.terms.p_z, probabilities(self.terms.source))

    def _sift(self, source: Chosen) -> Generator[Step, Answer, tuple[AliceSettings, Bits, Bits]]:
        """Keep random subsets of the fixed sizes; tell Bob which, with the check and test bits."""
        frame = yield from self.receive(Kind.DETECTED)
        positions, bases = wire.detected_untrusted(frame.payload, self.plan.pulses, self.terms.angles)
        if isinstance(source, Measured) and self.guard(source.readings) is not None:
            self.ledger.raw = self.in_hand = len(positions)
            raise Abort(Reason.MONITOR)
        settings = source.at(positions)
        codes = np.zeros(len(positions), dtype=np.uint8)
        heard = np.ones(len(positions), dtype=bool) if settings.heard is None else settings.heard == 1
        self.outcome.detected = self.by_intensity(settings.decoy[heard])
        both_z = np.flatnonzero((settings.check == 0) & (bases == 0) & heard)
        both_x = np.flatnonzero((settings.check == 1) & (bases == 1) & heard)
        if len(both_z) < self.plan.n_z or len(both_x) < self.plan.n_x:
            self.ledger.raw = self.in_hand = len(positions)
            raise Abort(Reason.SHORT)
        codes[random_subset(both_z, self.plan.n_z)] = KEY
        codes[random_subset(both_x, self.plan.n_x)] = CHECKED
        codes |= (settings.decoy << np.uint8(INTENSITY)) * (codes > 0)
        test = heard & (bases >= 2)
        codes[test] = TEST | settings.check[test] << np.uint8(INTENSITY)
        key, check = (codes & 3) == KEY, (codes & 3) == CHECKED
        self.key, self.key_intensity = settings.bit[key], intensity_of(codes[key])
        self.count_sifted(len(positions), int((codes == 0).sum()), len(self.key))
        yield from self.send(wire.sift(codes, settings.bit[check], settings.bit[test]))
        return settings, codes, bases

    def _check(
        self, settings: AliceSettings, codes: Bits, bases: Bits
    ) -> Generator[Step, Answer, tuple[Tally, Tally]]:
        """The published bits of both, compared."""
        check, test = (codes & 3) == CHECKED, (codes & 3) == TEST
        frame = yield from self.receive(Kind.CHECK)
        checked, tested = wire.check_untrusted(frame.payload, self.plan.n_x, int(test.sum()))
        n_x, m_x = self.estimate(settings.bit[check], checked, intensity_of(codes[check]))
        self.test_chsh(settings.bit[test], tested, intensity_of(codes[test]), bases[test] - np.uint8(2))
        if sum(m_x) > self.plan.check_errors:
            raise Abort(Reason.QBER)
        return n_x, m_x

    def _correct(self) -> Generator[Step, Answer, None]:
        seed = fresh_seed()
        yield from self.send(Frame(Kind.CORRECT, seed))
        reference = Reference(self.key, seed, self.plan.sizes)
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

    def _verify(self) -> Generator[Step, Answer, Tally]:
        seed = random_bits(self.verify_seed_bits)
        tag = toeplitz_hash(self.key, seed, self.plan.verify_bits)
        self.count_verified(tag)
        yield from self.send(wire.hashed(Kind.VERIFY, seed, tag))
        frame = yield from self.receive(Kind.ACCEPT)
        return wire.accept_untrusted(frame.payload, self.terms.intensities)

    def _authenticate(self, tickets: list[bytes]) -> Generator[Step, Answer, None]:
        yield from self.receive_tag(Kind.AUTH, 0)
        yield from self.send_tag(Kind.AUTH, 1)
        yield from self.receive_tag(Kind.COMMIT, 2)
        yield Keep(tickets)

    def _authenticate_abort(self) -> Generator[Step, Answer, None]:
        yield from self.receive_tag(Kind.AUTH, 0)
        yield from self.send_tag(Kind.AUTH, 1)


def random_subset(members: npt.NDArray[np.intp], size: int) -> npt.NDArray[np.intp]:
    """``size`` of them, at least one, every subset equally likely, by the randomness of this end: those with the
    lowest lots.  Where two lots are equal at the edge, all are drawn again."""
    while size < len(members):
        lots = np.frombuffer(draw(4 * len(members)), dtype=np.uint32)
        chosen: npt.NDArray[np.intp] = members[lots <= np.partition(lots, size - 1)[size - 1]]
        if len(chosen) == size:
            return chosen
    return members
