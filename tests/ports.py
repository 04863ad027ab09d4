"""Ports of the loopback for programs that a test starts.

A port that the kernel picks and that is closed again may be picked for somebody's outgoing connection before the
program binds it; with two test processes at work that happens.  So these come from below the kernel's own range
(32768 on), from a part that belongs to this process alone, and never twice.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator

_FIRST, _PARTS, _EACH = 20_000, 30, 400


def _counting() -> Iterator[int]:
    """Round and round through this process's part: pytest-xdist's workers are numbered from gw0 on."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    part = int(worker[2:]) if worker.startswith("gw") else os.getpid()
    first = _FIRST + part % _PARTS * _EACH
    return itertools.cycle(range(first, first + _EACH))


_next = _counting()


def free_port() -> int:
    """Of TCP, at 127.0.0.1."""
    for port in itertools.islice(_next, _EACH):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def free_ports(count: int) -> list[int]:
    """Different ones."""
    return [free_port() for _ in range(count)]
