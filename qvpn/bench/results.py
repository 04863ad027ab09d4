"""What a run of the benchmark found: one row per tunnel and link, figures round by round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qvpn.bench.stats import Series

SCHEMA = 1


@dataclass
class Row:
    """One tunnel on one link."""

    tunnel: str
    link: str
    cipher: str
    version: str
    figures: dict[str, list[float | None]] = field(default_factory=dict)
    counts: list[dict[str, int]] = field(default_factory=list)
    """The tunnel's own counts at the end of each round (ours: counters that balance)."""

    def note(self, round_number: int, figures: dict[str, float]) -> None:
        """Put the figures of a round (from 0) in their place; earlier rounds without one keep None."""
        for name in {*self.figures, *figures}:
            series = self.figures.setdefault(name, [])
            series += [None] * (round_number + 1 - len(series))
            if name in figures:
                series[round_number] = round(figures[name], 6)

    def series(self, name: str, rounds: int) -> Series:
        found = self.figures.get(name, [])
        return [*found, *[None] * (rounds - len(found))]


@dataclass
class Results:
    machine: dict[str, str]
    rounds: int
    seconds: int
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that were asked for and could not run, and why."""
    failures: list[str] = field(default_factory=list)

    def row(self, tunnel: str, link: str) -> Row | None:
        return next((row for row in self.rows if (row.tunnel, row.link) == (tunnel, link)), None)

    def links(self) -> Sequence[str]:
        return list(dict.fromkeys(row.link for row in self.rows))

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)


def from_json(text: str) -> Results:
    """The opposite of :meth:`Results.to_json`.  Raises ValueError on another schema."""
    plain: dict[str, Any] = json.loads(text)
    if plain.pop("schema", None) != SCHEMA:
        raise ValueError(f"these results are not of schema {SCHEMA}")
    plain["rows"] = [Row(**row) for row in plain["rows"]]
    return Results(**plain)
