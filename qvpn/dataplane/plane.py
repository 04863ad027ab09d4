"""The packet path as one object: TUN and network joined by peers' epochs, driven by the event loop.

Control (the agent) adds peers, installs and erases epochs, sets endpoints and hears of what it must act on through
:class:`~qvpn.dataplane.hooks.PlaneHooks`.  The plane decides nothing about policy: without an epoch nothing passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from qvpn.dataplane.arrivals import Arrivals
from qvpn.dataplane.hooks import PlaneHooks
from qvpn.dataplane.inbound import Inbound
from qvpn.dataplane.loop import add_reader, remove_reader
from qvpn.dataplane.outbound import Outbound
from qvpn.dataplane.peers import Peer, PeerTable
from qvpn.dataplane.stats import PeerTraffic, QueueStatus
from qvpn.netio.base import VNET_HEADER, Address, Bind, Tun
from qvpn.tunnel.allowedips import IPNetwork
from qvpn.tunnel.drops import DropReason, Drops
from qvpn.tunnel.epoch import Epoch
from qvpn.tunnel.keys import EpochKeys
from qvpn.tunnel.records import LIMITS, OVERHEAD, Limits, Refused

RECEIVE_LIMIT = 16
"""Receives per callback, the halves of a superpacket counted apart: then the other direction has its turn."""

QUIET = 20e-6
"""Seconds without work after which a packet most often comes alone: nobody looks for a second one behind it.

