"""Tests with real namespaces, TUN devices and processes: root and /dev/net/tun, or they are skipped and say so.

The lab is the demo's (qvpn/demo/lab.py).  Its namespaces have no names and its processes die with the test
process, so a killed test run leaves nothing behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvpn.demo import lab as demo_lab

HERE = Path(__file__).parent


def _hindrance() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun does not exist"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _hindrance()
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.netns)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[demo_lab.Lab]:
    """The two-site lab, empty of daemons."""
    with demo_lab.two_sites(tmp_path / "lab") as made:
        yield made
