"""Which of a peer's transports is used now.  No I/O; times are arguments in seconds.

A peer's list of transports is in order of preference.  Nothing but authenticated answers moves a peer from one to
another: a PROBE under the epoch that came back from there.  A network that lets some datagrams of a transport
through and drops others is left after :data:`GIVE_UP`, and asked again each :data:`BACK`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from qvpn.netio.base import Address

SILENCE = 3.0
"""Seconds without a verified record after which the endpoint in use is asked."""

GIVE_UP = 6.0
"""Seconds without a verified record after which the other transports are asked."""

BACK = 15.0
"""Seconds between two questions whether a preferred transport works again."""

ANSWERED = 3.0
"""Seconds for which an answer from the endpoint in use keeps a peer from moving to a less preferred transport."""

PATIENCE = 0.9
"""Seconds that the endpoint in use has to answer before a less preferred one is asked."""


class Move(enum.Enum):
    """What to do about a verified record that came from another address."""

    IGNORE = enum.auto()
    ASK_HERE = enum.auto()
    """Ask the endpoint in use whether it still works."""
    ASK_THERE = enum.auto()


class CarrierChoice:
    """One peer's transports."""

    def __init__(self, names: Sequence[str]) -> None:
        """``names``: what the configuration allows, the preferred one first."""
        self._names = tuple(names)
        self._answered = self._asked = self._looked_back = float("-inf")

    def allows(self, address: Address) -> bool:
        return address.carrier in self._names

    def _rank(self, address: Address) -> int:
        return self._names.index(address.carrier)

    def seen(self, current: Address | None, found: Address, now: float) -> Move:
        """The newest verified record came from ``found``, not from the endpoint in use."""
        if not self.allows(found):
            return Move.IGNORE
        if current is None or not self.allows(current) or self._rank(found) <= self._rank(current):
            return Move.ASK_THERE
        if now - self._answered < ANSWERED:
            return Move.IGNORE
        if now - self._asked > ANSWERED:
            self._asked = now
            return Move.ASK_HERE
        return Move.ASK_THERE if now - self._asked >= PATIENCE else Move.IGNORE

    def answered(self, now: float) -> None:
        """The endpoint in use answered a PROBE."""
        self._answered = now
        self._asked = float("-inf")

    def to_ask(
        self, current: Address | None, candidates: Sequence[Address], heard: float | None, now: float
    ) -> list[Address]:
        """Whom to send a PROBE now, while an epoch lives.  To be called about once a second.

        ``heard``: when a record of the peer verified last, from anywhere.
        """
        if current is None or not self.allows(current):
            return []
        others = [place for place in candidates if place.carrier != current.carrier]
        silent = 0.0 if heard is None else now - heard
        if silent > GIVE_UP:
            return [current, *others]
        if silent > SILENCE:
            return [current]
        better = [place for place in others if self._rank(place) < self._rank(current)]
        if better and now - self._looked_back >= BACK:
            self._looked_back = now
            return better
        return []
