"""Which transport passes which check, written into ``qvpn/transports/README.md`` by a run of the suite.

``python -m tests.conformance.transport_table``; the tests fail where the table is not that of a run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from qvpn.bench.table import grid
from qvpn.transports.conformance import CHECKS, run_all
from tests.conformance.transport_arenas import TRANSPORTS, arena

README = Path(__file__).resolve().parents[2] / "qvpn/transports/README.md"
BEGIN, END = "<!-- conformance: begin -->", "<!-- conformance: end -->"
Outcomes = Mapping[str, Mapping[str, str | None]]
"""By transport and check: what was wrong; None: passed."""


def table(outcomes: Outcomes) -> str:
    lines = [["check", "what it asks", *outcomes]]
    for name, check in CHECKS.items():
        asked = (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
        lines.append([f"`{name}`", asked, *(each[name] or "passed" for each in outcomes.values())])
    return grid(lines)


def put(text: str, part: str) -> str:
    """``text`` with ``part`` between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{README} has no place for the table"
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def main() -> int:
    outcomes = {name: run_all(partial(arena, name)) for name in TRANSPORTS}
    README.write_text(put(README.read_text(), table(outcomes)))
    wrong = [f"{name}, {check}: {why}" for name, each in outcomes.items() for check, why in each.items() if why]
    print("\n".join(wrong) or f"{len(CHECKS)} checks passed by each of {', '.join(outcomes)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
