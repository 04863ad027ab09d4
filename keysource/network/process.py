"""A node as a process: devices and a TLS listener in, device sockets for whoever uses the relayed keys out.

One event loop, one store, one :class:`~keysource.network.node.RelayNode`; every message to another node is a request
of its own that may fail: the logic repeats what matters.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from keysource.errors import KeySourceError
from keysource.kme.auth import Certificate, certificate_of, common_name
from keysource.kme.config import Limits
from keysource.kme.control import ControlServer
from keysource.kme.epochs import site_key_path
from keysource.kme.listener import Listener
from keysource.kme.records import StoreError
from keysource.network import messages
from keysource.network.calls import Caller, contexts
from keysource.network.core import Event, Fault
from keysource.network.feed import LinkFeed
from keysource.network.messages import BadMessage, Message
from keysource.network.node import RelayNode
from keysource.network.store import Block, NodeStore
from keysource.network.topology import Connection, NodeConfig, Topology

_HOUSEKEEPING = 30.0
_EPOCH = 3600.0
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
        server, _client = contexts(config, base)
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
        self._listener = Listener(config.node.listen, server, self._application, Limits, self._name_of)
        self._control = ControlServer(control_path(config, base), self._answer)

    # Life

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT.  Raises ``ListenError``, ``ControlError``, ``KeySourceError``."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            for device in self._devices.values():
                await device.start()
                device.set_status("up")
            self._deliver()
            await self._control.start()
            await self._listener.open()
            work = [*(feed.run() for feed in self._feeds), *(caller.run() for caller in self._callers.values())]
            work += [self._drive(), self._housekeeping(), _wait(stop)]
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

    async def _drive(self) -> None:
        """Timers, and whatever a feed has changed."""
        loop = asyncio.get_running_loop()
        while True:
            wait = self.node.next_time() - loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(wait, 0.01)):
                    await self._woken.wait()
            self._woken.clear()
            self._do(lambda: self.node.tick(loop.time()))

    async def _housekeeping(self) -> None:
        while True:
            try:
                while await self._rewrap_some():
                    pass  # messages come between; no new epoch before the last one's rows have followed
                now = time.time()
                if not self._store.epoch_began <= now < self._store.epoch_began + _EPOCH:
                    self._store.begin_epoch(now)
            except (sqlite3.Error, StoreError, OSError) as error:
                self._store_fails(error)
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
        try:
            step()
        except (sqlite3.Error, StoreError, OSError) as error:
            self._store_fails(error)
            return False
        finally:
            for event in self.node.take_events():
                self._log(event)
            for to, message in self.node.take_outgoing():
                self._callers[to].send(message)
        try:
            self._deliver()
        except (sqlite3.Error, StoreError, OSError) as error:  # what is not delivered waits
            self._store_fails(error)
        return True

    def _store_fails(self, error: Exception) -> None:
        if str(error) != self._trouble:
            self._trouble = str(error)
            log.error("the store fails", error=self._trouble)

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
        ledger = _Ledger(self._store, name, self._erased)
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

    @staticmethod
    def _publish(device: DeviceServer, block: Block) -> bool:
        """False: there is no room."""
        if block.block >= device.status().next_block:
            if len(block.keys) > KEY_BYTES * device.room():
                return False
            device.publish(
                block.block, block.keys, BlockFacts(block.facts.origin, block.facts.hops, block.facts.paths)
            )
        return True

    # What other nodes, and the operator, see

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=messages.MAX_BODY)
        for path in (messages.EXT_KEYS, messages.ACK, messages.VOID, messages.OURS):
            application.router.add_post(path, partial(self._post, path))
        application.router.add_get(messages.VERSIONS, self._versions)
        return application

    async def _post(self, path: str, request: web.Request) -> web.Response:
        sender = self._name_of(certificate_of(request))
        if not sender:
            return web.Response(status=401)
        try:
            body = await request.read()
            message = messages.decode_untrusted(path, body, self.topology.url_of(sender) + messages.ACK)
            done = self.received(sender, message)
        except web.HTTPRequestEntityTooLarge:
            return web.json_response({"message": "the message is too long"}, status=400)
        except BadMessage as error:
            log.warning("a message was refused", sender=sender, reason=str(error))
            return web.json_response({"message": str(error)}, status=400)
        except ConnectionError:
            raise  # the listener knows
        except Exception as error:
            log.error("a message failed", sender=sender, error=type(error).__name__)
            return web.Response(status=503)
        return web.Response(status=202 if done else 503)

    async def _versions(self, request: web.Request) -> web.Response:
        if not self._name_of(certificate_of(request)):
            return web.Response(status=401)
        return web.json_response({"versions": ["v1"]})

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
        links = []
        for name, state in self.node.core.links.items():
            stored = self._store.link(name)
            links.append(
                {
                    "name": name,
                    "to": state.entry.other(self.name),
                    "up": state.up,
                    "trouble": state.trouble,
                    "alarm": state.alarm or None,
                    "behind": state.behind,
                    "qber": state.qber,
                    "key_rate": state.key_rate,
                    "own_units": stored.own if stored else 0,
                    "peer_units": stored.peers if stored else 0,
                }
            )
        connections = []
        for name, device in self._devices.items():
            connection, initiator = self._connection(name), self.node.initiators.get(name)
            connections.append(
                {
                    "name": name,
                    "to": connection.other(self.name),
                    "begins": initiator is not None,
                    "state": initiator.state if initiator else "target",
                    "trouble": initiator.trouble if initiator else "",
                    "paths": initiator.paths if initiator else (),
                    "keys_per_second": round(initiator.rate(now), 3) if initiator else None,
                    "next_block": self._store.last(name)[0],
                    "waiting_blocks": device.status().blocks_held,
                }
            )
        return {"node": self.name, "links": links, "connections": connections, "trouble": self._trouble}


class _Ledger:
    """What the device sockets must not forget is in the node's store."""

    def __init__(self, store: NodeStore, connection: str, erased: Callable[[str], None]) -> None:
        self._store, self._connection, self._erased = store, connection, erased

    def erased(self, before: int) -> None:
        self._kept(before)

    def opened(self, block: int) -> None:
        self._kept(block + 1)

    def _kept(self, before: int) -> None:
        try:
            self._store.delivered(self._connection, before)
        except sqlite3.Error as error:
            raise OSError(5, str(error)) from None
        self._erased(self._connection)


def control_path(config: NodeConfig, base: Path) -> Path:
    """Where a running node answers."""
    return base / config.node.control if config.node.control else (base / config.node.store).parent / "control.sock"


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


__all__ = ["KeySourceError", "NodeProcess", "control_path"]
