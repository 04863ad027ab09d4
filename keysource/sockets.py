"""Unix sockets: how long their path may be."""

from __future__ import annotations

import os
from pathlib import Path

_MOST_BYTES = 107
"""``sun_path`` has 108 bytes, the last of them zero (unix(7))."""


def path_mistake(path: Path) -> str:
    """One sentence where no unix socket can have this path, else empty."""
    if len(os.fsencode(path)) <= _MOST_BYTES:
        return ""
    return f"{path}: the path of a unix socket has at most {_MOST_BYTES} bytes"
