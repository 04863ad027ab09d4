"""Log lines: JSON, or text on a terminal.  Never a key; a key_ID only as the head of its hash."""

from __future__ import annotations

import hashlib
import logging
import sys

import structlog


def hashed(key_id: str) -> str:
    """Eight hex digits by which two logs can be compared and no key be fetched."""
    return hashlib.sha256(key_id.encode()).hexdigest()[:8]


def set_up(*, json_lines: bool) -> None:
    """Log to standard error."""
    renderer = structlog.processors.JSONRenderer() if json_lines else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a failed TLS handshake of a stranger is no news
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # nor is HTTP that is none; ours tells what fails
