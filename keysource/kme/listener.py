"""A TLS listener that can be closed and opened again at the same port, and can change its certificates meanwhile.

Connections are bounded: those that have shown no certificate yet as :mod:`keysource.kme.door` says, with a time limit
for their handshake; the others by the name in their certificate.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from keysource.kme.auth import Certificate
from keysource.kme.boundedlog import BoundedLog
from keysource.kme.config import Limits
from keysource.kme.door import Door, source_of
from keysource.settings import Address

_BACKLOG = 512
_FAREWELL = 2.0  # seconds for the other end's part of TLS's goodbye
_REST = 0.2  # after the system had no descriptor left
_TELL_EVERY = 10.0
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
log = structlog.get_logger("kme")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Connection = RequestHandler


class ListenError(Exception):
    """A listener cannot be opened; one sentence."""


@dataclass(slots=True)
class Turned:
    """Connections of one listener since this process began."""

    accepted: int = 0
    failed: int = 0  # TLS ended them: no certificate of our authority, say
    slow: int = 0  # no handshake within the time limit
    pushed_out: int = 0  # too many without a certificate
    crowded: int = 0  # too many of one name
    no_descriptor: int = 0  # the system had none left


class Listener:
    """Sockets that stay, TLS contexts that change, and one HTTP server behind them."""

    def __init__(
        self,
        address: Address,
        context: ssl.SSLContext,
        application: Callable[[], web.Application],
        limits: Callable[[], Limits],
        name_of: Callable[[Certificate], str],
    ) -> None:
        """``name_of`` gives who is meant by a certificate; strangers are all one name."""
        self.address = address
        self.turned = Turned()
        self.told = BoundedLog()
        self._context = context
        self._application = application
        self._limits, self._name_of = limits, name_of
        self._runner: web.AppRunner | None = None
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._door: Door[asyncio.Task[None]] = Door()
        self._greeting: set[asyncio.Task[None]] = set()
        self._names: dict[_Connection, str] = {}
        self._crowd: set[_Connection] = set()
        """Connections of a name that has its fill already: they are told so."""
        self._busy: set[_Connection] = set()
        """Connections that are at a request."""
        self._answered: set[_Connection] = set()
        self._told = -_TELL_EVERY

    async def open(self) -> None:
        """Raises :class:`ListenError`."""
        if self._runner is not None:
            return
        application = self._application()
        application.middlewares.insert(0, self._count)
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await runner.setup()
        self._runner = runner
        try:
            self._sockets = await _listening(self.address)
        except OSError as error:
            await self.close()
            raise ListenError(f"{self.address}: {os.strerror(error.errno) if error.errno else error}") from None
        self.address = Address(host=self.address.host, port=self._sockets[0].getsockname()[1])
        self._accepting = [asyncio.create_task(self._accept(listening)) for listening in self._sockets]

    async def close(self) -> None:
        """Stop listening and cut the connections there are."""
        tasks = [*self._accepting, *self._greeting]
        self._accepting = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listening in self._sockets:
            listening.close()
        self._sockets = []
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def renew(self, context: ssl.SSLContext) -> None:
        """New connections meet these certificates.  Those there are end after the request that they are at: one that
        an authority vouched for which is believed no more must not live on.

        The sockets are never closed: no connection is refused meanwhile.
        """
        self._context = context
        for connection in self._open():
            if connection in self._busy:
                connection.close()
            else:
                connection.force_close()

    def status(self) -> dict[str, Any]:
        """For the operator: how many connections there are, and what became of the others."""
        return {
            "listen": str(self.address),
            "open": len(self._open()),
            "without_certificate": len(self._door),
            **asdict(self.turned),
        }

    def _open(self) -> list[_Connection]:
        """Connections whose handshake is over, oldest first."""
        return self._runner.server.connections if self._runner is not None and self._runner.server else []

    # Before the certificate

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, place = await loop.sock_accept(listening)
            except OSError as error:
                if error.errno in _SCARCE:
                    await self._make_room()
                continue
            self._admit(connection, source_of(str(place[0])))
            await asyncio.sleep(0)  # one a turn: a flood at the door does not stop the work inside

    def _admit(self, connection: socket.socket, source: str) -> None:
        self.turned.accepted += 1
        task = asyncio.create_task(self._greet(connection))
        self._greeting.add(task)
        task.add_done_callback(lambda task: self._greeted(task, connection))
        limits = self._limits()
        bounds = limits.unauthenticated_connections, limits.unauthenticated_per_address
        if pushed := self._door.enter(task, source, *bounds):
            pushed.cancel()
            self.turned.pushed_out += 1
            self._tell()

    async def _greet(self, connection: socket.socket) -> None:
        assert self._runner is not None
        assert self._runner.server is not None
        transport, protocol = await asyncio.get_running_loop().connect_accepted_socket(
            self._runner.server,
            connection,
            ssl=self._context,
            ssl_handshake_timeout=self._limits().handshake_timeout,
            ssl_shutdown_timeout=_FAREWELL,
        )
        self._seat(protocol, self._name_of(transport.get_extra_info("ssl_object").getpeercert()))

    def _greeted(self, task: asyncio.Task[None], connection: socket.socket) -> None:
        self._greeting.discard(task)
        self._door.leave(task)
        if task.cancelled():
            connection.close()  # its task may never have begun
        elif error := task.exception():
            connection.close()
            self.turned.failed += 1
            if isinstance(error, ConnectionAbortedError):  # so asyncio says that the time is over
                self.turned.slow += 1
                self.turned.failed -= 1
                self._tell()
            elif not isinstance(error, OSError):
                log.error("a connection failed", error=type(error).__name__)

    async def _make_room(self) -> None:
        self.turned.no_descriptor += 1
        for task in self._door.shed():
            task.cancel()
            self.turned.pushed_out += 1
        self._tell()
        await asyncio.sleep(_REST)

    # After it

    def _seat(self, connection: _Connection, name: str) -> None:
        """One more of that name.  Where it has its fill, its longest idle connection goes; where all are at requests,
        the new one is answered 503, and beyond twice the bound cut."""
        there = set(self._open())
        self._names = {other: its for other, its in self._names.items() if other in there}
        self._crowd &= there
        self._answered &= there
        mine = [other for other, its in self._names.items() if its == name]
        self._names[connection] = name
        bound = self._limits().connections_per_sae
        if len(mine) < bound:
            return
        self.turned.crowded += 1
        at_rest = [other for other in mine if other not in self._busy]
        # one that has been answered before is less likely to have a request under way than one that is new
        idle = next((other for other in at_rest if other in self._answered), next(iter(at_rest), None))
        if idle is not None:
            idle.force_close()
            del self._names[idle]
        elif len(mine) < 2 * bound:
            self._crowd.add(connection)
        else:
            connection.force_close()
        self._tell(name)

    def _tell(self, name: str = "") -> None:
        """Loud, but not once for each connection of a flood."""
        now = asyncio.get_running_loop().time()
        if now >= self._told + _TELL_EVERY:
            self._told = now
            log.warning("connections are turned away", **self.status(), **({"name": name[:64]} if name else {}))

    def _believes(self, request: web.Request) -> bool:
        """A handshake that began before the certificates changed and ended after was checked by the old authorities,
        and its connection was not there yet when the others were cut."""
        connection: ssl.SSLObject | None = request.get_extra_info("ssl_object")
        if connection is None or connection.context is self._context:
            return connection is not None
        old, new = (set(context.get_ca_certs(binary_form=True)) for context in (connection.context, self._context))
        return bool(old) and old <= new

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not self._believes(request):
            return _later("the authorities have changed meanwhile; connect again")
        if request.protocol in self._crowd:
            return _later("too many connections of this name are open; use those")
        self._busy.add(request.protocol)
        try:
            return await handler(request)
        except ConnectionError:
            if request.transport is not None and not request.transport.is_closing():
                raise
            told = {"path": request.path.rpartition("/")[2][:64]}
            name = self._names.get(request.protocol, "")
            self.told.info("a client left before its answer", name, asyncio.get_running_loop().time(), **told)
            return _later("nobody is there to read this")
        finally:
            self._busy.discard(request.protocol)
            self._answered.add(request.protocol)


def _later(message: str) -> web.Response:
    answer = web.json_response({"message": message}, status=503, headers={"Retry-After": "1"})
    answer.force_close()
    return answer


async def _listening(address: Address) -> list[socket.socket]:
    """A listening socket for every address of that name.  Raises ``OSError``."""
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _name, place in dict.fromkeys(found):
            listening = socket.socket(family, kind, protocol)
            sockets.append(listening)
            listening.setblocking(False)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(place)
            listening.listen(_BACKLOG)
    except OSError:
        for listening in sockets:
            listening.close()
        raise
    return sockets