If there is one, its descriptor is still readable, and then there was no such pause.
"""

AT_ONCE = 2
"""Receives, each a superpacket or half of one, before the first of them is opened."""

TICK = 1.0
"""Seconds between two looks at the clock while no epoch ends earlier."""

MAX_TUNNEL_MTU = 65_535 - VNET_HEADER


def tunnel_mtu(max_payload: int) -> int:
    """MTU of the tunnel over a path whose datagrams carry ``max_payload`` bytes (``Bind.max_payload``)."""
    return min(max_payload - OVERHEAD - VNET_HEADER, MAX_TUNNEL_MTU)


def payload_for(mtu: int) -> int:
    """UDP payload of a datagram that carries one packet of a tunnel with this MTU."""
    return mtu + VNET_HEADER + OVERHEAD


class Plane:
    """One TUN, one bind, any number of peers.  All methods belong to the event loop's thread."""

    def __init__(
        self,
        tun: Tun,
        bind: Bind,
        clock: Callable[[], float],
        hooks: PlaneHooks,
        *,
        limits: Limits = LIMITS,
        detour: Callable[[memoryview], bool] | None = None,
    ) -> None:
        """``clock`` gives seconds of the daemon's clock (CLOCK_BOOTTIME), the one of ``EpochKeys.hard_end``.

        ``detour`` may take packets that cannot be sealed here now (:class:`~qvpn.dataplane.outbound.Outbound`).
        """
        self._tun = tun
        self._bind = bind
        self._clock = clock
        self._hooks = hooks
        self._table = PeerTable(limits)
        self._inbound = Inbound(self._table, tun, hooks, bind.connect)
        self._outbound = Outbound(self._table, tun, bind, hooks, detour)
        self._inlets: dict[int, Tun] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._behind: asyncio.Handle | None = None
        """Of the next turn of the TUN, while packets of it wait that were read."""
        self._arrivals = Arrivals(bind)
        self._watched: set[int] = set()
        self._has_tun = False
        self._closed = False
        self._worked = float("-inf")
        """When packets were handled last."""
        self._pause = float("inf")
        """As :data:`QUIET`, where there are descriptors."""

    # peers

    def add_peer(self, peer: str, allowed_ips: Sequence[IPNetwork], *, overlap: float) -> None:
        """``overlap`` in seconds.  Raises ValueError if the name or a prefix is taken."""
        self._table.add(peer, allowed_ips, overlap)

    def set_endpoint(self, peer: str, address: Address | None) -> None:
        """Where the peer's records go from now on; None: nowhere.

        Raises KeyError if there is no such peer, as all methods below.
        """
        known = self._table[peer]
        old = known.endpoint
        if old == address:
            return
        known.set_endpoint(address)
        if old is not None and not any(other.endpoint == old for other in self._table):
            self._bind.disconnect(old)
            self._take_back({old: known})
        if address is not None:
            self._bind.connect(address)
        known.measure_path(self._bind)

    # epochs

    def install(self, peer: str, keys: EpochKeys) -> None:
        """Open records under these keys from now on; the initiator seals under them at once.

        Raises ValueError if the receive index is in use.
        """
        self._table.install(self._table[peer], keys, self._clock())

    def hold(self, peer: str, receive_index: int) -> None:
        """Never seal under this epoch again; it is erased after one overlap."""
        self._table[peer].epochs.hold(receive_index, self._clock())

    def erase(self, peer: str, receive_index: int) -> None:
        """Erase one epoch now; nothing happens if it is gone."""
        self._table.erase(self._table[peer], receive_index)

    def erase_all(self, peer: str) -> None:
        """Erase all epochs of a peer now: nothing passes until the next :meth:`install`."""
        self._table.erase_all(self._table[peer])

    # control

    def send_control(
        self, peer: str, payload: bytes, *, receive_index: int | None = None, address: Address | None = None
    ) -> bool:
        """Send a control record under the epoch that seals, or under that with our ``receive_index``.

        ``address`` (default: the endpoint) is for probes.  False, and counted, if it could not be sent.
        """
        known, now = self._table[peer], self._clock()
        epoch = self._control_epoch(known, receive_index, now)
        target = address or known.endpoint
        if epoch is None or target is None:
            known.drops.count(DropReason.NO_KEY if epoch is None else DropReason.NO_ENDPOINT)
            return False
        try:
            record = epoch.sealer.seal_control(payload)
        except Refused as refused:
            known.drops.count(refused.reason)
            return False
        send = self._bind.send_batch if len(payload) <= known.max_plaintext else self._bind.send_fragmentable
        if not send([memoryview(record)], target):
            known.drops.count(DropReason.SEND_FAILED)
            return False
        known.last_sent = now
        return True

    def send_handshake(self, datagrams: Sequence[bytes], address: Address) -> None:
        """Send cold handshake datagrams as they are.  Nothing is known of the path then, so it may cut them."""
        self._bind.send_fragmentable([memoryview(datagram) for datagram in datagrams], address)

    def _control_epoch(self, peer: Peer, receive_index: int | None, now: float) -> Epoch | None:
        if receive_index is None:
            return self._table.sending(peer, now)
        epoch = peer.epochs.get(receive_index)
        return epoch if epoch is not None and now < epoch.ends else None

    # the path's MTU

    def link_payload(self, peer: str) -> int | None:
        """Bytes that one datagram to the peer's endpoint can have on its first link; None without endpoint."""
        endpoint = self._table[peer].endpoint
        return None if endpoint is None else self._bind.max_payload(endpoint)

    def set_path(self, peer: str, payload: int, *, provisional: bool) -> None:
        """From now on datagrams with packets to this peer have at most ``payload`` bytes.

        ``provisional``: that may change within seconds, so no sender is told yet.
        """
        known = self._table[peer]
        known.path_payload, known.provisional = payload, provisional
        known.measure_path(self._bind)

    def sent_records(self, peer: str) -> int:
        """Data records ever sent to the peer."""
        return self._table[peer].sent_records

    def send_probe(self, peer: str, payload: bytes) -> bool:
        """Send a control record that may be too long for the path, which no drop counter hears of.

        False if there is nothing to send it under or to, or if it was refused.
        """
        known, now = self._table[peer], self._clock()
        epoch = self._table.sending(known, now)
        if epoch is None or known.endpoint is None:
            return False
        try:
            record = epoch.sealer.seal_control(payload)
        except Refused:
            return False
        return bool(self._bind.send_batch([memoryview(record)], known.endpoint))

    # what happened

    def stats(self, peer: str) -> PeerTraffic:
        """A snapshot of one peer."""
        self._take_back()
        known = self._table[peer]
        waiting = (0, 0) if known.endpoint is None else self._bind.waiting(known.endpoint)
        return known.traffic(self._clock(), waiting)

    def _take_back(self, formerly: Mapping[Address, Peer] | None = None) -> None:
        """Count what a transport took and then dropped.  ``formerly``: whose address was changed just now."""
        for address, records, size in self._bind.unsent():
            owner = (formerly or {}).get(address)
            for peer in self._table if owner is None else ():
                if peer.endpoint == address:
                    owner = peer
                    break
            if owner is not None:
                owner.count_unsent(records, size)
            else:
                self._table.drops.count(DropReason.CARRIER_QUEUE, records)

    @property
    def queues(self) -> QueueStatus:
        """What waits in front of the packet path, and what was done about it."""
        queue, arrivals = self._outbound.waiting, self._arrivals
        return QueueStatus(
            packets=queue.packets,
            bytes=queue.size,
            flows=queue.flows,
            longest=queue.longest,
            marked=queue.marked,
            received_longest=arrivals.longest,
            received_marked=arrivals.marked,
        )

    @property
    def drops(self) -> Drops:
        """What cannot be charged to a peer: unknown index, no route, broken headers."""
        return self._table.drops

    # the loop

    def start(self) -> None:
        """Begin to move packets.  Descriptors are watched by the running loop; twins call back by themselves."""
        if self._tun.fileno() >= 0 or self._bind.filenos():
            self._loop = asyncio.get_running_loop()
            self._has_tun = self._tun.fileno() >= 0
            self._bind.on_filenos(self._watch)
            self._pause = QUIET
            self._watch()
            self._arm()
        self._bind.on_readable(self._on_network)
        self._tun.on_readable(self._on_tun)

    def close(self) -> None:
        """Stop, and erase every key.  TUN and bind stay open: they are their opener's.  May be called twice."""
        self._closed = True
        self._tun.on_readable(None)
        self._bind.on_readable(None)
        self._bind.on_filenos(None)
        for handle in (self._timer, self._behind):
            if handle is not None:
                handle.cancel()
        self._watch()
        for inlet in tuple(self._inlets.values()):
            self.remove_inlet(inlet)
        for peer in self._table:
            self._table.erase_all(peer)

    def tick(self) -> None:
        """Erase epochs whose time is over, and look at the route's MTU again.

        The running loop does it by itself; virtual time must be told.
        """
        now = self._clock()
        for peer in self._table:
            self._table.expire(peer, now)
            if peer.endpoint is not None:
                # A socket whose route went away may find one again, and a transport hears by which way records come.
                self._bind.connect(peer.heard or peer.endpoint)
            peer.measure_path(self._bind)
        self._take_back()
        self._arrivals.settle()

    def add_inlet(self, inlet: Tun) -> None:
        """Take packets from there too, as if they came from the TUN.  After :meth:`start`."""
        if self._loop is None or self._closed:
            return
        outbound = Outbound(self._table, inlet, self._bind, self._hooks, answers=self._tun)
        loop, descriptor = self._loop, inlet.fileno()
        self._inlets[descriptor] = inlet

        def pump(_: int = -1) -> None:
            if self._inlets.get(descriptor) is not inlet:
                return
            waited = outbound.waiting.packets
            outbound.pump(self._clock())
            if outbound.waiting.packets and not waited:  # no descriptor will tell of it
                loop.call_soon(go_on)

        def go_on() -> None:
            if self._inlets.get(descriptor) is inlet:
                outbound.pump(self._clock())
                if outbound.waiting.packets:
                    loop.call_soon(go_on)

        add_reader(loop, descriptor, pump)

    def remove_inlet(self, inlet: Tun) -> None:
        """Undo :meth:`add_inlet`, before the inlet is closed."""
        if self._inlets.pop(inlet.fileno(), None) is not None and self._loop is not None:
            remove_reader(self._loop, inlet.fileno())

    def _on_tun(self, _: int = -1) -> None:
        if self._behind is not None:
            return  # what waits in the TUN has its turn with what was read before
        now, outbound = self._clock(), self._outbound
        waiting = outbound.waiting
        quiet = not waiting.packets and now - self._worked > self._pause
        count = outbound.pump_one(now) if quiet else outbound.pump(now)
        if waiting.packets:
            self._catch_up()
        elif not count and self._tun.fileno() < 0:
            self._check_tun()
        self._worked = self._clock()

    def _catch_up(self) -> None:
        """A turn did not empty the TUN, and the rest is ours already: no descriptor will tell of it."""
        if self._loop is not None:
            self._behind = self._loop.call_soon(self._go_on)
            return
        while self._outbound.waiting.packets:
            self._outbound.pump(self._clock())

    def _go_on(self) -> None:
        """The next turn, after the network had one."""
        self._behind = None
        if not self._closed:
            self._on_tun()

    def _check_tun(self) -> None:
        """Tell once that the inner device is gone; a twin never had a descriptor to lose."""
        if self._has_tun and not self._closed and self._tun.fileno() < 0:
            self._has_tun = False
            self._watch()
            self._hooks.on_tun_gone()

    def _on_network(self, descriptor: int = -1) -> None:
        """Few receives at a time, so that what one brought is still in the processor's cache when it is opened."""
        now, inbound, receive = self._clock(), self._inbound, self._bind.receive_batch
        if now - self._worked > self._pause:
            for each in receive(1, descriptor):
                if each.waited:
                    self._arrivals.look(descriptor, each, now)
                inbound.process(each, now)
            if not inbound.pending:
                self._worked = self._clock()
                return
        left = RECEIVE_LIMIT
        while left > 0:
            received = receive(AT_ONCE, descriptor)
            for each in received:
                left -= 2 if each.joined else 1
                if each.waited:
                    self._arrivals.look(descriptor, each, now)
                inbound.process(each, now)
            if len(received) < AT_ONCE:
                if self._arrivals.watched:
                    self._arrivals.emptied(descriptor)
                break
        else:
            self._arrivals.behind(descriptor)
        inbound.flush()
        self._worked = self._clock()

    def _watch(self) -> None:
        """Watch exactly the descriptors that are open now."""
        if self._loop is None:
            return
        network = set() if self._closed else set(self._bind.filenos())
        tun = set() if self._closed or self._tun.fileno() < 0 else {self._tun.fileno()}
        for gone in self._watched - network - tun:
            remove_reader(self._loop, gone)
            self._arrivals.forget(gone)
        for descriptor in network - self._watched:
            add_reader(self._loop, descriptor, self._on_network)
        for descriptor in tun - self._watched:
            add_reader(self._loop, descriptor, self._on_tun)
        self._watched = network | tun

    def _arm(self) -> None:
        if self._loop is None or self._closed:
            return
        self.tick()
        self._check_tun()
        end = self._table.next_end()
        wait = TICK if end is None else min(TICK, max(0.0, end - self._clock()))
        self._timer = self._loop.call_later(wait, self._arm)
