"""A TLS listener that can be closed and opened again at the same port, and can change its certificates meanwhile."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

from keysource.settings import Address

_BACKLOG = 512
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ListenError(Exception):
    """A listener cannot be opened; one sentence."""


class Listener:
    """Sockets that stay, and on them a site per set of certificates."""

    def __init__(self, address: Address, context: ssl.SSLContext, application: Callable[[], web.Application]) -> None:
        self.address = address
        self._context = context
        self._application = application
        self._runner: web.AppRunner | None = None
        self._sockets: list[socket.socket] = []
        self._sites: list[web.SockSite] = []
        self._busy: set[object] = set()
        """Connections that are at a request."""

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
            await self._serve()
        except OSError as error:
            await self.close()
            raise ListenError(f"{self.address}: {os.strerror(error.errno) if error.errno else error}") from None
        self.address = Address(host=self.address.host, port=self._sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and cut the connections there are."""
        runner, self._runner = self._runner, None
        self._sites = []
        if runner is not None:
            await runner.cleanup()
        for listening in self._sockets:
            listening.close()
        self._sockets = []

    async def renew(self, context: ssl.SSLContext) -> None:
        """New connections meet these certificates.  Those there are end after the request that they are at: one that
        an authority vouched for which is believed no more must not live on.

        The sockets are never closed: no connection is refused meanwhile.
        """
        self._context = context
        if self._runner is not None:
            old = self._sites
            await self._serve()
            for site in old:
                await site.stop()
            assert self._runner.server is not None
            for connection in self._runner.server.connections:
                if connection in self._busy:
                    connection.close()
                else:
                    connection.force_close()

    async def _serve(self) -> None:
        assert self._runner is not None
        self._sites = [
            web.SockSite(self._runner, listening.dup(), ssl_context=self._context, backlog=_BACKLOG)
            for listening in self._sockets
        ]
        for site in self._sites:
            await site.start()

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
            said = {"message": "the authorities have changed meanwhile; connect again"}
            answer = web.json_response(said, status=503, headers={"Retry-After": "1"})
            answer.force_close()
            return answer
        self._busy.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(request.protocol)


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
