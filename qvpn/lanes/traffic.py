"""One lane's packet path: a plane of its own, told by messages what to do.  No process, no socket of its own.

It is the :class:`~qvpn.dataplane.plane.Plane` of the daemon with another TUN queue, another port and other keys.
The lane's number is in the indexes already, so that the plane need not know of lanes.
"""

from __future__ import annotations

from collections.abc import Callable

from qvpn.dataplane.plane import Plane
from qvpn.lanes.counts import lane_traffic, summed
from qvpn.lanes.messages import (
    Endpoint,
    Erase,
    Hold,
    Install,
    LaneTraffic,
    Message,
    PathSize,
    Report,
    Setup,
    Usable,
)
from qvpn.lanes.paths import LanePath
from qvpn.netio.base import Address, Bind, Tun
from qvpn.tunnel.drops import DropReason, Drops
from qvpn.tunnel.epoch import EpochRole
from qvpn.tunnel.keys import EpochKeys


class LaneTrafficPath:
    """The packets of one lane."""

    def __init__(
        self,
        setup: Setup,
        tun: Tun,
        bind: Bind,
        outlet: Callable[[memoryview], bool],
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
    ) -> None:
        """``outlet`` takes frames that this lane cannot send (:mod:`qvpn.lanes.relay`); False: there is no room."""
        self._clock = clock
        self._bind = bind
        self.plane = Plane(tun, bind, clock, self, detour=outlet)
        self.tun_gone = False
        self._drops = Drops()
        self._limits: list[tuple[str, int]] = []
        self._paths: dict[str, LanePath] = {}
        self._up: dict[str, bool] = {}
        self.changed = False
        """The daemon should hear of something now."""
        self.wake: Callable[[], None] = lambda: None
        """Called when :meth:`look` should be called soon."""
        for peer in setup.peers:
            self.plane.add_peer(peer.name, peer.allowed_ips, overlap=peer.overlap)
            self._paths[peer.name] = LanePath(peer.keepalive, random)

    # orders

    def obey(self, message: Message) -> None:
        """Carry out what the daemon says.  Raises KeyError or ValueError where it cannot be meant."""
        now = self._clock()
        match message:
            case Install():
                self._install(message, now)
            case Usable():
                self._paths[message.peer].usable(message.receive_index, now)
            case Hold():
                self.plane.hold(message.peer, message.receive_index)
                self._paths[message.peer].erase(message.receive_index)
            case Erase():
                self._erase(message)
            case Endpoint():
                self._paths[message.peer].guess(message.address, now)
            case PathSize():
                self.plane.set_path(message.peer, message.payload, provisional=message.provisional)
            case _:
                raise ValueError(f"a lane cannot be told {type(message).__name__}")
        self._settle(message.peer)

    def _install(self, message: Install, now: float) -> None:
        send_key, receive_key = message.send_key, message.receive_key
        keys = EpochKeys(
            number=message.number,
            receive_index=message.receive_index,
            send_index=message.send_index,
            cipher=message.cipher,
            state=message.state,
            hard_end=message.hard_end,
            # Packets leave only after a record of the peer has verified: its lane might not have the epoch yet.
            initiator=False,
            send_key=lambda _: send_key,
            receive_key=lambda _: receive_key,
        )
        self.plane.install(message.peer, keys)
        path = self._paths[message.peer]
        path.install(message.receive_index)
        if message.usable:
            path.usable(message.receive_index, now)

    def _erase(self, message: Erase) -> None:
        if message.receive_index is None:
            self.plane.erase_all(message.peer)
        else:
            self.plane.erase(message.peer, message.receive_index)
        self._paths[message.peer].erase(message.receive_index)

    # hooks of the plane

    def on_handshake(self, datagram: bytes, address: Address) -> None:
        """Handshakes are lane 0's."""
        self._drops.count(DropReason.HANDSHAKE_STATE)

    def on_control(self, peer: str, receive_index: int, payload: bytes, address: Address) -> None:
        if not payload or not self._paths[peer].control(receive_index, payload, address, self._clock()):
            self._drops.count(DropReason.CONTROL_MALFORMED)
        self._settle(peer)
        self.wake()

    def on_first_record(self, peer: str, receive_index: int, address: Address) -> None:
        self._paths[peer].first_record(receive_index, self._clock())
        self._settle(peer)
        self.wake()

    def on_new_address(self, peer: str, receive_index: int, address: Address) -> None:
        self._paths[peer].new_address(receive_index, address, self._clock())
        self._settle(peer)

    def on_limit(self, peer: str, receive_index: int) -> None:
        self._limits.append((peer, receive_index))
        self.changed = True
        self.wake()

    def on_tun_gone(self) -> None:
        self.tun_gone = self.changed = True
        self.wake()

    # time

    def look(self) -> float:
        """Timers of the paths; returns when to call again, at most a second from now."""
        now = self._clock()
        due = now + 1.0
        for name, path in self._paths.items():
            self._settle(name)
            timer = path.next_timer()
            if timer is not None:
                due = min(due, max(timer, now + 0.01))
        return due

    def look_back(self) -> None:
        """Once a second: which epochs still live, and whether anything comes back."""
        now = self._clock()
        for name, path in self._paths.items():
            stats = self.plane.stats(name)
            path.alive({epoch.receive_index for epoch in stats.epochs if now < epoch.hard_end})
            path.look(now, stats.last_received, stats.sent_records)
            self._settle(name)

    def _settle(self, peer: str) -> None:
        """Send what the path wants to say, and send packets where it has been proved."""
        path = self._paths[peer]
        path.handle_timer(self._clock())
        for send in path.take():
            self.plane.send_control(peer, send.payload, receive_index=send.receive_index, address=send.address)
        self.plane.set_endpoint(peer, path.endpoint)
        up = self._is_up(peer)
        if up != self._up.get(peer, False):
            self._up[peer] = up
            self.changed = True

    def _is_up(self, peer: str) -> bool:
        stats, now = self.plane.stats(peer), self._clock()
        current = any(epoch.role is EpochRole.CURRENT and now < epoch.hard_end for epoch in stats.epochs)
        return current and self._paths[peer].endpoint is not None

    # what happened

    def report(self) -> Report:
        """How it stands; limits are told once."""
        limits, self._limits, self.changed = tuple(self._limits), [], False
        drops = summed(self.plane.drops.nonzero(), self._drops.nonzero())
        return Report({name: self._traffic(name) for name in self._paths}, drops, self._bind.errors, limits)

    def not_told(self, report: Report) -> None:
        """This report did not reach the daemon: its limits are in the next one, for nobody else sees them."""
        self._limits[:0] = report.limits

    def _traffic(self, peer: str) -> LaneTraffic:
        return lane_traffic(self.plane.stats(peer), up=self._is_up(peer))
