"""The file that ``qvpn-qkd run`` reads, written from the table of a ``simulated`` key source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from keysource.base import SourceContext


def link_toml(settings: Mapping[str, object], keys: Mapping[str, Path], socket: Path, context: SourceContext) -> str:
    """One end's configuration.  ``keys``: settings that are key files.  All paths absolute: the child has its own
    idea of a current folder."""
    values = {
        "version": 1,
        "role": settings["role"],
        "listen": settings["listen"],
        "peer": settings["peer"],
        "fibre": settings["fibre"],
        "preset": settings["preset"],
        "owner": settings["owner"],
        "name": settings.get("name"),
        "auth_bootstrap": settings.get("auth_bootstrap"),
        **{name: str(file.absolute()) for name, file in keys.items()},
        "state": str((context.state / f"{context.name}.link").absolute()),
        "socket": str(socket.absolute()),
    }
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    return "# Made at each start of the daemon; changes here are lost.\n" + "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A number or a basic string of TOML 1.0, whose escapes are JSON's; DEL is the one JSON leaves alone."""
    return (
        str(value)
        if isinstance(value, int)
        else json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    )
