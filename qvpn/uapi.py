"""The control socket: how ``qvpn status`` and ``qvpn down`` talk to a running daemon.

A Unix stream socket, 0600, and only for the daemon's own user and root (SO_PEERCRED).  One request and one answer per
connection, each a JSON object on one line: ``{"do": "status"}``, ``{"do": "stop"}``, or ``{"do": "alarm", "source":
NAME, "active": true, "reason": TEXT}``; the answer has ``ok``, and ``status`` or ``error``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from qvpn import privileged

MAX_LINE = 1 << 20
TIMEOUT = 5.0

Answer = dict[str, object]


class UapiError(Exception):
    """The daemon could not be asked; the message is one sentence."""


class NotRunning(UapiError):
    """Nobody listens at this control socket."""


class ControlServer:
    """Answers requests until closed.  ``commands`` gives for each ``do`` the function that answers; those of
    ``orders`` get the request, and refuse it by ``ValueError`` with a sentence."""

    def __init__(
        self,
        listener: socket.socket,
        commands: dict[str, Callable[[], Answer]],
        orders: dict[str, Callable[[Answer], Answer]] | None = None,
    ) -> None:
        self._listener = listener
        self._commands = commands
        self._orders = orders or {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, sock=self._listener, limit=MAX_LINE)

    async def aclose(self) -> None:
        """May be called twice."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            await server.wait_closed()
        self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._allowed(writer):
                async with asyncio.timeout(TIMEOUT):
                    answer = self.answer(await reader.readline())
                    writer.write(json.dumps(answer).encode() + b"\n")
                    await writer.drain()
        except (OSError, TimeoutError, ValueError):
            pass  # the asker went away or sent no line
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    @staticmethod
    def _allowed(writer: asyncio.StreamWriter) -> bool:
        return privileged.peer_user(writer.get_extra_info("socket")) in (0, os.geteuid())

    def answer(self, line: bytes) -> Answer:
        """The answer to one request line; anything odd is answered, never raised."""
        try:
            request = json.loads(line)
            name = request["do"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"ok": False, "error": 'a request is a JSON object with "do"'}
        if isinstance(name, str) and name in self._orders:
            try:
                return {"ok": True, **self._orders[name](request)}
            except ValueError as error:
                return {"ok": False, "error": str(error)}
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            known = sorted({*self._commands, *self._orders})
            return {"ok": False, "error": "unknown request; there are: " + ", ".join(known)}
        return {"ok": True, **command()}


def ask(path: Path, request: str, more: Mapping[str, object] | None = None, *, timeout: float = TIMEOUT) -> Answer:
    """Send one request (with ``more`` fields) to a daemon and wait for its answer.

    Raises:
        NotRunning: no daemon listens there.
        UapiError: it refused, or did not answer.
    """
    try:
        with privileged.connect_control(path, timeout) as connection:
            connection.sendall(json.dumps({"do": request, **(more or {})}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline(MAX_LINE)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise NotRunning(f"no daemon runs here: nobody listens at {path}") from None
    except PermissionError:
        raise UapiError(f"{path}: the daemon belongs to another user") from None
    except OSError as error:
        raise UapiError(f"{path}: the daemon does not answer: {error.strerror or error}") from None
    return _checked(line, path)


def _checked(line: bytes, path: Path) -> Answer:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise UapiError(f"{path}: the daemon gave no answer; does it belong to another user?")
    if answer.get("ok") is not True:
        raise UapiError(f"{path}: the daemon refused: {answer.get('error')}")
    return answer
