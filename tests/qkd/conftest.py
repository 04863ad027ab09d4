"""Makes the workbench importable for the tests beside it, and gives each test its own, repeatable dice."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def dice(name: str) -> Callable[[int], bytes]:
    """A stand-in for ``os.urandom`` whose answers follow from ``name`` and how often it was asked before."""
    asked = 0

    def draw(size: int) -> bytes:
        nonlocal asked
        asked += 1
        return hashlib.shake_256(f"{name} {asked}".encode()).digest(size)

    return draw


@pytest.fixture(autouse=True)
def repeatable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits, bases and orders come from the operating system; here from dice that fall alike in every run.

    A statistical verdict on fresh randomness is wrong once in 1/p runs, and then nobody can repeat it.  Processes
    that a test starts still ask the operating system.
    """
    monkeypatch.setattr(os, "urandom", dice(request.node.nodeid))
