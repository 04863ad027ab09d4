"""All lanes beside lane 0, as the daemon sees them: epochs are dealt out to them, counters come back.

:class:`LanedPlane` stands where control expects the packet path: what it is told, lane 0's plane does, and each
lane's process is told as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qvpn.dataplane.plane import Plane
from qvpn.lanes.counts import add, summed
from qvpn.lanes.keeper import LaneKeeper, LaneKit
from qvpn.lanes.messages import (
    Endpoint,
    Erase,
    Hold,
    Install,
    LaneTraffic,
    Message,
    PathSize,
    PeerSetup,
    Setup,
    Usable,
)
from qvpn.netio.base import Address
from qvpn.netio.errors import NetioError
from qvpn.tunnel.keys import EpochKeys

START_PATIENCE = 5.0
"""Seconds that the first epochs wait for the processes."""


@dataclass(frozen=True, slots=True)
class LaneState:
    """One lane's process, for status."""

    number: int
    port: int
    pid: int | None
    up: bool
    attached: bool
    """The kernel gives packets to its queue."""
    restarts: int
    reason: str
    """How its process ended the last time."""


@dataclass(slots=True)
class _Given:
    """The newest epoch of a peer, and which lanes' processes have keys of it."""

    receive_index: int
    lanes: int
    to: set[int]


class Lanes:
    """The lanes 1 and up of one site."""

    def __init__(
        self,
        kits: Sequence[LaneKit],
        peers: Sequence[PeerSetup],
        plane: Plane,
        log: Any,
        *,
        want_epoch: Callable[[str], None],
        limit: Callable[[str, int], None],
    ) -> None:
        """``want_epoch(peer)``: a lane has no key of the newest epoch.  ``limit(peer, index)``: one is used up."""
        self._plane = plane
        self._log = log
        self._want_epoch = want_epoch
        self._limit = limit
        self._keepers = {
            kit.number: LaneKeeper(kit, Setup(kit.number, tuple(peers)), log, self._changed) for kit in kits
        }
        self._given: dict[str, _Given] = {}
        self._endpoints: dict[str, Address] = {}
        self._sizes: dict[str, PathSize] = {}
        self._was_up: set[int] = set()
        self._attached: set[int] = set()
        self._before: dict[int, dict[str, LaneTraffic]] = {number: {} for number in self._keepers}
        """What processes that are gone have counted."""
        self._drops_before: dict[str, int] = {}
        self._errors_before: dict[str, int] = {}
        self._all_up = asyncio.Event()

    # life

    async def start(self) -> None:
        """Start the processes; returns when all are up, or after a while without those that are not."""
        if not self._keepers:
            return
        for keeper in self._keepers.values():
            keeper.start()
        try:
            async with asyncio.timeout(START_PATIENCE):
                await self._all_up.wait()
        except TimeoutError:
            self._log.warning("not every lane has started", lanes=[k for k in self._keepers if k not in self._was_up])

    async def aclose(self) -> None:
        """End the processes; their keys end with them.  May be called twice."""
        await asyncio.gather(*(keeper.aclose() for keeper in self._keepers.values()))

    # what control tells the packet path

    def set_endpoint(self, peer: str, address: Address | None) -> None:
        """Where lane 0 is: the others are at the ports above it, until they show that they are elsewhere."""
        if address is None:
            self._endpoints.pop(peer, None)
        else:
            self._endpoints[peer] = address
        for number in self._keepers:
            self._tell(number, Endpoint(peer, lane_address(address, number)))

    def set_path(self, size: PathSize) -> None:
        """What the path carries, as lane 0 found: the lanes' datagrams take the same one."""
        self._sizes[size.peer] = size
        for number in self._keepers:
            self._tell(number, size)

    def sent_records(self, peer: str) -> int:
        """Data records that the lanes sent, as far as they have reported."""
        return sum(traffic.sent_records for traffic in self.traffic(peer).values())

    def install(self, peer: str, keys: EpochKeys) -> None:
        """Give each lane that both sides have its keys of a new epoch, if its process is there to take them."""
        given = self._given[peer] = _Given(keys.receive_index, keys.lanes, set())
        for number, keeper in self._keepers.items():
            if number < keys.lanes and keeper.up:
                given.to.add(number)
                keeper.tell(_install(peer, keys, number))

    def usable(self, peer: str, receive_index: int) -> None:
        """The first record of an epoch has verified on lane 0."""
        for number in self._keepers:
            self._tell(number, Usable(peer, receive_index | number))

    def hold(self, peer: str, receive_index: int) -> None:
        for number in self._keepers:
            self._tell(number, Hold(peer, receive_index | number))

    def erase(self, peer: str, receive_index: int) -> None:
        for number in self._keepers:
            self._tell(number, Erase(peer, receive_index | number))

    def erase_all(self, peer: str) -> None:
        self._given.pop(peer, None)
        for number in self._keepers:
            self._tell(number, Erase(peer, None))

    def _tell(self, number: int, message: Message) -> None:
        keeper = self._keepers[number]
        if keeper.up:
            keeper.tell(message)

    # what the processes say

    def _changed(self, keeper: LaneKeeper) -> None:
        number = keeper.kit.number
        if keeper.up and number not in self._was_up:
            self._came(keeper)
        elif not keeper.up and number in self._was_up:
            self._went(keeper)
        self._switch(keeper)
        for peer, index in keeper.report.limits if keeper.up else ():
            self._limit(peer, index & ~0xF)

    def _came(self, keeper: LaneKeeper) -> None:
        """A process is there: it gets no key of an epoch that another one may have had."""
        number = keeper.kit.number
        self._was_up.add(number)
        if len(self._was_up) == len(self._keepers):
            self._all_up.set()
        if keeper.inlet is not None:
            self._plane.add_inlet(keeper.inlet)
        self._log.info("lane is up", lane=number, pid=keeper.pid, port=keeper.kit.port)
        for peer, address in self._endpoints.items():
            self._tell(number, Endpoint(peer, lane_address(address, number)))
        for size in self._sizes.values():
            self._tell(number, size)
        for peer, given in tuple(self._given.items()):
            if number < given.lanes and number not in given.to:
                self._want_epoch(peer)

    def _went(self, keeper: LaneKeeper) -> None:
        number = keeper.kit.number
        self._was_up.discard(number)
        if keeper.inlet is not None:
            self._plane.remove_inlet(keeper.inlet)
        for given in self._given.values():
            given.to.discard(number)
        before = self._before[number]
        for peer, traffic in keeper.report.peers.items():
            before[peer] = add(before.get(peer, LaneTraffic()), replace(traffic, up=False, endpoint=None))
        self._drops_before = summed(self._drops_before, keeper.report.drops)
        self._errors_before = summed(self._errors_before, keeper.report.send_errors)
        keeper.report = replace(keeper.report, peers={}, drops={}, send_errors={}, limits=())

    def _switch(self, keeper: LaneKeeper) -> None:
        """The kernel shall give packets only to a queue whose lane can send to somebody."""
        number = keeper.kit.number
        wanted = keeper.up and any(traffic.up for traffic in keeper.report.peers.values())
        if wanted == (number in self._attached):
            return
        try:
            keeper.kit.queue.attach() if wanted else keeper.kit.queue.detach()
        except NetioError as error:
            self._log.error("a lane's queue cannot be switched", lane=number, reason=str(error))
            return
        (self._attached.add if wanted else self._attached.discard)(number)

    # what happened

    def states(self) -> tuple[LaneState, ...]:
        return tuple(
            LaneState(
                number=number,
                port=keeper.kit.port,
                pid=keeper.pid,
                up=keeper.up,
                attached=number in self._attached,
                restarts=keeper.restarts,
                reason=keeper.last_words,
            )
            for number, keeper in self._keepers.items()
        )

    def traffic(self, peer: str) -> dict[int, LaneTraffic]:
        """What each lane counted for a peer, over all its processes; of one that is gone, up to its last report."""
        return {
            number: add(self._before[number].get(peer, LaneTraffic()), keeper.report.peers.get(peer, LaneTraffic()))
            for number, keeper in self._keepers.items()
        }

    @property
    def drops(self) -> dict[str, int]:
        """What the lanes dropped and cannot charge to a peer."""
        return summed(self._drops_before, *(keeper.report.drops for keeper in self._keepers.values()))

    @property
    def send_errors(self) -> dict[str, int]:
        return summed(self._errors_before, *(keeper.report.send_errors for keeper in self._keepers.values()))


