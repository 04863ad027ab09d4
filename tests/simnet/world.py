"""Two whole sites in virtual time: gate, handshake machine and packet path of the product, joined by its hostile
in-memory network, over UDP or over QUIC, fed by key managers that can fail in every way.  No sleep, no clock, no
event loop.
"""

from __future__ import annotations

import heapq
import ipaddress
import random
import struct
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any

from qvpn.config import identity
from qvpn.dataplane.plane import Plane
from qvpn.handshake import events, gate, timers
from qvpn.handshake.machine import PeerHandshake
from qvpn.handshake.parameters import KeyFault, KeyMaterial, PeerParameters, Randomness
from qvpn.handshake.port import Port
from qvpn.netio.base import Address
from qvpn.netio.memory import Impairments, MemoryNetwork, MemoryTun
from qvpn.tunnel.drops import DropReason, Drops
from qvpn.tunnel.keys import EpochKeys, EpochState
from qvpn.wire.messages import WireOrigin
from tests.simnet.carriers import Alarms, is_data, over, reach

STATUS_INTERVAL = 1.0
"""Seconds between two questions to a key manager how it is."""


@cache
def pair(level: int = 3) -> tuple[identity.Identity, identity.Identity]:
    """Two identities; the first has the smaller fingerprint and so is preferred."""
    one, other = sorted((identity.generate(level) for _ in range(2)), key=lambda i: i.public.fingerprint)
    return one, other


class SimNetwork(MemoryNetwork):
    """Tells lost data records from all else that it loses.

    ``filter`` swallows the datagrams of ours for which it returns True, and ``look`` sees them before: in the
    network, or where they are ``hidden`` from it, at the edge of the carrier that hides them.  ``alter`` is what the
    network makes of anything that is sent, inside QUIC or not; None: it swallows it.
    """

    def __init__(self, seed: int, impairments: Impairments | None = None, *, hidden: bool = False) -> None:
        super().__init__(seed, impairments)
        self.hidden = hidden
        self.filter: Callable[[Address, Address, bytes], bool] = lambda source, destination, datagram: False
        self.look: Callable[[Address, Address, bytes], None] = lambda source, destination, datagram: None
        self.alter: Callable[[Address, Address, bytes], bytes | None] = lambda source, destination, datagram: datagram
        self.taken: set[bytes] = set()
        self.brought: set[bytes] = set()
        self._data_lost = 0

    @property
    def data_lost(self) -> int:
        """Data records that were sent and did not arrive; what a carrier of ours gives up by itself is among them."""
        return self._data_lost + len(self.taken - self.brought)

    def swallows(self, source: Address, destination: Address, datagram: bytes) -> bool:
        """At the edge of a carrier, or of the network where there is none."""
        self.look(source, destination, datagram)
        if not self.filter(source, destination, datagram):
            return False
        self.counts["filtered"] += 1
        return True

    def _carry(self, source: Address, destination: Address, datagram: bytes, ecn: int = 0) -> None:
        if not self.hidden and self.swallows(source, destination, datagram):
            return
        altered = self.alter(source, destination, datagram)
        if altered is None:
            self.counts["filtered"] += 1
            return
        before = self.counts["lost"]
        super()._carry(source, destination, altered, ecn)
        if is_data(datagram):
            self._data_lost += self.counts["lost"] - before


