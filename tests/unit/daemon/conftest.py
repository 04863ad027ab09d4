"""Two whole daemons in one process and in virtual time: real agents, feeds, machines and packet paths; the memory
network and a pair of key sources whose keys the test controls."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import selectors
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import structlog

from keysource.base import Key, Origin, SaePair, SourceStatus
from keysource.errors import Unavailable, UnknownKeyID
from qvpn.config import identity
from qvpn.config.load import parse_config
from qvpn.daemon import Daemon
from qvpn.handshake.parameters import Randomness
from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments, MemoryBind, MemoryNetwork, MemoryTun
from qvpn.sitefiles import PeerKeys, SiteFiles
from qvpn.transports.base import Transport, TransportContext
from qvpn.transports.quic.transport import Quic

OUTER = {"alice": "192.0.2.1", "bob": "192.0.2.2"}
INNER = {"alice": "10.90.0.1", "bob": "10.90.0.2"}
OTHER = {"alice": "bob", "bob": "alice"}
PORT = 51840
IDENTITIES = {site: identity.generate() for site in OUTER}

TOML = """
version = 1
[site]
name = "{site}"
identity = "x"
listen = "[::]:51840"
[key_source.box]
type = "spool"
[[peer]]
name = "{other}"
public_key = "x"
{endpoint}
allowed_ips = ["{inner}/32"]
key_source = "box"
rekey = "{rekey}"
{more}
"""


class TravellingSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Nothing ready: instead of waiting, time moves on to the next timer or to the next datagram's arrival."""

    def __init__(self, network: MemoryNetwork) -> None:
        super().__init__()
        self.network = network

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout is None or timeout <= 0:
            self.network.advance(self.network.now)
            return ready
        due = self.network.next_due()
        until = self.network.now + timeout
        self.network.advance(until if due is None else min(until, due))
        return ready


class TravellingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is the memory network's."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.network = network
        super().__init__(TravellingSelector(network))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.network.now


