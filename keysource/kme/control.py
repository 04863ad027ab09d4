"""The KME's control socket: one JSON line in, one JSON line out.  Unix socket, mode 0600, own user or root only.

Requests are ``{"op": "status"}`` and ``{"op": "fault", "name": NAME}``; the answer has ``"ok"`` and, where that is
false, ``"error"``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from keysource.device.server import bind_private, peer_is_trusted
from keysource.errors import KeySourceError
from keysource.sockets import path_mistake

_MAX_LINE = 64 * 1024
_TIMEOUT = 10.0
log = structlog.get_logger("kme")
Answerer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlError(Exception):
    """The socket cannot be opened, or nobody answers there; one sentence."""


class ControlServer:
    """Serves one socket; ``answer`` raises ``ValueError`` with a sentence for whoever asked; whatever
    else it raises is told by its type only."""

    def __init__(self, path: Path, answer: Answerer) -> None:
        self._path = path
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises :class:`ControlError`."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            listener = bind_private(self._path)
        except KeySourceError as error:
            raise ControlError(str(error)) from None
        except OSError as error:
            raise ControlError(f"{self._path}: {error.strerror}") from None
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=_MAX_LINE)

    async def aclose(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if peer_is_trusted(writer.get_extra_info("socket")):
                async with asyncio.timeout(_TIMEOUT):
                    line = await reader.readline()
                    writer.write(json.dumps(await self._answered(line)).encode() + b"\n")
                    await writer.drain()
        except (OSError, TimeoutError, ValueError):
            pass  # a client that says nothing, or too much
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answered(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("a request is a JSON object")
            return {"ok": True, **await self._answer(request)}
        except (ValueError, RecursionError) as error:
            return {"ok": False, "error": str(error)}
        except Exception as error:  # whoever asks hears of it; a traceback helps neither him nor the log
            log.error("a question was not answered", error=type(error).__name__)
            return {"ok": False, "error": f"internal error {type(error).__name__}; the log has the time of it"}


def ask(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a running KME.  Blocking.  Raises :class:`ControlError`."""
    if mistake := path_mistake(path):
        raise ControlError(mistake)
    read = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT)
            connection.connect(os.fspath(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            while not read.endswith(b"\n") and (chunk := connection.recv(_MAX_LINE)):
                read += chunk
    except OSError as error:
        raise ControlError(f"{path}: no KME answers there ({error.strerror or error})") from None
    try:
        answer = json.loads(read)
    except ValueError:
        raise ControlError(f"{path}: the answer is not JSON") from None
    if not isinstance(answer, dict) or not answer.get("ok"):
        raise ControlError(str(answer.get("error")) if isinstance(answer, dict) else "no answer")
    return answer
