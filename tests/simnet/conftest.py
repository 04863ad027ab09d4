"""Scenarios that are played over several carriers: all of them in the long run, a part over QUIC in the usual one."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LONG = os.environ.get("QVPN_TEST_LONG") == "1"
EVERY = 7
"""Of a test's cases over QUIC the usual run plays each so manieth: a number that divides no list of parameters."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The first case of each test is always among them."""
    if LONG:
        return
    seen: Counter[tuple[Path, str]] = Counter()
    left = []
    for item in items:
        if not isinstance(item, pytest.Function) or not item.path.is_relative_to(HERE):
            continue
        if not hasattr(item, "callspec") or item.callspec.params.get("carrier") != "quic":
            continue
        test = item.path, item.originalname
        if seen[test] % EVERY:
            left.append(item)
        seen[test] += 1
    if left:
        gone = set(map(id, left))
        items[:] = [item for item in items if id(item) not in gone]
        config.hook.pytest_deselected(items=left)
