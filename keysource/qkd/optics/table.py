"""Outcome probabilities of a pulse for each of the few cases that settings make: what both samplers throw dice on.

A case is (intensity, attenuated gate or not, bit 0 in Bob's basis / bit 1 / other basis).  Its cells are, for every
class of :class:`~keysource.qkd.optics.eve.Sent`, "only detector 1", "both", "only detector 0"; ``edges`` are their
running sums, the last one is the probability of a click.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keysource.qkd.optics.detectors import BOTH, ONE, ZERO
from keysource.qkd.optics.eve import Eve, Light
from keysource.qkd.optics.model import Optics
from keysource.qkd.optics.settings import Bits

_PORTS = np.array([ONE, BOTH, ZERO], dtype=np.uint8)
OTHER_BASIS = 2
_CASES = 6
"""Of one intensity."""


@dataclass(frozen=True, slots=True)
class Table:
    """``edges``: shape (cells, cases)."""

    edges: npt.NDArray[np.float64]
    held: Bits
    """Per class."""

    @property
    def most(self) -> float:
        """The largest click probability of any case."""
        return float(self.edges[-1].max())

    def most_of(self, decoy: Bits) -> npt.NDArray[np.float64]:
        """The largest click probability of any case with that intensity, for each."""
        most: npt.NDArray[np.float64] = self.edges[-1].reshape(-1, _CASES).max(axis=1)[decoy]
        return most

    def throw(
        self, dice: npt.NDArray[np.float64], case: npt.NDArray[np.intp]
    ) -> tuple[npt.NDArray[np.intp], Bits, Bits]:
        """(which clicked, their ports, photons that Eve holds of them); ``dice`` uniform from 0 on."""
        clicked = np.flatnonzero(dice < self.edges[-1][case])
        dice, case = dice[clicked], case[clicked]
        cell = np.zeros(len(clicked), dtype=np.uint8)
        for edge in self.edges[:-1]:
            cell += dice >= edge[case]
        return clicked, _PORTS[cell % 3], self.held[cell // 3]


def make_table(optics: Optics, eve: Eve, attenuator: float = 1.0) -> Table:
    """``attenuator``: transmission in test gates."""
    classes = eve.sends(optics.decoy.mu1, optics, optics.detector)
    columns = []
    for mu in optics.intensities:
        for detector in (optics.detector, optics.detector * attenuator):
            dark_free, e_d = 1.0 - optics.dark, optics.misalignment
            for at_one in (e_d, 1.0 - e_d, 0.5):
                cells: list[float] = []
                for sent in eve.sends(mu, optics, detector):
                    no_one = dark_free * sent.unseen(at_one)
                    no_zero = dark_free * sent.unseen(1.0 - at_one)
                    none = dark_free**2 * sent.unseen(1.0)
                    outcomes = (no_zero - none, 1.0 - no_one - no_zero + none, no_one - none)
                    cells.extend(sent.weight * max(0.0, p) for p in outcomes)
                columns.append(np.cumsum(cells))
    return Table(np.stack(columns, axis=1), np.array([sent.held for sent in classes], dtype=np.uint8))


def cases(decoy: Bits, light: Light, bob: Bits, tested: Bits | None) -> npt.NDArray[np.intp]:
    """The case of each pulse, from the light that reaches Bob."""
    case = np.where(light.check == bob, light.bit, np.uint8(OTHER_BASIS)) + decoy * np.uint8(_CASES)
    if tested is not None:
        case = case + tested * np.uint8(3)
    cases: npt.NDArray[np.intp] = case.astype(np.intp)
    return cases
