"""A node as a process: devices and a TLS listener in, device sockets for whoever uses the relayed keys out.

One event loop, one store, one :class:`~keysource.network.node.RelayNode`; every message to another node is a request
of its own that may fail: the logic repeats what matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web

from keysource.base import KEY_BYTES, End
from keysource.device.messages import BlockFacts, DeviceInfo
from keysource.device.server import DeviceServer
from keysource.kme.audit import Audit, AuditError
from keysource.kme.auth import Certificate, certificate_of, common_name
from keysource.kme.boundedlog import BoundedLog
from keysource.kme.config import Limits
from keysource.kme.control import ControlServer
from keysource.kme.epochs import site_key_path
from keysource.kme.following import FileFollower
from keysource.kme.listener import Handler, Listener
from keysource.kme.ratelimit import TokenBucket
from keysource.kme.records import StoreError
from keysource.kme.tlsfiles import not_after
from keysource.network import messages, reporting
from keysource.network.auditing import NodeAudit
from keysource.network.calls import Caller, contexts, tls_files
from keysource.network.core import Event, Fault
from keysource.network.feed import LinkFeed
from keysource.network.handover import StoreLedger
from keysource.network.messages import BadMessage, Message
from keysource.network.node import RelayNode
from keysource.network.rows import Block
from keysource.network.store import NodeStore
from keysource.network.topology import Connection, NodeConfig, Topology

_HOUSEKEEPING = 30.0
_EPOCH = 3600.0
_PAUSE = 0.5
"""Seconds until the next attempt, where store or audit log fails."""
_DEVICE_KEYS = 4096
"""Keys of a connection that wait for whoever uses them; then no more are relayed."""
log = structlog.get_logger("network")


class NodeProcess:
    """Everything that ``qvpn-kme network serve`` runs."""

    def __init__(self, config: NodeConfig, topology: Topology, base: Path, fault: Fault | None = None) -> None:
        """Reads certificates and opens the store.

        Raises:
            TopologyError, StoreError: it cannot start.
        """
        self.config, self.topology, self.base = config, topology, base
        self.name = config.node.id
        self._woken = asyncio.Event()
        self._trouble = ""
        files = tls_files(config, base)
        self._files = FileFollower(files.fingerprint(), files.fingerprint, self._reload)
        server, _client = contexts(config, base)
        self._log_file = Audit(audit_path(config, base), self.name)
        self._audit = NodeAudit(self._log_file)
        self._store = _open_store(config, base)
        self.node = RelayNode(self.name, topology, self._store, room=self._room, fault=fault)
        self._devices = {
            table.name: self._device(self._connection(table.name), base / table.socket) for table in config.connection
        }
        self._waiting = set(self._devices)
        """Connections with blocks that are not at the device socket yet, as far as is known."""
        self._feeds = [LinkFeed(self.node.core, table.name, base / table.device, self._wake) for table in config.link]
        mine = next(entry for entry in topology.node if entry.id == self.name)
        self._callers = {
            entry.id: Caller(mine, entry, contexts(config, base)[1]) for entry in topology.node if entry is not mine
        }
        limits = config.limits
        self._rates = {name: TokenBucket(limits.requests_per_second, limits.burst) for name in self._callers}
        self._too_many = dict.fromkeys(self._callers, 0)
        self._told = BoundedLog()
        self._listener = Listener(config.node.listen, server, self._application, Limits, self._name_of)
        self._control = ControlServer(control_path(config, base), self._answer)

    # Life

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT.  Raises ``ListenError``, ``ControlError``, ``AuditError``,
        ``KeySourceError``."""
        stop, hangup = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
        try:
            self._log_file.open()
            for device in self._devices.values():
                await device.start()
                device.set_status("up")
            self._deliver()
            await self._control.start()
            await self._listener.open()
            work = [*(feed.run() for feed in self._feeds), *(caller.run() for caller in self._callers.values())]
            work += [self._drive(), self._housekeeping(), self._files.run(hangup), _wait(stop)]
            tasks = [asyncio.create_task(task) for task in work]
            log.info("ready", node=self.name, listen=str(self._listener.address))
            ready()
            done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            for task in done:
                task.result()
        finally:
            await self._close()

    async def _close(self) -> None:
        await self._control.aclose()
        await self._listener.close()
        for caller in self._callers.values():
            await caller.aclose()
        for device in self._devices.values():
            await device.aclose()
        self._store.close()
        self._log_file.close()

    async def _reload(self, _ordered: bool) -> None:
        """Certificates, key and authority; the map stays.  Raises ``ConfigError``: nothing has changed."""
        files = tls_files(self.config, self.base)
        server, _client = files.contexts()
        clients = {name: files.contexts()[1] for name in self._callers}
        await self._listener.renew(server)
        for name, context in clients.items():
            self._callers[name].renew(context)
        log.info("reloaded", certificate_ends=not_after(files.certificate))

    async def _drive(self) -> None:
        """Timers, and whatever a feed has changed."""
        loop = asyncio.get_running_loop()
        while True:
            wait = self.node.next_time() - loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(wait, 0.01)):
                    await self._woken.wait()
            self._woken.clear()
            if not self._do(lambda: self.node.tick(loop.time())):
                await asyncio.sleep(_PAUSE)

    async def _housekeeping(self) -> None:
        while True:
            try:
                while await self._rewrap_some():
                    pass  # messages come between; no new epoch before the last one's rows have followed
                now = time.time()
                if not self._store.epoch_began <= now < self._store.epoch_began + _EPOCH:
                    self._store.begin_epoch(now)
            except (sqlite3.Error, StoreError, OSError) as error:
                self._fails("store", error)
            for told in (self._told, self._listener.told):
                told.summary()
            await asyncio.sleep(_HOUSEKEEPING)

    async def _rewrap_some(self) -> bool:
        await asyncio.sleep(0)
        return self._store.rewrap()

    # The logic's wires

    def received(self, sender: str, message: Message) -> bool:
        """False where the store failed.  Raises :class:`BadMessage`."""
        now = asyncio.get_running_loop().time()
        done = self._do(lambda: self.node.receive(sender, message, now))
        self._woken.set()
        return done

    def _do(self, step: Callable[[], None]) -> bool:
        """A step of the logic, and what follows from it.  False: nothing was done, or not all."""
        if not self._go_out():  # what was done before is not in the audit log yet
            return False
        try:
            step()
        except (sqlite3.Error, StoreError, OSError) as error:
            self._fails("store", error)
            return False
        finally:
            events = self.node.take_events()
            for event in events:
                self._log(event)
            self._audit.note(events)
            done = self._go_out()
        if done:
            try:
                self._deliver()
                self._trouble = ""
            except AuditError as error:  # what is not delivered waits
                self._fails("audit log", error)
            except (sqlite3.Error, StoreError, OSError) as error:
                self._fails("store", error)
        return done

    def _go_out(self) -> bool:
        """Messages, once what they tell is in the audit log; False where it cannot be written."""
        while self._store.damage:
            log.error("a stored key is gone", reason=self._store.damage.pop(0))
        try:
            self._audit.write(time.monotonic())
        except AuditError as error:
            self._fails("audit log", error)
            return False
        for to, message in self.node.take_outgoing():
            self._callers[to].send(message)
        return True

    def _fails(self, what: str, error: Exception) -> None:
        if str(error) != self._trouble:
            self._trouble = str(error)
            log.error(f"the {what} fails", error=self._trouble)

    def _log(self, event: Event) -> None:
        if event.kind in ("altered", "unconfirmed", "refused", "behind"):
            log.error(event.kind, **event.facts)
        elif event.kind in ("given up", "no route"):
            log.warning(event.kind, **event.facts)
        else:
            log.info(event.kind, **event.facts)
        if event.kind == "committed":
            self._waiting.add(event.facts["connection"])

    def _wake(self) -> None:
        self._woken.set()

    # Keys for whoever uses them

    def _connection(self, name: str) -> Connection:
        found = self.topology.connection_named(name)
        assert found is not None  # load_node has compared
        return found

    def _device(self, connection: Connection, path: Path) -> DeviceServer:
        end = End.A if connection.ends[0] == self.name else End.B
        origin, name = self.topology.origin_at_most(), connection.name
        info = DeviceInfo("relay", name, end, connection.owner, origin, connection.max_hops)
        held = self._store.outbox(name) or ([prepared] if (prepared := self._store.prepared(name)) else [])
        first = held[0].block if held else self._store.last(name)[0]
        ledger = StoreLedger(self._store, name, self._erased)
        return DeviceServer(path, info, max_keys=_DEVICE_KEYS, next_block=first, ledger=ledger)

    def _erased(self, connection: str) -> None:
        self._waiting.add(connection)
        self._woken.set()

    def _room(self, connection: str) -> int:
        device = self._devices.get(connection)
        return device.room() if device and connection not in self._waiting else 0

    def _deliver(self) -> None:
        """What is committed goes to the device sockets, in order."""
        now = asyncio.get_running_loop().time()
        for name, device in self._devices.items():
            if name in self._waiting and all(self._publish(device, block) for block in self._store.outbox(name)):
                self._waiting.discard(name)
            initiator = self.node.initiators.get(name)
            trouble = initiator.trouble if initiator else ""
            rate = round(initiator.rate(now), 2) if initiator else None
            device.set_status("down" if trouble else "up", trouble[:400], key_rate=rate)

    def _publish(self, device: DeviceServer, block: Block) -> bool:
        """False: there is no room.  Raises ``AuditError``."""
        if block.block >= device.status().next_block:
            if len(block.keys) > KEY_BYTES * device.room():
                return False
            self._audit.handed_out(block)
            facts = BlockFacts(block.facts.origin, block.facts.hops, block.facts.paths)
            device.publish(block.block, block.keys, facts)
        return True

    # What other nodes, and the operator, see

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=messages.MAX_BODY, middlewares=[self._bounded])
        for path in (messages.EXT_KEYS, messages.ACK, messages.VOID, messages.OURS):
            application.router.add_post(path, partial(self._post, path))
        application.router.add_get(messages.VERSIONS, self._versions)
        return application

    @web.middleware
    async def _bounded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """No request ends with more than a status."""
        try:
            return await handler(request)
        except (web.HTTPException, ConnectionError):
            raise  # of the latter the listener knows
        except AuditError as error:
            self._fails("audit log", error)
        except Exception as error:
            self._told.error("a request failed", "", time.monotonic(), error=type(error).__name__)
        return web.Response(status=503)

    async def _post(self, path: str, request: web.Request) -> web.Response:
        try:
            sender = self._caller(request)
            body = await request.read()
            message = messages.decode_untrusted(path, body, self.topology.url_of(sender) + messages.ACK)
            done = self.received(sender, message)
        except web.HTTPRequestEntityTooLarge:
            return web.json_response({"message": "the message is too long"}, status=400)
        except BadMessage as error:
            now = time.monotonic()
            self._told.warning("a message was refused", sender, now, sender=sender, reason=str(error))
            self._log_file.refused(str(error), now, node=sender)
            return web.json_response({"message": str(error)}, status=400)
        return web.Response(status=202 if done else 503)

    async def _versions(self, request: web.Request) -> web.Response:
        self._caller(request)
        return web.json_response({"versions": ["v1"]})

    def _caller(self, request: web.Request) -> str:
        """The node that asks.  Raises ``HTTPUnauthorized`` (a stranger) or ``HTTPServiceUnavailable`` (too often)."""
        certificate, now = certificate_of(request), time.monotonic()
        name = self._name_of(certificate)
        if not name:
            stranger = (common_name(certificate) or "")[:64]
            self._told.warning("a stranger was refused", stranger, now, common_name=stranger)
            self._log_file.refused("stranger", now, node=stranger)
            raise web.HTTPUnauthorized
        if wait := self._rates[name].wait(now):
            self._too_many[name] += 1
            self._log_file.refused("too many requests", now, node=name)
            raise web.HTTPServiceUnavailable(headers={"Retry-After": str(math.ceil(wait))})
        return name

    def _name_of(self, certificate: Certificate) -> str:
        """The node that a certificate names; empty for strangers."""
        name = common_name(certificate)
        return name if name in self._callers else ""

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request.get("op"):
            case "status":
                return self._status()
            case "fault" if self.node.core.fault.corrupt:
                name, fault = request.get("name"), self.node.core.fault
                if name not in ("none", "alter", "swallow"):
                    raise ValueError("a fault is none, alter or swallow")
                fault.alter, fault.swallow = name == "alter", name == "swallow"
                log.warning("misbehaving on order", fault=name)
                return {"fault": name}
        raise ValueError("a request is status; or fault, where the node was started as a corrupt one")

    def _status(self) -> dict[str, Any]:
        now = asyncio.get_running_loop().time()
        return {
            "node": self.name,
            "pid": os.getpid(),
            "links": reporting.links(self.node),
            "connections": reporting.connections(self.node, self._devices, now),
            "trouble": self._trouble,
            "certificate_ends": not_after(self.base / self.config.node.certificate),
            "audit": str(audit_path(self.config, self.base)),
            "too_many_requests": {name: count for name, count in self._too_many.items() if count},
            "listener": self._listener.status(),
        }


def control_path(config: NodeConfig, base: Path) -> Path:
    """Where a running node answers."""
    return base / config.node.control if config.node.control else (base / config.node.store).parent / "control.sock"


def audit_path(config: NodeConfig, base: Path) -> Path:
    """Where its audit log is."""
    return base / config.node.audit if config.node.audit else (base / config.node.store).parent / "audit.jsonl"


def _open_store(config: NodeConfig, base: Path) -> NodeStore:
    node = config.node
    return NodeStore(
        base / node.store,
        node.id,
        max_units=node.max_units,
        site_key=site_key_path(node.site_key, base) if node.site_key else None,
        epoch_keys=base / node.epoch_keys if node.epoch_keys else None,
        now=time.time(),
    )


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
