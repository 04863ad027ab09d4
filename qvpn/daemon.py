"""The composition root: from one configuration to a running site, and to its orderly end.

Control and packet path meet here and nowhere else.  :class:`Daemon` takes its edges (TUN, UDP, clock, key sources) as
arguments, so that two of them run in one process in the tests; :mod:`qvpn.launch` gives it the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from keysource.alarm import Alarmed
from keysource.base import Composed, KeySource
from qvpn import __version__, privileged
from qvpn.config.schema import Config, Peer, Policy
from qvpn.config.units import HostPort
from qvpn.control.agent import PeerAgent
from qvpn.control.clockwatch import INTERVAL, ClockWatch, Sight
from qvpn.control.endpoint import NoAddress, literal, resolve
from qvpn.control.forecast import Supply, best_rate, lasts, runs_dry, stretch
from qvpn.control.keyfeed import KeyFeed
from qvpn.control.mistakes import describe
from qvpn.control.supervisor import SourceKeeper, close_all, start_all
from qvpn.dataplane.plane import Plane, payload_for
from qvpn.handshake.gate import Complete, Dropped, Gate, Reply
from qvpn.handshake.machine import PeerHandshake
from qvpn.handshake.parameters import PeerParameters, Randomness
from qvpn.handshake.port import Port
from qvpn.handshake.timers import keepalive, overlap
from qvpn.lanes.counts import summed
from qvpn.lanes.keeper import LaneKit
from qvpn.lanes.lanes import LanedPlane, Lanes
from qvpn.lanes.messages import PeerSetup
from qvpn.netio.base import Address, Bind, Tun
from qvpn.netio.errors import NetioError
from qvpn.observe import eventlog
from qvpn.sitefiles import SiteFiles
from qvpn.siteview import lane_view, peer_view, source_view
from qvpn.status import SiteView
from qvpn.transports.base import Transport
from qvpn.tunnel.drops import DropReason, Drops
from qvpn.tunnel.epoch import EpochRole
from qvpn.wire.messages import Mode

_MODES = {
    Policy.REQUIRE_QKD: Mode.REQUIRE_QKD,
    Policy.PREFER_QKD: Mode.PREFER_QKD,
    Policy.PQC_ONLY: Mode.PQC_ONLY,
}
RESTART = 1.0
LOOK_AGAIN, LOOK_BLOCKED = 10.0, 2.0
"""Seconds between two looks at a blocked peer's address, and before the first one that was found."""
TURN, LOOK_CARRIERS = 5.0, 1.0
"""Seconds for each transport of a peer that cannot be reached, and between two looks at one that can."""


