"""One KME: files and settings into objects, listeners, orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import ssl
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web

from keysource.etsi014 import tls
from keysource.kme.config import ConfigError, KmeConfig
from keysource.kme.control import ControlServer
from keysource.kme.faults import Fault, FaultSwitch, fault_named
from keysource.kme.feed import Feed
from keysource.kme.peer_api import PeerApi
from keysource.kme.peering import PeerClient
from keysource.kme.sae_api import SaeApi
from keysource.kme.site import Site
from keysource.settings import Address

_HOUSEKEEPING = 60.0
_BACKLOG = 512
log = structlog.get_logger("kme")


class ListenError(Exception):
    """A listener cannot be opened; one sentence."""


class Listener:
    """One TLS listener that can be closed and opened again at the same port."""

    def __init__(self, address: Address, context: ssl.SSLContext, application: Callable[[], web.Application]) -> None:
        self.address = address
        self._context = context
        self._application = application
        self._runner: web.AppRunner | None = None

    async def open(self) -> None:
        """Raises :class:`ListenError`."""
        if self._runner is not None:
            return
        runner = web.AppRunner(self._application(), access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await runner.setup()
        site = web.TCPSite(
            runner,
            self.address.host,
            self.address.port,
            ssl_context=self._context,
            backlog=_BACKLOG,
            reuse_address=True,
        )
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise ListenError(f"{self.address}: {os.strerror(error.errno) if error.errno else error}") from None
        self._runner = runner
        self.address = Address(host=self.address.host, port=runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening and cut the connections there are."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()


class KmeServer:
    """Everything that ``qvpn-kme serve`` runs."""

    def __init__(self, config: KmeConfig, fault: Fault = Fault.NONE) -> None:
        """Reads the certificates.  Raises :class:`ConfigError`."""
        self.config = config
        self.faults = FaultSwitch(fault)
        server, client = contexts(config)
        peers = {peer.id: PeerClient(peer.id, peer.url, client) for peer in config.peer_kme}
        self.site = Site(config, peers)
        self._feeds = [Feed(self.site, link.peer_kme, config.path(link.device)) for link in config.link]
        sae_api, peer_api = SaeApi(self.site, self.faults), PeerApi(self.site)
        self._listeners = [
            Listener(config.kme.listen, server, sae_api.application),
            Listener(config.kme.peer_listen, server, peer_api.application),
        ]
        self._control = ControlServer(config.control_path, self._answer)
        self._switching = asyncio.Lock()

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            StoreError, ListenError, ControlError: it cannot start.
        """
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await self.site.open()
            await self._control.start()
            await self._apply(self.faults.fault)
            tasks = [asyncio.create_task(feed.run()) for feed in self._feeds]
            tasks += [asyncio.create_task(self._housekeeping()), asyncio.create_task(_wait(stop))]
            log.info("ready", kme=self.config.kme.id, sae=str(self._listeners[0].address), pid=os.getpid())
            ready()
            done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            for task in done:
                task.result()  # a feed that ended by itself raised something nobody foresaw
        finally:
            await self._close()

    async def _close(self) -> None:
        await self._control.aclose()
        for listener in self._listeners:
            await listener.close()
        await self.site.aclose()

    async def _housekeeping(self) -> None:
        while True:
            try:
                await self.site.expire()
            except sqlite3.Error as error:
                log.error("the store fails", error=str(error))
            await asyncio.sleep(_HOUSEKEEPING)

    async def _apply(self, fault: Fault) -> None:
        async with self._switching:
            self.faults.set(fault)
            for listener in self._listeners:
                await (listener.close() if fault is Fault.DOWN else listener.open())
            if fault is not Fault.NONE:
                log.warning("misbehaving on order", fault=fault.value)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request.get("op"):
            case "status":
                return await self._status()
            case "fault":
                with contextlib.suppress(ListenError):
                    await self._apply(fault_named(str(request.get("name"))))
                    return {"fault": self.faults.fault.value}
                raise ValueError("the listeners do not open again")
        raise ValueError("a request is status or fault")

    async def _status(self) -> dict[str, Any]:
        links = []
        for peer, link in self.site.links.items():
            counts = asdict(await self.site.counts(peer))
            row = link.row
            links.append(
                {
                    "peer_kme": peer,
                    "link": row.name if row else None,
                    "origin": row.origin.value if row else None,
                    "next_block": row.next_block if row else 0,
                    "device_connected": link.connected,
                    "trouble": link.trouble,
                    "alarm": link.alarm or None,
                    "qber": link.qber,
                    "key_rate": link.key_rate,
                    **counts,
                }
            )
        return {
            "kme": self.config.kme.id,
            "pid": os.getpid(),
            "listen": str(self._listeners[0].address),
            "peer_listen": str(self._listeners[1].address),
            "fault": self.faults.fault.value,
            "links": links,
        }


def contexts(config: KmeConfig) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS for the listeners, and for calls to other KMEs.  Raises :class:`ConfigError`."""
    ca = _read(config, "ca", config.kme.ca)
    certificate = _read(config, "certificate", config.kme.certificate)
    private_key = _read(config, "private_key", config.kme.private_key, secret=True)
    try:
        return tls.server_context(ca, certificate, private_key), tls.client_context(ca, certificate, private_key)
    except ValueError as error:
        raise ConfigError(f"[kme]: {error}") from None


def _read(config: KmeConfig, key: str, name: str, *, secret: bool = False) -> bytes:
    path: Path = config.path(name)
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) or (secret and mode & 0o077):
                raise ConfigError(f"[kme] {key}: {path} must be a file with mode 0600")
            return file.read()
    except OSError as error:
        raise ConfigError(f"[kme] {key}: {path}: {error.strerror}") from None


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
