"""One KME: files and settings into objects, listeners, orderly stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import ssl
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import structlog

from keysource.kme.audit import Audit, AuditError
from keysource.kme.config import ConfigError, KmeConfig, Limits, load, needs_restart
from keysource.kme.control import ControlServer
from keysource.kme.credentials import contexts, expired_context, fingerprint, not_after
from keysource.kme.faults import Fault, FaultSwitch, fault_named
from keysource.kme.feed import Feed
from keysource.kme.following import FileFollower
from keysource.kme.ground import NotNow
from keysource.kme.listener import Listener, ListenError
from keysource.kme.peer_api import PeerApi
from keysource.kme.peering import PeerClient
from keysource.kme.records import Counts, StoreError
from keysource.kme.sae_api import SaeApi
from keysource.kme.site import Site
from keysource.kme.skip_api import SkipApi

_HOUSEKEEPING = 60.0
_LOOK_AT_LINKS = 0.5
_PEERS, _PLAIN = 1, 2  # the listeners are for SAEs, for other KMEs, and then SKIP's
log = structlog.get_logger("kme")


class KmeServer:
    """Everything that ``qvpn-kme serve`` runs."""

    def __init__(self, config: KmeConfig, fault: Fault = Fault.NONE, file: Path | None = None) -> None:
        """Reads the certificates.  ``file`` is read again on SIGHUP.  Raises :class:`ConfigError`."""
        self._file = file
        self.faults = FaultSwitch(fault)
        self._files = FileFollower(fingerprint(config), lambda: fingerprint(self.config), self._reload)
        server, _client = contexts(config)
        peers = {peer.id: PeerClient(peer.id, peer.url, contexts(config)[1]) for peer in config.peer_kme}
        self.site = Site(config, peers)
        self.audit = Audit(config.audit_path, config.kme.id)
        devices = {link.stock: link.device for link in config.link if link.device is not None}
        self._feeds = [Feed(self.site, stock, config.path(device)) for stock, device in devices.items()]
        self._sae_api = SaeApi(self.site, self.faults, self.audit)
        peer_api = PeerApi(self.site, self.audit)
        self._listeners = [
            Listener(config.kme.listen, server, self._sae_api.application, self._limits, self._sae_api.name_of),
            Listener(config.kme.peer_listen, server, peer_api.application, self._limits, peer_api.name_of),
        ]
        if config.kme.skip_listen is not None:
            skip_api = SkipApi(self.site, self.faults, self.audit, lambda: self._sae_api.rates)
            context = only_tls13(contexts(config)[0])
            self._listeners.append(
                Listener(config.kme.skip_listen, context, skip_api.application, self._limits, self._sae_api.name_of)
            )
        self._control = ControlServer(config.control_path, self._answer)
        self._switching = asyncio.Lock()

    @property
    def config(self) -> KmeConfig:
        return self.site.config

    def _limits(self) -> Limits:
        return self.config.limits

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            StoreError, ListenError, ControlError, AuditError, ConfigError: it cannot start.
        """
        stop = asyncio.Event()
        hangup = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
        try:
            self.audit.open()
            await self.site.open()
            await self._control.start()
            await self._apply(self.faults.fault)
            tasks = [asyncio.create_task(feed.run()) for feed in self._feeds]
            tasks += [asyncio.create_task(work) for work in (self._housekeeping(), self._files.run(hangup))]
            if self.site.shared:
                tasks.append(asyncio.create_task(self._follow_links()))
            tasks.append(asyncio.create_task(_wait(stop)))
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
        self.audit.close()

    async def _housekeeping(self) -> None:
        while True:
            try:
                if gone := await self.site.expire():
                    self.audit.write("expired", number=gone)
                await self.site.turn_epoch()
            except (sqlite3.Error, StoreError, AuditError, OSError) as error:
                log.error("the store fails", error=str(error))
            for told in (self.site.told, *(listener.told for listener in self._listeners)):
                told.summary()
            await asyncio.sleep(min(_HOUSEKEEPING, self.config.limits.key_epoch / 2))

    async def _follow_links(self) -> None:
        said = ""
        while True:
            try:
                await self.site.follow_links()
                said = ""
            except StoreError as error:
                if str(error) != said:
                    said = str(error)
                    log.error("the store fails", error=said)
            await asyncio.sleep(_LOOK_AT_LINKS)

    async def _reload(self, configuration: bool) -> None:
        """Raises :class:`ConfigError`; then nothing has changed."""
        config = load(self._file) if configuration and self._file else self.config
        if mistake := needs_restart(self.config, config):
            raise ConfigError(mistake)
        read = fingerprint(config)  # before they are read: a file that changes meanwhile is read again
        servers = [self._context(place, config, self.faults.fault) for place in range(len(self._listeners))]
        clients = {peer.id: contexts(config)[1] for peer in config.peer_kme}
        self.site.config = config
        self._sae_api.reconfigure()
        self._files.known = read
        for listener, server in zip(self._listeners, servers, strict=True):
            await listener.renew(server)
        await asyncio.gather(*(self.site.peers[peer].renew(context) for peer, context in clients.items()))
        log.info("reloaded", configuration=configuration, certificate_ends=not_after(config))

    @staticmethod
    def _context(place: int, config: KmeConfig, fault: Fault) -> ssl.SSLContext:
        """What a listener shows to those who connect.  Raises :class:`ConfigError`."""
        expired = fault is Fault.EXPIRED_CERTIFICATE and place != _PEERS
        context = expired_context(config) if expired else contexts(config)[0]
        return only_tls13(context) if place >= _PLAIN else context

    async def _apply(self, fault: Fault) -> None:
        """Raises :class:`ConfigError`; then nothing has changed."""
        async with self._switching:
            if Fault.EXPIRED_CERTIFICATE in (fault, self.faults.fault):
                servers = [self._context(place, self.config, fault) for place in range(len(self._listeners))]
                for place, (listener, server) in enumerate(zip(self._listeners, servers, strict=True)):
                    if place != _PEERS:
                        await listener.renew(server)
            self.faults.set(fault)
            for listener in self._listeners:
                await (listener.close() if fault is Fault.DOWN else listener.open())
            if fault is not Fault.NONE:
                log.warning("misbehaving on order", fault=fault.value)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self._answered(request)
        except (StoreError, NotNow, ConfigError) as error:
            raise ValueError(str(error)) from None
        except sqlite3.Error as error:
            raise ValueError(f"the store fails: {error}") from None

    async def _answered(self, request: dict[str, Any]) -> dict[str, Any]:
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
        store = await self.site.db(lambda store: store.health())
        for stock, link in self.site.links.items():
            counts = await self._counts(stock)
            row = link.row
            links.append(
                {
                    "peer_kme": link.peer,
                    "stock": stock,
                    "saes": self.config.saes_at(link.peer),
                    "link": row.name if row else None,
                    "origin": row.origin.value if row else None,
                    "next_block": row.next_block if row else 0,
                    "hops": link.hops,
                    "paths": link.paths,
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
            "store": store,
            "epoch": await self._epoch(),
            "certificate_ends": not_after(self.config),
            "audit": str(self.config.audit_path),
            "saes": [
                {"id": sae.id, "may_share_with": sae.may_share_with, **asdict(self._sae_api.traffic[sae.id])}
                for sae in self.config.sae
            ],
            "listen": str(self._listeners[0].address),
            "peer_listen": str(self._listeners[1].address),
            "skip_listen": str(self._listeners[2].address) if len(self._listeners) > _PLAIN else None,
            "connections": [listener.status() for listener in self._listeners],
            "fault": self.faults.fault.value,
            "links": links,
        }

    async def _counts(self, peer: str) -> dict[str, int | None]:
        """None of all while the store does not answer."""
        try:
            return asdict(await self.site.counts(peer))
        except (StoreError, sqlite3.Error):
            return {field.name: None for field in fields(Counts)}

    async def _epoch(self) -> int | None:
        try:
            return (await self.site.db(lambda store: store.epoch))[0]
        except (StoreError, sqlite3.Error):
            return None


def only_tls13(context: ssl.SSLContext) -> ssl.SSLContext:
    """As SKIP's draft wants it."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
