"""Nodes in one process, with real stores, on a network that loses, doubles, delays and kills.  Time is virtual.

A killed node is what kill -9 leaves: its store as the last finished transaction made it, and nothing else.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from keysource.base import End, Owner
from keysource.network import crashes, onetime
from keysource.network.core import Event, Fault
from keysource.network.errors import TooFew
from keysource.network.messages import Message, Share, decode_untrusted, encode
from keysource.network.node import RelayNode
from keysource.network.store import NodeStore
from keysource.network.topology import Topology


class Killed(Exception):
    """Raised at a crash point."""


@dataclass
class Weather:
    """Of the network."""

    loss: float = 0.0
    double: float = 0.0
    longest: float = 0.05
    """Seconds that a message may take."""
    kill: float = 0.0
    """At every crash point."""


@dataclass(order=True)
class _InFlight:
    at: float
    number: int
    sender: str = field(compare=False)
    to: str = field(compare=False)
    path: str = field(compare=False)
    body: bytes = field(compare=False)


def topology(
    links: list[tuple[str, str]], ends: tuple[str, str], paths: int = 1, max_hops: int = 4, **more: object
) -> Topology:
    nodes = sorted({node for link in links for node in link})
    return Topology.model_validate(
        {
            "version": 1,
            "node": [{"id": node, "url": f"https://{node}:1"} for node in nodes],
            "link": [
                {"name": f"{a}-{b}" + f"-{i}" * ((a, b) in links[:i]), "ends": [a, b]}
                for i, (a, b) in enumerate(links)
            ],
            "connection": [
                {"name": "long", "ends": list(ends), "paths": paths, "max_hops": max_hops, "block_keys": 4, **more}
            ],
        }
    )


class Net:
    """All nodes of a map.  Every message goes through its encoding."""

    def __init__(self, folder: Path, map_: Topology, seed: int, weather: Weather | None = None) -> None:
        self.map, self.folder, self.random = map_, folder, random.Random(seed)
        self.weather = weather or Weather()
        self.now = 0.0
        self.down: set[str] = set()
        self.events: list[tuple[str, Event]] = []
        self.masked: dict[str, Share] = {}
        """Unit -> the one message in which it may ever stand."""
        self.kills: Counter[str] = Counter()
        self.hops: list[tuple[float, str]] = []
        """When a share went out over which link."""
        self.junk: list[str] = []
        self.faults: dict[str, Fault] = {}
        self.nodes: dict[str, RelayNode] = {}
        self.stores: dict[str, NodeStore] = {}
        self._flying: list[_InFlight] = []
        self._number, self._stepping = 0, False
        self._blocks: Counter[str] = Counter()
        for node in map_.node:
            self._boot(node.id)
        for link in map_.link:
            for end, node in zip((End.A, End.B), link.ends, strict=True):
                self.stores[node].bind_link(link.name, end, Owner.ALTERNATE)

    def close(self) -> None:
        for store in self.stores.values():
            store.close()

    def feed(self, units: int, *names: str) -> None:
        """A block of units to both ends of all links, or of these."""
        for link in self.map.link:
            if not names or link.name in names:
                keys = self.random.randbytes(32 * units)
                for node in link.ends:
                    self.stores[node].add_block(link.name, self._blocks[link.name], bytearray(keys), link.origin)
                self._blocks[link.name] += 1

    def alarm(self, name: str, text: str) -> None:
        for node in self.nodes.values():
            if name in node.core.links:
                node.core.links[name].alarm = text

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            times = {
                node: max(self.now, self.nodes[node].next_time()) for node in self.nodes if node not in self.down
            }
            next_node = min(times, key=lambda node: times[node])
            if self._flying and self._flying[0].at <= times[next_node]:
                if self._flying[0].at > end:
                    break
                self._arrive(heapq.heappop(self._flying))
            else:
                if times[next_node] > end:
                    break
                # never the same instant twice: a node that asks for "now" again and again would stop the clock
                self.now = max(times[next_node], self.now + 1e-4)
                self._step(next_node, None)
        self.now = end

    def keys(self, node: str, connection: str = "long") -> dict[int, bytes]:
        return {block.block: bytes(block.keys) for block in self.stores[node].outbox(connection)}

    def told(self, kind: str) -> list[Event]:
        return [event for _node, event in self.events if event.kind == kind]

    def send_junk(self, corrupt: str, to: str, path: tuple[str, ...], transfer: str, index: int) -> None:
        """A share of random bytes, rightly masked and tagged on its one hop."""
        [link] = self.map.links_between(corrupt, to)
        model = next(share for share in self.masked.values() if share.header.transfer == transfer)
        try:
            drawn = self.stores[corrupt].draw(link.name, len(model.header.units))
        except TooFew:
            return
        header = model.header.model_copy(
            update={
                "path": path,
                "index": index,
                "hop": path.index(corrupt),
                "link": link.name,
                "attempt": 1,
                "pad": tuple(name for name, _unit in drawn[:-1]),
                "mac": drawn[-1][0],
            }
        )
        masked = self.random.randbytes(len(model.masked))
        share = Share(header=header, masked=masked, tag=onetime.tag(drawn[-1][1], header.encoded(), masked))
        self.nodes[to].receive(corrupt, share, self.now)
        self.junk.append(transfer)

    def _arrive(self, flying: _InFlight) -> None:
        self.now = max(self.now, flying.at)
        if flying.to in self.down:
            return
        callback = self.map.url_of(flying.sender) + "/kmapi/v1/ack"
        self._step(flying.to, (flying.sender, decode_untrusted(flying.path, flying.body, callback)))

    def _step(self, name: str, received: tuple[str, Message] | None) -> None:
        node, self._stepping = self.nodes[name], True
        try:
            if received is None:
                node.tick(self.now)
            else:
                node.receive(*received, self.now)
        except Killed as point:
            self.kills[str(point)] += 1
            self.reboot(name)
            return
        finally:
            self._stepping = False
        self.events += [(name, event) for event in node.take_events()]
        for to, message in node.take_outgoing():
            if isinstance(message, Share):
                self._note(message)
            for _ in range(1 + (self.random.random() < self.weather.double)):
                if self.random.random() >= self.weather.loss:
                    self._number += 1
                    at = self.now + self.random.uniform(0.001, self.weather.longest)
                    path, body = encode(message, name, self.map.url_of(name))
                    heapq.heappush(self._flying, _InFlight(at, self._number, name, to, path, body))

    def _note(self, share: Share) -> None:
        self.hops.append((self.now, share.header.link))
        for unit in share.header.units:
            assert unit not in self.masked, f"unit {unit} goes out twice"
            self.masked[unit] = share

    def reboot(self, name: str) -> None:
        """With what is on its disk."""
        self.stores[name].close()
        self._boot(name)

    def _boot(self, name: str) -> None:
        store = NodeStore(self.folder / name / "relay.sqlite", name, max_units=100_000)
        store._db.execute("PRAGMA synchronous=OFF")  # nobody pulls the plug of this machine
        self.stores[name] = store
        self.nodes[name] = RelayNode(name, self.map, store, random=self.random.randbytes, fault=self.faults.get(name))
        for link in self.nodes[name].core.links.values():
            link.up = True

    @contextmanager
    def killing(self, monkeypatch: pytest.MonkeyPatch, point: str = "", times: int = 0) -> Iterator[None]:
        """With a chance at every crash point; or, where one is named, there and so many times."""

        def at(here: str) -> None:
            named = here == point and self.kills[here] < times
            if self._stepping and (named or (not point and self.random.random() < self.weather.kill)):
                raise Killed(here)

        with monkeypatch.context() as patch:
            patch.setattr(crashes, "at", at)
            yield
