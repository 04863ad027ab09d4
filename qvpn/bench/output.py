"""How a benchmark's figures are printed: with the machine that they were measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping

from qvpn.bench import machine
from qvpn.bench.table import grid


def show(as_json: bool, found: Mapping[str, object], *tables: list[list[str]]) -> None:
    """One JSON object, or the tables."""
    facts = machine.facts()
    if as_json:
        print(json.dumps({"schema": 1, "machine": facts, **found}, indent=1))
        return
    head = ", ".join(f"{name} {facts[name]}" for name in ("date", "cpu", "cores", "kernel", "commit", "cryptography"))
    print("\n\n".join([head, *(grid(table) for table in tables)]))
