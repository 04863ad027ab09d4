"""From ``type = "NAME"`` to a key source: entry points of the group ``qvpn.key_sources``.

Importing this module imports no source; only the one asked for is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import cast

from keysource.base import KeySource, SourceContext, SourceFactory
from keysource.errors import BadSettings

GROUP = "qvpn.key_sources"


def available() -> list[str]:
    """Names that ``type`` may have, sorted."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def factory(kind: str) -> SourceFactory:
    """The factory behind a ``type``.

    Raises:
        BadSettings: no such type, or its package does not import.
    """
    for point in entry_points(group=GROUP):
        if point.name == kind:
            try:
                return cast(SourceFactory, point.load())
            except (ImportError, AttributeError) as error:
                raise BadSettings(f"key source type {kind!r} does not load: {error}", key="type") from error
    known = ", ".join(available())
    raise BadSettings(f"unknown key source type {kind!r}; installed are: {known}", key="type")


def open_source(kind: str, settings: Mapping[str, object], context: SourceContext) -> KeySource:
    """Make the source; nothing is opened before its ``start``."""
    return factory(kind)(settings, context)
