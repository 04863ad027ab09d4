"""Unix sockets: how long their path may be.  Ports of the loopback that nobody has."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

_MOST_BYTES = 107
"""``sun_path`` has 108 bytes, the last of them zero (unix(7))."""


def path_mistake(path: Path) -> str:
    """One sentence where no unix socket can have this path, else empty."""
    if len(os.fsencode(path)) <= _MOST_BYTES:
        return ""
    return f"{path}: the path of a unix socket has at most {_MOST_BYTES} bytes"


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nobody has now; somebody may, a moment later."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