class Box:
    """Where both sites' key sources get their keys: what one draws, the other can fetch, once."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.drawn = 0
        self.fetched = 0


class BoxSource:
    """One end of the box."""

    def __init__(self, box: Box, site: str) -> None:
        self.box = box
        self.site = site
        self.origin = Origin.QKD
        self.down = False
        self.liar = False
        self.alarm: str | None = None
        self.named = True

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    def sae_pair(self, peer_sae: str) -> SaePair:
        if not self.named:
            raise Unavailable("not asked yet")
        return SaePair(self.site, OTHER[self.site])

    async def status(self, peer_sae: str) -> SourceStatus:
        return SourceStatus(not self.down, "down" if self.down else "", self.origin, alarm=self.alarm)

    async def get_key(self, peer_sae: str) -> Key:
        if self.down:
            raise Unavailable("down", answered=True)
        key_id = str(uuid.uuid4())
        self.box.keys[key_id] = random.randbytes(32)
        self.box.drawn += 1
        return self._key(key_id, self.box.keys[key_id])

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        if self.down:
            raise Unavailable("down", answered=True)
        if key_id not in self.box.keys:
            raise UnknownKeyID(key_id)
        self.box.fetched += 1
        return self._key(key_id, self.box.keys.pop(key_id))

    def _key(self, key_id: str, material: bytes) -> Key:
        flipped = bytes([material[0] ^ 1]) + material[1:] if self.liar else material
        return Key(key_id, bytearray(flipped), self.origin)


class PickyNetwork(MemoryNetwork):
    """Swallows every datagram of which ``swallow`` says so, as a firewall does that looks inside."""

    swallow: Callable[[bytes], bool] = staticmethod(lambda datagram: False)

    def _carry(self, source: Address, destination: Address, datagram: bytes, ecn: int) -> None:
        if self.swallow(datagram):
            self.counts["swallowed"] += 1
        else:
            super()._carry(source, destination, datagram, ecn)


class World:
    """Two sites and the network between them."""

    def __init__(
        self,
        *,
        rekey: str = "10s",
        more: str = "",
        endpoints: tuple[str, ...] = ("alice", "bob"),
        quic: bool = False,
        seed: int = 1,
    ) -> None:
        """``quic``: both sites can speak it; which they do stands in ``more``."""
        self.network = PickyNetwork(seed, Impairments(delay=0.002))
        self.quic = quic
        self.box = Box()
        self.rekey, self.more, self.endpoints = rekey, more, endpoints
        self.daemons: dict[str, Daemon] = {}
        self.sources: dict[str, BoxSource] = {}
        self.tuns: dict[str, MemoryTun] = {}
        self.binds: dict[str, MemoryBind] = {}
        self.transports: dict[str, dict[str, Transport]] = {}
        self.logs: dict[str, list[dict[str, Any]]] = {}
        self.sent = 0

    def make(self, site: str, *, more: str | None = None, source: BoxSource | None = None) -> Daemon:
        """A daemon of this site, new as after a restart of the machine."""
        other = OTHER[site]
        text = TOML.format(
            site=site,
            other=other,
            inner=INNER[other],
            endpoint=f'endpoint = "{OUTER[other]}:{PORT}"' if site in self.endpoints else "",
            rekey=self.rekey,
            more=self.more if more is None else more,
        )
        config = parse_config(text.encode(), Path("qvpn.toml"))
        files = SiteFiles(config, IDENTITIES[site], {other: PeerKeys((IDENTITIES[other].public,))})
        self.tuns[site] = MemoryTun()
        self.binds[site] = self.network.bind(Address(ipaddress.ip_address(OUTER[site]), PORT))
        transports = self.transports[site] = {"quic": quic_transport(self.network)} if self.quic else {}
        bind = transports["quic"].over(self.binds[site]) if transports else self.binds[site]
        self.sources[site] = source or self.sources.get(site) or BoxSource(self.box, site)
        self.logs[site] = []
        self.daemons[site] = Daemon(
            files,
            self.tuns[site],
            bind,
            {"box": self.sources[site]},
            clock=lambda: self.network.now,
            log=structlog.wrap_logger(None, processors=[Catch(self.logs[site])]),
            randomness=Randomness(random.randbytes, random.random),
            transports=transports,
        )
        return self.daemons[site]

    async def start(self, *sites: str) -> None:
        for site in sites or ("alice", "bob"):
            if site not in self.daemons:
                self.make(site)
            await self.daemons[site].start()

    async def stop(self, *sites: str) -> None:
        for site in sites or ("alice", "bob"):
            await self.daemons.pop(site).stop()
            self.binds[site].close()

    def kill(self, site: str) -> None:
        """As kill -9 does: no word to anybody."""
        daemon = self.daemons.pop(site)
        for task in daemon._tasks:
            task.cancel()
        for agent in daemon.agents.values():
            agent._stopped = True
        daemon._plane.close()
        self.binds[site].close()

    # what can be seen

    def peer(self, site: str) -> dict[str, Any]:
        return self.status(site)["peers"][0]

    def status(self, site: str) -> dict[str, Any]:
        return self.daemons[site].snapshot().to_json()  # type: ignore[return-value]

    def state(self, site: str) -> str:
        return str(self.peer(site)["state"])

    def events(self, site: str, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.logs[site] if entry["event"] == event]

    async def until(self, condition: Callable[[], bool], within: float) -> float:
        start = self.network.now
        while not condition():
            assert self.network.now - start < within, f"not within {within} s"
            await asyncio.sleep(0.01)
        return self.network.now - start

    async def up(self, state: str = "qkd", within: float = 10.0) -> float:
        return await self.until(lambda: all(self.state(site) == state for site in self.daemons), within)

    async def send(self, source: str, count: int = 1) -> int:
        """Send packets through the tunnel; how many came out at the other end."""
        taken = self.tuns[OTHER[source]].taken
        before = len(taken)
        for _ in range(count):
            self.sent += 1
            self.tuns[source].inject([packet(INNER[source], INNER[OTHER[source]], self.sent)])
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        return len(taken) - before


def quic_transport(network: MemoryNetwork) -> Quic:
    """With a certificate of its own, in the network's time."""

    def nothing(path: Path, data: bytes = b"") -> bytes:
        return b""

    return Quic(
        {},
        TransportContext(
            base=Path("/nonexistent"),
            state=Path("/nonexistent"),
            read_file=nothing,
            read_secret=nothing,
            write_secret=nothing,  # type: ignore[arg-type]
            clock=lambda: network.now,
            call_later=lambda seconds, callback: asyncio.get_running_loop().call_later(seconds, callback),
            log=None,
        ),
    )


class Catch:
    """Keeps log entries instead of printing them."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries

    def __call__(self, _logger: object, method: str, event: dict[str, Any]) -> Any:
        self.entries.append({**event, "level": method})
        raise structlog.DropEvent


def packet(source: str, destination: str, number: int) -> bytes:
    """Virtio header and a UDP packet of IPv4 with the number as its payload."""
    payload = number.to_bytes(8, "big")
    header = bytearray(20)
    header[0] = 0x45
    header[2:4] = (28 + len(payload)).to_bytes(2, "big")
    header[8], header[9] = 64, 17
    header[12:16] = ipaddress.ip_address(source).packed
    header[16:20] = ipaddress.ip_address(destination).packed
    return bytes(10) + bytes(header) + bytes(4) + (8 + len(payload)).to_bytes(2, "big") + bytes(2) + payload


Story = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture
def play() -> Callable[..., None]:
    """Run one story in a world of its own, to its end in virtual time."""

    def run(story: Story, **settings: Any) -> None:
        world = World(**settings)

        async def whole() -> None:
            try:
                await story(world)
            finally:
                await world.stop(*world.daemons)

        with asyncio.Runner(loop_factory=lambda: TravellingLoop(world.network)) as runner:
            runner.run(whole())

    return run
