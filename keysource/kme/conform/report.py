"""What an examination found: one verdict for each requirement, with the clause that it comes from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

STANDARD = "ETSI GS QKD 014 V1.1.1"


class Outcome(StrEnum):
    PASS = "pass"
    FAIL = "fail"  # the standard says otherwise
    WARN = "warn"  # the standard leaves it open, and others will stumble over it
    SKIP = "skip"  # it could not be seen, and the reason says why


class Failed(Exception):
    """A requirement is not met; one sentence about what was seen."""


class Warned(Exception):
    """Allowed, and worth a word; one sentence."""


class Skipped(Exception):
    """It could not be examined; one sentence why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``clause`` is of the standard, ``requirement`` in our words, ``found`` what was seen."""

    name: str
    clause: str
    requirement: str
    outcome: Outcome
    found: str


def conforms(verdicts: Sequence[Verdict]) -> bool:
    """Was something seen, and nothing of it against the standard?"""
    outcomes = {verdict.outcome for verdict in verdicts}
    return bool(outcomes - {Outcome.SKIP}) and Outcome.FAIL not in outcomes


def summary(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.outcome for verdict in verdicts)
    told = ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome)
    return f"{'conforms' if conforms(verdicts) else 'does not conform'} to {STANDARD}: {told}"


def as_json(subject: str, verdicts: Sequence[Verdict]) -> str:
    return json.dumps(
        {
            "standard": STANDARD,
            "subject": subject,
            "conforms": conforms(verdicts),
            "verdicts": [asdict(verdict) for verdict in verdicts],
        }
    )


def as_markdown(subject: str, verdicts: Sequence[Verdict]) -> str:
    """A report to hand to somebody."""
    lines = [
        f"# {subject} and {STANDARD}",
        "",
        f"It {summary(verdicts)}.",
        "",
        "| clause | requirement | verdict | what was seen |",
        "|---|---|---|---|",
    ]
    for verdict in verdicts:
        row = (verdict.clause, verdict.requirement, verdict.outcome.value, verdict.found)
        lines.append("| " + " | ".join(_cell(text) for text in row) + " |")
    return "\n".join(lines) + "\n"


def plain(text: str, most: int = 200) -> str:
    """What somebody else wrote, fit for a line of ours."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def _cell(text: str) -> str:
    return plain(text, 400).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