class KeyManagers:
    """Both sites' key managers and what lies between them: keys with IDs, each handed out once at each side."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.for_fetch: dict[str, bytes] = {}
        self.fault = {"a": "", "b": ""}
        self.latency = 0.005
        self.drawn: Counter[str] = Counter()
        self.fetched: Counter[str] = Counter()
        self._last: dict[str, tuple[str, bytes]] = {}

    def ready(self, site: str) -> bool:
        """What an honest status says."""
        return self.fault[site] not in ("down", "503", "empty", "silent")

    def draw(self, site: str) -> tuple[float, KeyMaterial | KeyFault | None]:
        """(seconds until the answer, answer); None: there is none."""
        early = self._refuses(site)
        if early is not None:
            return early
        self.drawn[site] += 1
        key_id, material = str(uuid.UUID(int=self.random.getrandbits(128))), self.random.randbytes(32)
        if self.fault[site] == "repeated-key" and site in self._last:
            key_id, material = self._last[site]
        self._last[site] = key_id, material
        self.for_fetch[key_id] = material
        return self._deliver(site, key_id, material)

    def fetch(self, site: str, key_id: str) -> tuple[float, KeyMaterial | KeyFault | None]:
        early = self._refuses(site)
        if early is not None:
            return early
        material = self.for_fetch.pop(key_id, None)
        if material is None:
            return self.latency, KeyFault.UNKNOWN
        self.fetched[site] += 1
        return self._deliver(site, key_id, material)

    def _refuses(self, site: str) -> tuple[float, KeyFault | None] | None:
        fault = self.fault[site]
        if fault in ("503", "empty"):
            return self.latency, KeyFault.UNAVAILABLE
        if fault == "down":
            return self.latency, KeyFault.UNAVAILABLE
        if fault == "silent":
            return 0.0, None
        if fault == "unauthorised":
            return self.latency, KeyFault.UNAUTHORISED
        if fault == "repeat-refused":  # the source noticed by itself that it was given a key again
            return self.latency, KeyFault.REPEATED
        if fault == "rolled-back":
            return self.latency, KeyFault.ROLLED_BACK
        return None

    def _deliver(self, site: str, key_id: str, material: bytes) -> tuple[float, KeyMaterial | KeyFault]:
        fault = self.fault[site]
        if fault == "wrong-length":  # the feed takes no key that has not 32 bytes
            return self.latency, KeyFault.BROKEN
        if fault == "wrong-key":
            material = bytes([material[0] ^ 1]) + material[1:]
        origin = WireOrigin.EXTERNAL if fault == "wrong-origin" else WireOrigin.QKD
        if fault == "simulated":
            origin = WireOrigin.SIMULATED
        delay = 5.0 if fault == "slow" else self.latency
        return delay, KeyMaterial(key_id, origin, 0, bytearray(material))


@dataclass
class Epoch:
    """What one site installed, to be compared with the other's."""

    keys: EpochKeys
    send: bytes
    receive: bytes


@dataclass
class Log:
    """Everything a site's machine said, over its restarts."""

    confirmed: list[tuple[float, events.Confirmed]] = field(default_factory=list)
    failed: list[tuple[float, events.AttemptFailed]] = field(default_factory=list)
    alarms: list[tuple[float, str]] = field(default_factory=list)
    chain_broken: list[float] = field(default_factory=list)
    needs: int = 0


