"""What an eavesdropper knows of a final key, exactly: linear algebra over GF(2), no estimate.

Everything that Eve learns of Alice's sifted key is linear: bits that she holds, parities that error correction
discloses, the verification tag.  So are the final key's bits, rows of the matrix of privacy amplification.  The
number of independent linear functions of the final key that she can work out is

    dim(view) + dim(key) - dim(view and key together)

and it is 0 if and only if, given all that she has, every final key is equally likely.  The questions of Cascade tell
her where Bob's errors were, which is no function of Alice's key beyond the parities answered.

Nothing of a link imports this; it is for tests and for ``qvpn-qkd attack``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from keysource.qkd.distill import wire
from keysource.qkd.distill.bits import Bits
from keysource.qkd.distill.cascade import Corrector, Question
from keysource.qkd.distill.layout import Layout
from keysource.qkd.distill.toeplitz import seed_bits
from keysource.qkd.distill.wire import KEY, Frame, Kind
from keysource.qkd.optics.eve import Notes
from keysource.qkd.plan import Plan

Rows = npt.NDArray[np.uint8]
"""Values 0 and 1, shape (rows, columns)."""


def rank(rows: Rows) -> int:
    """Over GF(2), eight columns at a time (the "four Russians"): about r^2 c / 1024 steps of 64 bits for r rows, c
    columns."""
    if not rows.size:
        return 0
    words = -(-rows.shape[1] // 64)
    octets = np.zeros((len(rows), 8 * words), dtype=np.uint8)
    octets[:, : -(-rows.shape[1] // 8)] = np.packbits(rows, axis=1)
    matrix, found = octets.view(np.uint64), 0
    for column in range(octets.shape[1]):
        found += _clear(matrix[found:, column // 8 :], octets[found:, column])
        if found == len(matrix):
            break
    return found


def _clear(matrix: npt.NDArray[np.uint64], octet: npt.NDArray[np.uint8]) -> int:
    """Bring independent rows of these eight columns to the top and clear the columns below; how many there are."""
    values, firsts = np.unique(octet, return_index=True)
    table = np.zeros((256, matrix.shape[1]), dtype=np.uint64)
    reached, pivots = {0}, list[int]()
    for value, row in zip(values.tolist(), firsts.tolist(), strict=True):
        if value not in reached:
            pivots.append(row)
            for old in reached:
                table[old ^ value] = table[old] ^ matrix[row]
            reached |= {old ^ value for old in reached}
    for top, row in enumerate(sorted(pivots)):
        matrix[[top, row]] = matrix[[row, top]]
    below = matrix[len(pivots) :]
    below ^= table[octet[len(pivots) :]]  # a view of the matrix: its values have moved with the rows
    return len(pivots)


def toeplitz_rows(n: int, seed: Bits, m: int) -> Rows:
    """The matrix of :func:`~keysource.qkd.distill.toeplitz.toeplitz_hash`, shape (m, n)."""
    if len(seed) != seed_bits(n, m):
        raise ValueError("a seed of another length")
    windows = np.lib.stride_tricks.sliding_window_view(seed, n)
    return np.ascontiguousarray(windows[:, ::-1])


def parity_rows(n: int, seed: bytes, sizes: Sequence[int], questions: Iterable[Question]) -> Rows:
    """One row per disclosed parity."""
    layout, rows = Layout(n, seed, sizes), []
    for question in questions:
        row = np.zeros((len(question.positions), n), dtype=np.uint8)
        for i, position in enumerate(question.positions.tolist()):
            row[i, layout.members(question.number, position)] = 1
        rows.append(row)
    return np.concatenate(rows) if rows else np.zeros((0, n), dtype=np.uint8)


@dataclass
class Overheard:
    """A block as it passed over the classical channel: (sender, frame) in order, with Eve's notes on detections."""

    frames: list[tuple[str, Frame]] = field(repr=False)
    notes: Notes | None
    plan: Plan

    def one(self, kind: Kind) -> bytes:
        (payload,) = [frame.payload for _sender, frame in self.frames if frame.kind is kind]
        return payload

    def key_notes(self) -> Notes:
        """Her notes on the detections that the sifting has kept for the key."""
        if self.notes is None:
            raise ValueError("nobody listened")
        count = int.from_bytes(self.one(Kind.DETECTED)[:4], "big")
        codes = np.frombuffer(self.one(Kind.SIFT), dtype=np.uint8, count=count)
        return self.notes[np.flatnonzero((codes & 3) == KEY)]

    def known(self) -> npt.NDArray[np.bool_]:
        """Which bits of the sifted key she holds now that the bases are announced (all of them Z)."""
        if self.notes is None:
            return np.zeros(self.plan.n_z, dtype=bool)
        return self.key_notes().knows(np.zeros(self.plan.n_z, dtype=np.uint8))

    def questions(self) -> list[Question]:
        return [wire.ask_untrusted(frame.payload) for _sender, frame in self.frames if frame.kind is Kind.ASK]

    def view(self) -> Rows:
        """Parities and the verification tag, as rows over the sifted key."""
        n, seed = self.plan.n_z, self.one(Kind.CORRECT)
        parities = parity_rows(n, seed, self.plan.sizes, self.questions())
        lengths = seed_bits(n, self.plan.verify_bits), self.plan.verify_bits
        check, _tag = wire.hashed_untrusted(self.one(Kind.VERIFY), *lengths)
        return np.concatenate([parities, toeplitz_rows(n, check, self.plan.verify_bits)])

    def key_rows(self) -> Rows:
        n, m = self.plan.n_z, self.plan.length
        seed, _none = wire.hashed_untrusted(self.one(Kind.AMPLIFY), seed_bits(n, m), 0)
        return toeplitz_rows(n, seed, m)

    def determined(self) -> int:
        """Bits of the final key that she determines."""
        return determined(self.known(), self.view(), self.key_rows())

    def as_bob(self) -> Bits:
        """Her copy of the key where she has every bit that Bob has: she corrects it as he does, with his parities."""
        answers = iter([frame.payload for _sender, frame in self.frames if frame.kind is Kind.PARITY])
        corrector = Corrector(self.key_notes().bit, self.one(Kind.CORRECT), self.plan.sizes)
        work = corrector.run()
        question = next(work, None)
        while question is not None:
            payload = next(answers)
            bits = np.unpackbits(np.frombuffer(payload, dtype=np.uint8))[: len(question.positions)]
            try:
                question = work.send(bits)
            except StopIteration:
                break
        return corrector.bits


def determined(known: npt.NDArray[np.bool_], view: Rows, key: Rows) -> int:
    """Independent functions of the key's rows that follow from the ``known`` columns and the ``view``."""
    hidden = np.flatnonzero(~known)
    seen, secret = view[:, hidden], key[:, hidden]
    return rank(seen) + rank(key) - rank(np.concatenate([seen, secret]))