class Daemon:
    """One site."""

    def __init__(
        self,
        site: SiteFiles,
        tun: Tun,
        bind: Bind,
        sources: Mapping[str, KeySource],
        *,
        clock: Callable[[], float] = privileged.boottime,
        log: Any = None,
        randomness: Randomness | None = None,
        fit_mtu: Callable[[Sequence[int]], None] = lambda payloads: None,
        watch: ClockWatch | None = None,
        lanes: Sequence[LaneKit] = (),
        transports: Mapping[str, Transport] | None = None,
    ) -> None:
        """``fit_mtu(payloads)`` gets the bytes that a datagram to each peer whose address is known can carry.

        ``watch`` looks for a wall clock that jumps and for a copied virtual machine.  ``lanes``: what the processes
        of the lanes beside this one get; their opener closes it.
        ``transports``: those whose layers ``bind`` has, by name; UDP need not be among them.
        """
        self.site = site
        self.config: Config = site.config
        self.stop_wanted = asyncio.Event()
        self.failure: str | None = None
        """Why it ends although nobody told it to; one sentence."""
        self.agents: dict[str, PeerAgent] = {}
        self._tun = tun
        self._bind = bind
        self._clock = clock
        self._fit_mtu = fit_mtu
        self._watch = watch
        self._transports = dict(transports or {})
        self._log = log if log is not None else eventlog.get_log(site=self.config.site.name)
        self._started = clock()
        self._random = randomness or Randomness(os.urandom, random.SystemRandom().random)
        self._port = Port(self._random.token)
        self._gate = Gate(self._port, self._random, self._started)
        self._plane = Plane(tun, bind, clock, self)
        self._lanes = self._make_lanes(lanes)
        self._drops = Drops()
        self._feeds: dict[str, KeyFeed] = {}
        self._keepers = {
            name: SourceKeeper(name, self.config.key_source[name].type, source, self._log)
            for name, source in sources.items()
        }
        self._dry: set[str] = set()
        """Peers whose keys run out."""
        self._supplies: defaultdict[str, Supply] = defaultdict(Supply)
        """Of each peer: two peers of a source may have stocks of their own there."""
        self._tasks: set[asyncio.Task[None]] = set()

    # life

    async def start(self) -> None:
        """Start the key sources, then the packet path, then every peer.

        Raises:
            SourceRefused: a key source that no waiting mends.
        """
        await start_all(self._keepers)
        for peer in self.config.peer:
            self._add_peer(peer)
        self._plane.start()
        await self._lanes.start()
        await asyncio.gather(*(self._ask_source(peer) for peer in self.config.peer))
        for peer in self.config.peer:
            self.agents[peer.name].start(wait_for_source=_needs_key(peer))
            self._spawn(partial(self._follow_endpoint, peer))
            if len(peer.transport) > 1:
                self._spawn(partial(self._follow_carriers, peer))
            if peer.name in self._feeds:
                self._spawn(partial(self._follow_source, peer))
        if self._watch is not None:
            self._spawn(partial(self._follow_clocks, self._watch))
        self._log.info("started", listen=str(self._bind.local), interface=self._tun.name, peers=len(self.agents))

    async def run(self) -> None:
        """Wait until somebody wants the end (:attr:`stop_wanted`)."""
        await self.stop_wanted.wait()

    async def stop(self) -> None:
        """Tell the peers, erase every key, close sources.  May be called twice."""
        for task in self._tasks:
            task.cancel()
        for agent in self.agents.values():
            agent.stop()
        self._plane.close()
        await self._lanes.aclose()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(feed.aclose() for feed in self._feeds.values()))
        await close_all(self._keepers)
        if self.agents:
            self._log.info("stopped")

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.get_running_loop().create_task(self._keep_going(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_going(self, work: Callable[[], Awaitable[None]]) -> None:
        """Start again what breaks off by a mistake; what returns is done."""
        while True:
            try:
                return await work()
            except Exception as error:
                self._log.error("internal error", **describe(error))
                await asyncio.sleep(RESTART)

    # peers

    def _make_lanes(self, kits: Sequence[LaneKit]) -> Lanes:
        peers = [
            PeerSetup(peer.name, peer.allowed_ips, overlap(peer.rekey), peer.keepalive or keepalive(peer.rekey))
            for peer in self.config.peer
        ]

        def want_epoch(peer: str) -> None:
            self.agents[peer].rekey()

        def limit(peer: str, receive_index: int) -> None:
            self.agents[peer].limit(receive_index)

        return Lanes(kits, peers, self._plane, self._log, want_epoch=want_epoch, limit=limit)

    def _add_peer(self, peer: Peer) -> None:
        feed = self._make_feed(peer)
        parameters = self._parameters(peer, feed)
        self._plane.add_peer(peer.name, peer.allowed_ips, overlap=overlap(peer.rekey))
        self._gate.add_peer(parameters)
        machine = PeerHandshake(parameters, self._port, self._random, self._clock())
        agent = PeerAgent(
            peer,
            machine,
            LanedPlane(self._plane, self._lanes),
            self._clock,
            self._log.bind(peer=peer.name),
            traffic=lambda: self._traffic(peer.name),
            moved=lambda address: self._moved(peer.name, address),
            resized=self._fit,
            most=None if self.config.tunnel.mtu is None else payload_for(self.config.tunnel.mtu),
        )
        agent.feed = feed
        self.agents[peer.name] = agent
        agent.candidates = tuple(self._known_places(peer))
        if agent.candidates:
            agent.set_endpoint(agent.candidates[0])

    def _moved(self, peer: str, address: Address) -> None:
        self._gate.set_endpoint(peer, address)
        self.agents[peer].machine.datagram_limit(self._bind.max_payload(address))
        self._fit()

    def _fit(self) -> None:
        """The interface follows the widest path; senders to the other peers are told by the packet path."""
        payloads = [agent.path.payload for agent in self.agents.values()]
        try:
            self._fit_mtu([payload for payload in payloads if payload is not None])
        except NetioError as error:
            self._log.warning("the tunnel's MTU cannot be changed", reason=str(error))

    def _traffic(self, peer: str) -> tuple[float | None, float | None]:
        stats = self._plane.stats(peer)
        heard = next((epoch.last_received for epoch in stats.epochs if epoch.role is EpochRole.CURRENT), None)
        return heard, stats.last_sent

    def _make_feed(self, peer: Peer) -> KeyFeed | None:
        if peer.key_source is None or peer.policy is Policy.PQC_ONLY:
            return None
        name, source = peer.key_source, self._keepers[peer.key_source].source

        def deliver(request: int, answer: Any) -> None:
            self.agents[peer.name].key_delivered(request, answer)

        feed = KeyFeed(name, source, peer.sae, deliver, self._log.bind(peer=peer.name))
        self._feeds[peer.name] = feed
        return feed

    def _parameters(self, peer: Peer, feed: KeyFeed | None) -> PeerParameters:
        keys = self.site.peers[peer.name]
        saes = None if feed is None else feed.sae_pair()
        return PeerParameters(
            name=peer.name,
            identity=self.site.identity,
            peers=keys.public,
            psk=keys.psk,
            suites=peer.suites,
            mode=_MODES[peer.policy],
            max_qkd_age=int(peer.max_qkd_age or 0),
            max_degraded=peer.max_degraded,
            allow_simulated=peer.allow_simulated,
            rekey=peer.rekey,
            hard_end=peer.end,
            initiate=peer.initiate,
            has_endpoint=False,
            label=peer.key_source or "none",
            sae_local="" if saes is None else saes.local,
            sae_remote="" if saes is None else saes.remote,
            keepalive=peer.keepalive,
            lanes=self.config.tunnel.lanes,
        )

    # what goes on beside

    async def _follow_endpoint(self, peer: Peer) -> None:
        """Look a peer's addresses up; again, and the next of several, as long as nothing comes through."""
        places = self._places(peer)
        if not places:
            return
        agent, turn, told = self.agents[peer.name], 0, ""
        while True:
            now = self._clock()
            if not agent.machine.live(now) and not (len(peer.transport) > 1 and agent.machine.advances(now)):
                try:
                    agent.candidates = found = await self._look_up(peer, places)
                    agent.set_endpoint(found[turn % len(found)])
                    turn, told = turn + 1, ""
                except NoAddress as error:
                    if str(error) != told:
                        told = str(error)
                        agent.log.warning("no address for the peer", reason=told)
            again = LOOK_AGAIN if len(peer.transport) == 1 else TURN
            await asyncio.sleep(again if agent.endpoint is not None else LOOK_BLOCKED)

    def _places(self, peer: Peer) -> list[tuple[str, HostPort]]:
        """(transport, endpoint) for each transport of the peer that has one, the preferred first."""
        own = ((name, peer.carriers[name].endpoint if name in peer.carriers else None) for name in peer.transport)
        places = ((name, endpoint or peer.endpoint) for name, endpoint in own)
        return [(name, endpoint) for name, endpoint in places if endpoint is not None]

    def _known_places(self, peer: Peer) -> list[Address]:
        """As many of them as need no look-up."""
        places = self._places(peer)
        return [self._reach(peer, name, literal(endpoint)) for name, endpoint in places if endpoint.ip is not None]

    async def _look_up(self, peer: Peer, places: list[tuple[str, HostPort]]) -> tuple[Address, ...]:
        """All addresses of a peer: the first of each transport, then the second of each.  Raises NoAddress."""
        columns, problem = [], None
        for name, endpoint in places:
            try:
                found = await resolve(
                    endpoint,
                    forbidden=[net for other in self.config.peer for net in other.allowed_ips],
                    ipv6=self._bind.local.ip.version == 6,
                )
                columns.append([self._reach(peer, name, place) for place in found])
            except NoAddress as error:
                problem = error
        if not columns and problem is not None:
            raise problem
        rows = itertools.zip_longest(*columns)
        return tuple(place for row in rows for place in row if place is not None)

    def _reach(self, peer: Peer, name: str, place: Address) -> Address:
        transport, table = self._transports.get(name), peer.carriers.get(name)
        if transport is None:
            return place
        return transport.reach(place, {} if table is None else table.options)

    async def _follow_carriers(self, peer: Peer) -> None:
        """Notice a transport that has stopped working, and a better one that works again."""
        agent = self.agents[peer.name]
        while True:
            await asyncio.sleep(LOOK_CARRIERS)
            stats = self._plane.stats(peer.name)
            epoch = next((epoch for epoch in stats.epochs if epoch.role is EpochRole.CURRENT), None)
            if epoch is not None:
                agent.watch_carriers(epoch.receive_index, stats.last_received)

    async def _follow_clocks(self, watch: ClockWatch) -> None:
        """A copied machine must not use a counter that its original uses too; a jump is reason to ask the peer."""
        if not watch.sees_forks:
            self._log.info("this kernel does not show copies of a virtual machine (neither VMClock nor vmgenid)")
        while True:
            await asyncio.sleep(INTERVAL)
            sight, jump = watch.look()
            if sight is Sight.FORKED:
                self._log.error("this virtual machine was copied: every epoch is erased")
                for agent in self.agents.values():
                    agent.forked()
            elif sight is Sight.JUMPED:
                self._log.warning("the wall clock jumped: new handshakes beside the epochs", seconds=round(jump, 1))
                for agent in self.agents.values():
                    agent.jumped()

    async def _follow_source(self, peer: Peer) -> None:
        """Ask the key source how it is, as often as a peer that waits for it needs to know."""
        while True:
            await asyncio.sleep(min(5.0, max(0.5, peer.rekey / 4)))
            await self._ask_source(peer)

    async def _ask_source(self, peer: Peer) -> None:
        feed = self._feeds.get(peer.name)
        if feed is None or peer.key_source is None:
            return
        status = await feed.poll()
        keeper = self._keepers[peer.key_source]
        keeper.last = status
        if isinstance(keeper.source, Composed):
            for name, part in keeper.source.parts().items():
                self._keepers[name].last = part
        self.agents[peer.name].source_status(status.ready, status.alarm)
        self._heed_the_stock(feed, peer, peer.key_source)

    def _rekeys(self, source: str) -> list[float]:
        """The rekey intervals of the peers that draw from a source, seconds."""
        return [peer.rekey for peer in self.config.peer if peer.key_source == source]

    def _heed_the_stock(self, feed: KeyFeed, peer: Peer, source: str) -> None:
        """Warn, once each time that it comes to that, and rekey less often while keys are short."""
        stored, now, rekeys = feed.status.stored_keys, self._clock(), self._rekeys(source)
        supply = self._supplies[peer.name]
        supply.note(stored, feed.drawn, now)
        rate = best_rate(supply.rate(now), feed.status.key_rate)
        dry, factor = runs_dry(stored, rate, rekeys), stretch(stored, rate, rekeys)
        if dry and peer.name not in self._dry:
            left = round(lasts(stored, rekeys) or 0.0)
            self._log.warning("keys run out", source=source, peer=peer.name, stored=stored, lasts_seconds=left)
        (self._dry.add if dry else self._dry.discard)(peer.name)
        self.agents[peer.name].stretch_rekey(factor)

    def order_alarm(self, request: Mapping[str, object]) -> dict[str, object]:
        """``source``, ``active``, ``reason``: the operator raises or clears an alarm.  Raises ``ValueError``."""
        name, active, reason = request.get("source"), request.get("active"), request.get("reason")
        keeper = self._keepers.get(name) if isinstance(name, str) else None
        if keeper is None or not isinstance(keeper.source, Alarmed):
            raise ValueError("no such key source; there are: " + (", ".join(sorted(self._keepers)) or "none"))
        if not isinstance(active, bool) or (active and not isinstance(reason, str)):
            raise ValueError('"active" is true with a "reason", or false')
        try:
            if active:
                keeper.source.raise_alarm(str(reason))
            else:
                keeper.source.clear_alarm()
        except OSError as error:
            raise ValueError(f"{keeper.name}: the state folder cannot be written ({error.strerror})") from None
        self._log.warning("alarm by the operator", source=name, active=active, reason=reason if active else None)
        for peer in self.config.peer:
            self._spawn(partial(self._ask_source, peer))
        return {}

    # hooks of the packet path

    def on_handshake(self, datagram: bytes, address: Address) -> None:
        with self._contained():
            self._handshake(datagram, address)

    def on_control(self, peer: str, receive_index: int, payload: bytes, address: Address) -> None:
        with self._contained():
            agent = self.agents[peer]
            agent.count(agent.control(receive_index, payload, address))

    def on_first_record(self, peer: str, receive_index: int, address: Address) -> None:
        with self._contained():
            self.agents[peer].first_record(receive_index, address)
            self._lanes.usable(peer, receive_index)

    def on_new_address(self, peer: str, receive_index: int, address: Address) -> None:
        with self._contained():
            self.agents[peer].new_address(receive_index, address)

    def on_limit(self, peer: str, receive_index: int) -> None:
        with self._contained():
            self.agents[peer].limit(receive_index)

    def on_tun_gone(self) -> None:
        self.failure = f"interface {self._tun.name} was deleted by somebody, so no packet can pass any more"
        self._log.error("stopping", reason=self.failure)
        self.stop_wanted.set()

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        """A mistake in control must not stop the packets of other peers that wait behind it."""
        try:
            yield
        except Exception as error:
            self._log.error("internal error", **describe(error))

    def _handshake(self, datagram: bytes, address: Address) -> None:
        verdict = self._gate.receive(datagram, address, self._clock())
        if isinstance(verdict, Complete):
            agent = self.agents[verdict.peer]
            if not agent.carriers.allows(address):
                agent.count(DropReason.HANDSHAKE_CARRIER)
                return
            agent.count(agent.received(verdict.message_type, verdict.message, verdict.carrier))
        elif isinstance(verdict, Reply):
            self._plane.send_handshake([verdict.datagram], address)
        elif isinstance(verdict, Dropped):
            self._count(verdict.peer, verdict.reason)

    def _count(self, peer: str | None, reason: DropReason) -> None:
        if peer is None:
            self._drops.count(reason)
        else:
            self.agents[peer].count(reason)

    # status

    def snapshot(self) -> SiteView:
        """Everything that ``qvpn status`` shows."""
        now = self._clock()
        return SiteView(
            site=self.config.site.name,
            pid=os.getpid(),
            version=__version__,
            uptime=now - self._started,
            fingerprint=self.site.identity.public.readable,
            listen=str(self._bind.local),
            interface=self._tun.name,
            mtu=self._tun.mtu,
            peers=tuple(
                peer_view(agent, self.site.peers[name], self._plane.stats(name), self._lanes.traffic(name), now)
                for name, agent in self.agents.items()
            ),
            key_sources=tuple(source_view(keeper, self._rekeys(name)) for name, keeper in self._keepers.items()),
            drops=summed(self._plane.drops.nonzero(), self._drops.nonzero(), self._lanes.drops),
            send_errors=summed(self._bind.errors, self._lanes.send_errors),
            lanes=tuple(lane_view(state) for state in self._lanes.states()),
            queues=dataclasses.asdict(self._plane.queues),
            carriers={name: counts for name, each in self._transports.items() if (counts := each.counts())},
        )


def _needs_key(peer: Peer) -> bool:
    """Whether only a key of the source can make an epoch of this peer acceptable."""
    return peer.policy is Policy.REQUIRE_QKD and peer.max_qkd_age is None
