"""Small unix sockets, 0600, one JSON object per line: status of an end; Eve's switch at the fibre."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keysource.device.server import bind_private, peer_is_trusted
from keysource.errors import KeySourceError
from keysource.qkd.errors import LinkError

_LIMIT = 256 * 1024
Handler = Callable[[dict[str, Any]], dict[str, Any]]


class Control:
    """Answers each line with what ``handler`` returns; a ``LinkError`` becomes ``{"error": sentence}``."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self._handler = handler
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises :class:`KeySourceError` where the path cannot be used."""
        self._server = await asyncio.start_unix_server(self._serve, sock=bind_private(self.path), limit=_LIMIT)

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if peer_is_trusted(writer.get_extra_info("socket")):
                async with asyncio.timeout(5):
                    while line := await reader.readline():
                        writer.write(json.dumps(self._answer_untrusted(line)).encode() + b"\n")
                        await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass  # the client went away, stayed silent or sent no line
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer_untrusted(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            return {"error": "a request is one JSON object on one line"}
        try:
            return self._handler(request)
        except LinkError as error:
            return {"error": str(error)}


async def ask(path: Path, request: dict[str, Any], timeout: float = 3.0) -> dict[str, Any]:
    """One question to a control socket.  Raises :class:`KeySourceError`."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(os.fspath(path), limit=_LIMIT)
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError, ValueError):
        raise KeySourceError(f"{path}: nobody answers there") from None
    if not isinstance(answer, dict) or "error" in answer:
        raise KeySourceError(f"{path}: {answer.get('error') if isinstance(answer, dict) else 'no answer'}")
    return answer