class Site:
    """One daemon without its sockets.  ``restart`` forgets all but identity, configuration and key manager."""

    def __init__(self, world: World, name: str, own: int, address: Address, **settings: Any) -> None:
        self.world, self.name, self.address = world, name, address
        self.other = "b" if name == "a" else "a"
        self.peer_address: Address | None = None
        identities = pair(settings.pop("level", 3))
        self.parameters = PeerParameters(
            name=self.other,
            identity=identities[own],
            peers=(identities[1 - own].public,),
            label="kme",
            sae_local=f"sae-{name}",
            sae_remote=f"sae-{self.other}",
            **settings,
        )
        self.log = Log()
        self.installed: dict[int, Epoch] = {}
        self.received: Counter[int] = Counter()
        self.sent = 0
        self.drops = Drops()
        self.running = False

    # life

    def begin(self) -> None:
        world = self.world
        chance = random.Random(world.random.getrandbits(64))
        randomness = Randomness(chance.randbytes, chance.random)
        self.port = Port(randomness.token)
        self.gate = gate.Gate(self.port, randomness, world.now)
        self.gate.add_peer(self.parameters)
        self.tun, self.lower, self.alarms = MemoryTun(), world.network.bind(self.address), Alarms(world.later)
        self.bind = over(world.carrier, self.lower, world.network, lambda: world.now, self.alarms)
        self.plane = Plane(self.tun, self.bind, lambda: world.now, self)
        inner = ipaddress.ip_network("10.90.0.2/32" if self.name == "a" else "10.90.0.1/32")
        self.plane.add_peer(self.other, [inner], overlap=timers.overlap(self.parameters.rekey))
        self.machine = PeerHandshake(self.parameters, self.port, randomness, world.now)
        self.endpoint: Address | None = None
        if self.parameters.has_endpoint:
            self.set_endpoint(reach(world.carrier, world.addresses[self.other]))
        self.running, self._pumping, self._status_at = True, False, world.now
        self.plane.start()
        self.machine.source_ready(world.keys.ready(self.name), world.now)
        self.machine.start(world.now)
        self.pump()

    def crash(self) -> None:
        """kill -9: nothing is said to anybody."""
        self.running, self.alarms.dead = False, True
        self.collect()
        self.lower.close()
        self.plane.close()

    def stop(self) -> None:
        self.machine.stop(self.world.now)
        self.pump()
        self.bind.close()
        self.crash()

    def set_endpoint(self, address: Address) -> None:
        self.endpoint = address
        self.plane.set_endpoint(self.other, address)
        self.gate.set_endpoint(self.other, address)

    # what the packet path reports

    def on_handshake(self, datagram: bytes, address: Address) -> None:
        verdict = self.gate.receive(datagram, address, self.world.now)
        if isinstance(verdict, gate.Complete):
            self._count(self.machine.receive(verdict.message_type, verdict.message, verdict.carrier, self.world.now))
            self.pump()
        elif isinstance(verdict, gate.Reply):
            self.plane.send_handshake([verdict.datagram], address)
        elif isinstance(verdict, gate.Dropped):
            self._count(verdict.reason)

    def on_control(self, peer: str, receive_index: int, payload: bytes, address: Address) -> None:
        self._count(self.machine.control(receive_index, payload, self.world.now))
        self.pump()

    def on_first_record(self, peer: str, receive_index: int, address: Address) -> None:
        self.machine.first_record(receive_index, self.world.now)
        self.pump()

    def on_new_address(self, peer: str, receive_index: int, address: Address) -> None:
        self.set_endpoint(address)
        self.machine.endpoint_known(True, self.world.now)
        self.pump()

    def on_limit(self, peer: str, receive_index: int) -> None:
        self.machine.limit(receive_index)
        self.pump()

    def _count(self, reason: DropReason | None) -> None:
        if reason is not None:
            self.drops.count(reason)

    # events

    def pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        while (event := self.machine.next_event()) is not None:
            getattr(self, f"_{type(event).__name__.lower()}")(event)
        self._pumping = False

    def _sendcold(self, event: events.SendCold) -> None:
        target = event.address if isinstance(event.address, Address) else self.endpoint
        if target is not None:
            self.plane.send_handshake(event.datagrams, target)

    def _sendinner(self, event: events.SendInner) -> None:
        for payload in event.payloads:
            self.plane.send_control(self.other, payload, receive_index=event.receive_index)

    def _needkey(self, event: events.NeedKey) -> None:
        self.log.needs += 1
        managers = self.world.keys
        wait, answer = managers.draw(self.name) if event.key is None else managers.fetch(self.name, event.key.key_id)
        if answer is not None:
            self.world.later(wait, self._deliver, self.machine, event.request, answer)

    def _deliver(self, machine: PeerHandshake, request: int, answer: KeyMaterial | KeyFault) -> None:
        if self.running and machine is self.machine:
            machine.key(request, answer, self.world.now)
            self.pump()

    def _install(self, event: events.Install) -> None:
        keys = event.keys
        self.plane.install(self.other, keys)
        self.installed[keys.receive_index] = Epoch(keys, keys.send_key(0), keys.receive_key(0))

    def _hold(self, event: events.Hold) -> None:
        self.plane.hold(self.other, event.receive_index)

    def _erase(self, event: events.Erase) -> None:
        self.plane.erase(self.other, event.receive_index)

    def _confirmed(self, event: events.Confirmed) -> None:
        self.log.confirmed.append((self.world.now, event))
        self.world.check_agreement(self, event)

    def _attemptfailed(self, event: events.AttemptFailed) -> None:
        self.log.failed.append((self.world.now, event))

    def _alarm(self, event: events.Alarm) -> None:
        self.log.alarms.append((self.world.now, event.kind))

    def _chainbroken(self, event: events.ChainBroken) -> None:
        self.log.chain_broken.append(self.world.now)

    def _dropped(self, event: events.Dropped) -> None:
        self.drops.count(event.reason)

    # time

    def next_due(self) -> float:
        due = self.machine.next_timer()
        return min(self._status_at, due) if due is not None else self._status_at

    def tick(self) -> None:
        now = self.world.now
        if now >= self._status_at:
            self._status_at = now + STATUS_INTERVAL
            self.plane.tick()
            self.machine.source_ready(self.world.keys.ready(self.name), now)
        stats = self.plane.stats(self.other)
        if stats.last_received is not None:
            self.machine.heard(stats.last_received)
        if stats.last_sent is not None:
            self.machine.said(stats.last_sent)
        due = self.machine.next_timer()
        if due is not None and due <= now:
            self.machine.handle_timer(now)
        self.pump()

    # packets

    def send_packet(self) -> None:
        self.tun.inject([packet(self.name, self.sent)])
        self.sent += 1

    def collect(self) -> None:
        for data in self.tun.taken:
            self.received[struct.unpack_from(">Q", data, 10 + 28)[0]] += 1
        self.tun.taken.clear()

    @property
    def state(self) -> EpochState:
        return self.machine.snapshot(self.world.now).state

    @property
    def sending(self) -> EpochKeys | None:
        """Keys of the epoch that packets leave under."""
        epoch = self.plane._table[self.other].sending(self.world.now)
        return self.installed[epoch.receive_index].keys if epoch is not None else None


