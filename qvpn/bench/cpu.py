"""CPU seconds of a process and everything below it, from ``/proc`` (proc_pid_stat(5))."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def parse_stat(text: str) -> tuple[int, int]:
    """Parent's pid and ticks (user + system, with those of children waited for) of one ``/proc/PID/stat``.

    The name in the second field may hold blanks and brackets, so fields are counted from its last bracket.
    """
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[1]), sum(int(field) for field in fields[11:15])


def seconds(roots: Iterable[int], proc: Path = Path("/proc")) -> float:
    """User and system seconds so far of these processes and all their descendants that still run."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)], ticks[int(entry.name)] = parse_stat((entry / "stat").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue
    wanted = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in wanted} - wanted:
        wanted |= more
    return sum(ticks.get(pid, 0) for pid in wanted) / _TICKS
