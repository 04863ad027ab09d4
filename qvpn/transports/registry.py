"""From ``transport = "NAME"`` to a transport: entry points of the group ``qvpn.transports``.

Importing this module imports no transport; only the one asked for is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, cast

from qvpn.transports.base import BadTransport, Factory, Transport, TransportContext

GROUP = "qvpn.transports"


def available() -> list[str]:
    """Names that ``transport`` may have, sorted."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def factory(name: str) -> Factory:
    """The factory behind a name.

    Raises:
        BadTransport: no such transport, or its package does not import.
    """
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                return cast(Factory, point.load())
            except (ImportError, AttributeError) as error:
                raise BadTransport(f"transport {name!r} does not load: {error}", key="transport") from error
    known = ", ".join(available())
    raise BadTransport(f"unknown transport {name!r}; installed are: {known}", key="transport")


def open_transport(name: str, settings: Mapping[str, Any], context: TransportContext) -> Transport:
    """Make the transport; it opens no socket of its own.  Raises :class:`BadTransport`."""
    return factory(name)(settings, context)
