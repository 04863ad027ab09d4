"""The event log: text on a terminal, one JSON object per line otherwise.  Key_IDs as hashes, key material never."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

_FORBIDDEN = frozenset({"key", "material", "secret", "psk", "private_key", "datagram", "payload"})


def configure(stream: TextIO | None = None) -> None:
    """Set the log up for this process, on standard error by default."""
    stream = stream or sys.stderr
    text = stream.isatty()
    renderers: list[Any] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if text
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text),
            no_secrets,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )


def no_secrets(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The last net: bytes, and fields whose name says that they are secret, never reach a log."""
    for name, value in event.items():
        if name in _FORBIDDEN or isinstance(value, bytes | bytearray | memoryview):
            event[name] = "(withheld)"
    return event


def get_log(**context: object) -> Any:
    """A log whose every line carries this context (site, peer, source)."""
    return structlog.get_logger(**context)
