"""A node's logic, whole and without I/O: messages and time in, messages and events out.

::

    node = RelayNode("kme-dijon", topology, store)
    node.receive("kme-paris", message, now)      # raises BadMessage: answer 400
    node.tick(now)                               # whenever node.next_time() has come
    for to, message in node.take_outgoing(): ... # may be lost, doubled, late: the logic lives with that
    for event in node.take_events(): ...

Time is in seconds of any clock that only moves forward.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from keysource.network.core import Core, Event, Fault, LinkState
from keysource.network.initiator import Initiator
from keysource.network.messages import (
    Ack,
    Ask,
    BadMessage,
    Commit,
    Header,
    Message,
    Open,
    Proof,
    Ready,
    Share,
    Stock,
    Verdict,
    Void,
)
from keysource.network.relay import Relays
from keysource.network.stocks import Stocks
from keysource.network.store import NodeStore
from keysource.network.target import Target
from keysource.network.topology import Topology


def _much(_connection: str) -> int:
    return 1 << 30


class RelayNode:
    """See the module."""

    def __init__(
        self,
        name: str,
        topology: Topology,
        store: NodeStore,
        *,
        room: Callable[[str], int] = _much,
        random: Callable[[int], bytes] = os.urandom,
        fault: Fault | None = None,
    ) -> None:
        """``room`` tells how many keys of a connection may be delivered now."""
        links = {link.name: LinkState(link) for link in topology.links_of(name)}
        self.core = Core(name, topology, store, links, random, fault or Fault())
        everybody = any(connection.ends[0] == name for connection in topology.connections_of(name))
        self.stocks = Stocks(self.core, everybody=everybody)
        self._relays = Relays(self.core, self._arrived, self._failed)
        self.initiators: dict[str, Initiator] = {}
        self.targets: dict[str, Target] = {}
        for connection in topology.connections_of(name):
            if connection.ends[0] == name:
                self.initiators[connection.name] = Initiator(
                    self.core, connection, self._relays, self.stocks, partial(room, connection.name)
                )
            else:
                self.targets[connection.name] = Target(self.core, connection, partial(room, connection.name))

    def next_time(self) -> float:
        """When :meth:`tick` has something to do."""
        times = [self._relays.next_time(), *(target.next_time() for target in self.targets.values())]
        times.append(self.stocks.next_time())
        times += [initiator.next_time() for initiator in self.initiators.values()]
        return min((time for time in times if time is not None), default=float("inf"))

    def tick(self, now: float) -> None:
        self.stocks.tick(now)
        self._relays.tick(now)
        for target in self.targets.values():
            target.tick(now)
        for initiator in self.initiators.values():
            initiator.tick(now)

    def receive(self, sender: str, message: Message, now: float) -> None:
        """Raises :class:`BadMessage` where it does not fit the map, or who sent it."""
        match message:
            case Share():
                self._relays.receive(sender, message, now)
            case Ack():
                self._relays.acknowledged(sender, message, now)
            case Void():
                self._relays.void(sender, message)
                for target in self._targets_of(sender):
                    target.void(message)
            case Ask():
                self.core.send(sender, self.stocks.own())
            case Stock():
                self.stocks.heard(sender, message, now)
            case Open() | Commit():
                self._to_target(sender, message, now)
            case Ready() | Proof() | Verdict():
                self._to_initiators(sender, message, now)

    def take_outgoing(self) -> list[tuple[str, Message]]:
        found, self.core.outgoing = self.core.outgoing, []
        return found

    def take_events(self) -> list[Event]:
        found, self.core.events = self.core.events, []
        return found

    def _to_target(self, sender: str, message: Open | Commit, now: float) -> None:
        target = self.targets.get(message.connection)
        if target is None or target.connection.ends[0] != sender:
            raise BadMessage("that connection does not lead from you to me")
        if isinstance(message, Open):
            target.open(message, now)
        else:
            target.commit(message, now)

    def _to_initiators(self, sender: str, message: Ready | Proof | Verdict, now: float) -> None:
        for initiator in self.initiators.values():
            if initiator.connection.ends[1] == sender:
                match message:
                    case Ready():
                        initiator.ready(message, now)
                    case Proof():
                        initiator.proof(message, now)
                    case Verdict():
                        initiator.verdict(message, now)

    def _targets_of(self, sender: str) -> list[Target]:
        return [target for target in self.targets.values() if target.connection.ends[0] == sender]

    def _arrived(self, header: Header, wrapped: bytes, now: float) -> None:
        if target := self.targets.get(header.connection):
            target.arrived(header, wrapped, now)

    def _failed(self, ack: Ack, now: float) -> None:
        for initiator in self.initiators.values():
            initiator.failed(ack, now)