class LanedPlane:
    """Lane 0's plane, and the others told of the same."""

    def __init__(self, plane: Plane, lanes: Lanes) -> None:
        self._plane = plane
        self._lanes = lanes
        self.send_control = plane.send_control
        self.send_handshake = plane.send_handshake
        self.send_probe = plane.send_probe
        self.link_payload = plane.link_payload

    def set_endpoint(self, peer: str, address: Address | None) -> None:
        self._plane.set_endpoint(peer, address)
        self._lanes.set_endpoint(peer, address)

    def set_path(self, peer: str, payload: int, *, provisional: bool) -> None:
        self._plane.set_path(peer, payload, provisional=provisional)
        self._lanes.set_path(PathSize(peer, payload, provisional))

    def sent_records(self, peer: str) -> int:
        return self._plane.sent_records(peer) + self._lanes.sent_records(peer)

    def install(self, peer: str, keys: EpochKeys) -> None:
        self._plane.install(peer, keys)
        self._lanes.install(peer, keys)

    def hold(self, peer: str, receive_index: int) -> None:
        self._plane.hold(peer, receive_index)
        self._lanes.hold(peer, receive_index)

    def erase(self, peer: str, receive_index: int) -> None:
        self._plane.erase(peer, receive_index)
        self._lanes.erase(peer, receive_index)

    def erase_all(self, peer: str) -> None:
        self._plane.erase_all(peer)
        self._lanes.erase_all(peer)


def lane_address(address: Address | None, lane: int) -> Address | None:
    """Where a lane is first looked for: at lane 0's port plus its number; None beyond the last port."""
    if address is None or address.port + lane > 65_535:
        return None
    return replace(address, port=address.port + lane)


def _install(peer: str, keys: EpochKeys, lane: int) -> Install:
    return Install(
        peer=peer,
        number=keys.number,
        receive_index=keys.receive_index | lane,
        send_index=keys.send_index | lane,
        cipher=keys.cipher,
        state=keys.state,
        hard_end=keys.hard_end,
        usable=keys.initiator,
        send_key=keys.send_key(lane),
        receive_key=keys.receive_key(lane),
    )
