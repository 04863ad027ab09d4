"""Requests to the other nodes, and the TLS for them and for our listener."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import aiohttp
import structlog

from keysource.kme.auth import must_be
from keysource.kme.config import ConfigError
from keysource.kme.tlsfiles import TlsFiles
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
        self._renewed = False
        self._session: aiohttp.ClientSession | None = None
        self._said = ""

    def send(self, message: Message) -> None:
        """May be dropped, as any message may."""
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(message)

    def renew(self, tls: ssl.SSLContext) -> None:
        """Other certificates from now on; a call under way ends as it began."""
        self._tls, self._renewed = must_be(tls, self._other.id), True

    async def run(self) -> None:
        while True:
            message = await self._queue.get()
            if self._renewed:
                self._renewed = False
                await self.aclose()
            path, body = messages.encode(message, self._mine.id, self._mine.url)
            trouble = await self._call(self._opened(), path, body)
            if isinstance(message, Share):
                crashes.at("share.sent")
            if trouble and trouble != self._said:
                log.warning("a node does not answer", node=self._other.id, reason=trouble)
            self._said = trouble

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls, limit=2),
                timeout=aiohttp.ClientTimeout(total=_CALL_TIMEOUT),
                trust_env=False,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def _call(self, session: aiohttp.ClientSession, path: str, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        try:
            async with session.post(
                self._other.url + path, data=body, headers=headers, allow_redirects=False
            ) as answer:
                return "" if answer.status == 202 else f"it answered {answer.status}"
        except (aiohttp.ClientError, ssl.SSLError, OSError, TimeoutError) as error:
            return type(error).__name__


def tls_files(config: NodeConfig, base: Path) -> TlsFiles:
    """Those of a node."""
    node = config.node
    return TlsFiles("[node]", base / node.ca, base / node.certificate, base / node.private_key)


def contexts(config: NodeConfig, base: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS for the listener, and for calls.  Raises :class:`TopologyError`."""
    try:
        return tls_files(config, base).contexts()
    except ConfigError as error:
        raise TopologyError(str(error)) from None
