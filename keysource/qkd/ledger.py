"""The ledger of a link: where every detected bit went.  All columns sum to zero, block by block.

Each column is counted where its bits go, none is the difference of others:

==================  ===============================================================================================
``raw``             detections announced by Bob (positive)
``discarded``       other basis, or beyond the sizes fixed for the block
``check``           X bits published for the estimate
``leaked``          parities that Alice disclosed, counted from the answers on the wire
``mirrored``        Bob's parities, which his choice of questions discloses, counted from the questions on the wire
``unspent``         what is left of the leak budget after each question was charged to it: hashed away all the same
``verified``        bits of the verification tag sent
``amplified``       rows that the matrix of privacy amplification is shorter than its columns, less the budgets above
``authenticated``   bits put into the authentication pad
``remainder``       bits of the result that fill no key
``delivered``       bits handed to the device socket
``lost``            bits still in the block when it was given up
==================  ===============================================================================================
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Ledger:
    """Counts in bits; ``raw`` is income, all others are spending."""

    raw: int = 0
    discarded: int = 0
    check: int = 0
    leaked: int = 0
    mirrored: int = 0
    unspent: int = 0
    verified: int = 0
    amplified: int = 0
    authenticated: int = 0
    remainder: int = 0
    delivered: int = 0
    lost: int = 0

    def balance(self) -> int:
        """Income less spending: 0 for every finished block."""
        spent: int = sum(getattr(self, f.name) for f in fields(self) if f.name != "raw")
        return self.raw - spent

    def add(self, other: Ledger) -> None:
        for column in fields(self):
            setattr(self, column.name, getattr(self, column.name) + getattr(other, column.name))

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
