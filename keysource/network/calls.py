"""Requests to the other nodes, and the TLS for them and for our listener."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import aiohttp
import structlog

from keysource import tls as tls_contexts
from keysource.kme.auth import must_be
from keysource.network import crashes, messages
from keysource.network.errors import TopologyError
from keysource.network.messages import Message, Share
from keysource.network.topology import NodeConfig, NodeEntry

_QUEUE = 256
_CALL_TIMEOUT = 5.0
log = structlog.get_logger("network")


class Caller:
    """Requests to one other node, in order, a few waiting at most."""

    def __init__(self, mine: NodeEntry, other: NodeEntry, tls: ssl.SSLContext) -> None:
        """``tls`` is this caller's alone: from now on it believes only that node."""
        self._mine, self._other = mine, other
        self._tls = must_be(tls, other.id)
        self._queue: asyncio.Queue[Message] = asyncio.Queue(_QUEUE)
        self._session: aiohttp.ClientSession | None = None
        self._said = ""

    def send(self, message: Message) -> None:
        """May be dropped, as any message may."""
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(message)

    async def run(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=2),
            timeout=aiohttp.ClientTimeout(total=_CALL_TIMEOUT),
            trust_env=False,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        while True:
            message = await self._queue.get()
            path, body = messages.encode(message, self._mine.id, self._mine.url)
            trouble = await self._call(self._session, path, body)
            if isinstance(message, Share):
                crashes.at("share.sent")
            if trouble and trouble != self._said:
                log.warning("a node does not answer", node=self._other.id, reason=trouble)
            self._said = trouble

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _call(self, session: aiohttp.ClientSession, path: str, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        try:
            async with session.post(
                self._other.url + path, data=body, headers=headers, allow_redirects=False
            ) as answer:
                return "" if answer.status == 202 else f"it answered {answer.status}"
        except (aiohttp.ClientError, ssl.SSLError, OSError, TimeoutError) as error:
            return type(error).__name__


def contexts(config: NodeConfig, base: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS for the listener, and for calls.  Raises :class:`TopologyError`."""
    node = config.node
    parts: list[bytes] = []
    for key, name in (("ca", node.ca), ("certificate", node.certificate), ("private_key", node.private_key)):
        path = base / name
        try:
            if key == "private_key" and path.stat().st_mode & 0o077:
                raise TopologyError(f"[node] {key}: {path} must have mode 0600")
            parts.append(path.read_bytes())
        except OSError as error:
            raise TopologyError(f"[node] {key}: {path}: {error.strerror}") from None
    try:
        return tls_contexts.server_context(*parts), tls_contexts.client_context(*parts)
    except ValueError as error:
        raise TopologyError(f"[node]: {error}") from None