def packet(sender: str, number: int) -> bytes:
    """virtio-net header and an IPv4 packet with a number in it."""
    ends = bytes((10, 90, 0, 1)), bytes((10, 90, 0, 2))
    source, destination = ends if sender == "a" else ends[::-1]
    udp = struct.pack(">HHHHQ", 4096, 4097, 16, 0, number)
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, source, destination)
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return bytes(10) + head[:10] + (0xFFFF - total).to_bytes(2, "big") + head[12:] + udp


class World:
    """Sites a and b, the network, the key managers, and the one clock."""

    def __init__(
        self,
        seed: int = 0,
        *,
        impairments: Impairments | None = None,
        carrier: str = "udp",
        a: dict[str, Any] | None = None,
        b: dict[str, Any] | None = None,
        **both: Any,
    ) -> None:
        """Settings are those of ``PeerParameters``.  Site a is the preferred one."""
        self.random = random.Random(seed)
        self.carrier = carrier
        self.network = SimNetwork(seed, impairments, hidden=carrier != "udp")
        self.keys = KeyManagers(seed + 1)
        self._later: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self.addresses = {
            "a": Address(ipaddress.ip_address("192.0.2.1"), 51840),
            "b": Address(ipaddress.ip_address("192.0.2.2"), 51840),
        }
        both.setdefault("rekey", 10.0)
        both.setdefault("hard_end", 3 * both["rekey"] if both["rekey"] >= 3 else 2 * both["rekey"] + 3)
        self.a = Site(self, "a", 0, self.addresses["a"], **{**both, **(a or {})})
        self.b = Site(self, "b", 1, self.addresses["b"], **{**both, **(b or {})})
        self.sites = (self.a, self.b)

    @property
    def now(self) -> float:
        return self.network.now

    def begin(self) -> World:
        for site in self.sites:
            site.begin()
        return self

    def later(self, wait: float, work: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._later, (self.now + wait, next(self._order), work, arguments))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass; True as soon as ``until`` holds."""
        end = self.now + seconds
        while not until():
            due = [site.next_due() for site in self.sites if site.running]
            if self._later:
                due.append(self._later[0][0])
            arrival = self.network.next_due()
            if arrival is not None:
                due.append(arrival)
            step = min([end, *due])
            if step >= end:
                self.network.advance(end)
                return until()
            self.network.advance(max(step, self.now))
            while self._later and self._later[0][0] <= self.now:
                _, _, work, arguments = heapq.heappop(self._later)
                work(*arguments)
            for site in self.sites:
                if site.running and site.next_due() <= self.now:
                    site.tick()
        return True

    def traffic(self, interval: float) -> None:
        """Both sites send a numbered packet every so often, until :meth:`quiet`."""
        self.talking = True

        def tick() -> None:
            if not self.talking:
                return
            for site in self.sites:
                if site.running:
                    site.send_packet()
            self.later(interval, tick)

        self.later(interval, tick)

    def quiet(self) -> None:
        """No more packets; what is under way arrives."""
        self.talking = False
        self.run(1.0)

    def up(self, *states: EpochState) -> bool:
        """Both ends pass packets under the same epoch, in one of these states (any but blocked if none is named)."""
        one, other = self.a.sending, self.b.sending
        if one is None or other is None or one.send_index != other.receive_index:
            return False
        return one.state in (states or tuple(set(EpochState) - {EpochState.BLOCKED}))

    def check_agreement(self, site: Site, event: events.Confirmed) -> None:
        """No epoch without agreement: what one site confirms, the other has, with the same keys."""
        mine = site.installed[event.receive_index]
        other = self.b if site is self.a else self.a
        theirs = other.installed.get(mine.keys.send_index)
        assert theirs is not None, f"{site.name} confirmed an epoch that {other.name} never had"
        assert theirs.keys.send_index == mine.keys.receive_index
        assert (theirs.send, theirs.receive) == (mine.receive, mine.send)
        assert (theirs.keys.number, theirs.keys.state) == (mine.keys.number, mine.keys.state)
        assert theirs.keys.initiator != mine.keys.initiator
        assert mine.send != mine.receive

    def lost(self) -> int:
        """Packets that did not come out, in both directions."""
        for site in self.sites:
            if site.running:
                site.collect()
        return self.a.sent - len(self.b.received) + self.b.sent - len(self.a.received)

    def given_up(self) -> int:
        """Datagrams that the sites' carriers took and dropped by themselves, for they had waited too long."""
        return sum(site.bind.errors.get("quic_stale", 0) for site in self.sites)


def with_loss(loss: float, **more: float) -> Impairments:
    return replace(Impairments(delay=0.01, jitter=0.02), loss=loss, **more)  # type: ignore[arg-type]
