"""Drives one peer: the handshake machine's events become calls of the packet path and the key feed, and back.

A thin shell.  It decides nothing about the protocol; its own are the one timer, the endpoint (names, roaming by
PROBE) and the facts for status.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from qvpn.config.schema import OnAlarm, Peer
from qvpn.control.carriers import CarrierChoice, Move
from qvpn.control.keyfeed import KeyFeed
from qvpn.control.mistakes import describe
from qvpn.control.pathprobe import PathPort, PathProber
from qvpn.control.record import PeerRecord
from qvpn.handshake import events
from qvpn.handshake.carrier import Carrier
from qvpn.handshake.machine import PeerHandshake
from qvpn.handshake.parameters import KeyFault, KeyMaterial
from qvpn.netio.base import Address
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import EpochKeys
from qvpn.wire.messages import ControlType, MessageType

_PROBE_BYTES = 8
PROBE_LIFE = 3.0
"""Seconds in which a probe must be answered.  The packet path reports one new address a second, so few are open."""
_NO_FAULT = frozenset({events.Failure.YIELDED, events.Failure.STOPPED})
"""Attempts end so when both sides start at once, and when one stops in order."""

AFTER_ERROR = 1.0
LATE = 60.0
"""Longest sleep of the timer: the clock that counts is CLOCK_BOOTTIME, and the loop's stands still in a suspend."""


class PlanePort(PathPort, Protocol):
    """What an agent needs of the packet path."""

    def set_endpoint(self, peer: str, address: Address | None) -> None: ...

    def install(self, peer: str, keys: EpochKeys) -> None: ...

    def hold(self, peer: str, receive_index: int) -> None: ...

    def erase(self, peer: str, receive_index: int) -> None: ...

    def erase_all(self, peer: str) -> None: ...

    def send_control(
        self, peer: str, payload: bytes, *, receive_index: int | None = None, address: Address | None = None
    ) -> bool: ...

    def send_handshake(self, datagrams: Sequence[bytes], address: Address) -> None: ...


class PeerAgent:
    """One peer's control.  Belongs to the event loop's thread."""

    def __init__(
        self,
        peer: Peer,
        machine: PeerHandshake,
        plane: PlanePort,
        clock: Callable[[], float],
        log: Any,
        *,
        traffic: Callable[[], tuple[float | None, float | None]],
        moved: Callable[[Address], None] = lambda address: None,
        resized: Callable[[], None] = lambda: None,
        most: int | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """``traffic()``: when the newest record of the epoch that is sent on verified, and when the newest left.

        ``moved(address)`` is told each new endpoint, ``resized()`` that the path to it carries more or less than it
        did.  ``most``: no datagram need be longer, in bytes of UDP payload.
        """
        self.peer = peer
        self.machine = machine
        self.record = PeerRecord()
        self.feed: KeyFeed | None = None
        self.endpoint: Address | None = None
        self.carriers = CarrierChoice(peer.transport)
        self.candidates: tuple[Address, ...] = ()
        """Where the configuration says that the peer may be, the preferred transport first."""
        self._plane = plane
        self._clock = clock
        self.log = log
        self._traffic = traffic
        self._moved = moved
        self.path = PathProber(peer.name, plane, clock, log, most=most, settled=resized)
        self._random = random
        self._probes: dict[Address, tuple[bytes, int, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False
        self._stopped = False
        self._waits = False
        self._unanswered: int | None = None
        self._agreed_cold: set[int] = set()
        """Unconfirmed epochs that we agreed as responder from outside: their first record tells where the peer is."""
        self._actions: dict[type, Callable[[Any], None]] = {
            events.SendCold: self._send_cold,
            events.SendInner: self._send_inner,
            events.NeedKey: self._need_key,
            events.Install: self._install,
            events.Hold: self._hold,
            events.Erase: self._erase,
            events.Confirmed: self._confirmed,
            events.AttemptFailed: self._failed,
            events.Alarm: self._alarm,
            events.ChainBroken: self._chain_broken,
            events.Dropped: self._dropped,
        }

    # orders

    def start(self, *, wait_for_source: bool = False) -> None:
        """Begin; with an endpoint a handshake starts at once.

        ``wait_for_source``: not before the key source is ready, for without a key nothing would come of it.  The
        peer's handshakes are answered all the same.
        """
        self._waits = wait_for_source and not (self.feed is not None and self.feed.status.ready)
        if not self._waits:
            self.machine.start(self._clock())
        self.pump()

    def stop(self) -> None:
        """Tell the peer, erase every key.  May be called twice."""
        if self._stopped:
            return
        self.machine.stop(self._clock())
        self.pump()
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self.path.stop()
        self._plane.erase_all(self.peer.name)

    def set_endpoint(self, address: Address) -> None:
        """The peer is to be reached there from now on."""
        if address == self.endpoint:
            return
        before = str(self.endpoint) if self.endpoint else None
        if self.endpoint is not None and self.endpoint.carrier != address.carrier:
            self.record.carrier_changes += 1
        self.log.info("endpoint", address=str(address), by=address.carrier, before=before)
        self.endpoint = address
        self._plane.set_endpoint(self.peer.name, address)
        self.path.moved(address)
        self._moved(address)
        self.machine.endpoint_known(True, self._clock())
        self.pump()

    def jumped(self) -> None:
        """The wall clock jumped: a handshake beside the live epoch, which stays."""
        self.machine.jumped(self._clock())
        self.pump()

    def forked(self) -> None:
        """This virtual machine is a copy, and so are its counters: no epoch may seal another record."""
        self._plane.erase_all(self.peer.name)
        self.machine.forked(self._clock())
        self.pump()

    def rekey(self) -> None:
        """A new epoch is wanted now."""
        self.machine.rekey(self._clock())
        self.pump()

    def stretch_rekey(self, factor: float) -> None:
        """Keys are short: begin epochs that many times further apart, as far as ``hard_end`` allows."""
        self.machine.stretch(factor)

    def source_status(self, ready: bool, alarm: str | None) -> None:
        """The key source was asked how it is.  One that does not answer has not said that its alarm is over."""
        if alarm is not None or ready:
            self._source_alarm(alarm)
        self._learn_names()
        self.machine.source_ready(ready, self._clock())
        if ready and self._waits:
            self.start()
        self.pump()

    def key_delivered(self, request: int, answer: KeyMaterial | KeyFault) -> None:
        """The key feed's answer to a NeedKey."""
        if self._stopped:
            if isinstance(answer, KeyMaterial):
                answer.material[:] = bytes(len(answer.material))
            return
        self._tell_claim()
        self.machine.key(request, answer, self._clock())
        self.pump()

    # what the packet path reports

    def received(self, message_type: MessageType, message: bytes, carrier: Carrier) -> DropReason | None:
        """A whole handshake message from outside; the result says why it was dropped, if it was."""
        self._tell_claim()
        dropped = self.machine.receive(message_type, message, carrier, self._clock())
        self.pump()
        return dropped

    def control(self, receive_index: int, payload: bytes, address: Address) -> DropReason | None:
        """A verified control record."""
        kind = payload[0] if payload else -1
        if kind in (ControlType.PROBE, ControlType.PROBE_REPLY):
            return self._probe(kind, receive_index, payload[1:], address)
        if kind in (ControlType.PATH_PROBE, ControlType.PATH_ACK):
            return self.path.control(receive_index, payload)
        self._tell_claim()
        dropped = self.machine.control(receive_index, payload, self._clock())
        self.pump()
        return dropped

    def first_record(self, receive_index: int, address: Address) -> None:
        """The first record of an epoch verified, and came from there (PROTOCOL.md chapter 12)."""
        self.machine.first_record(receive_index, self._clock())
        if receive_index in self._agreed_cold:
            self._agreed_cold.discard(receive_index)
            if self.carriers.allows(address):
                self.set_endpoint(address)
        self.pump()

    def limit(self, receive_index: int) -> None:
        self.machine.limit(receive_index)
        self.pump()

    def new_address(self, receive_index: int, address: Address) -> None:
        """The newest verified record came from elsewhere: ask there whether the peer gets what we send."""
        move = self.carriers.seen(self.endpoint, address, self._clock())
        if move is Move.ASK_THERE:
            self.log.info("peer seen at another address, probing", address=str(address), by=address.carrier)
            self.ask(receive_index, address)
        elif move is Move.ASK_HERE and self.endpoint is not None:
            self.ask(receive_index, self.endpoint)

    def watch_carriers(self, receive_index: int, heard: float | None) -> None:
        """Ask whether the transport in use works, and whether a better one does.  Once a second, under the epoch that
        is sent on; ``heard``: when a record of the peer verified last."""
        for address in self.carriers.to_ask(self.endpoint, self.candidates, heard, self._clock()):
            self.ask(receive_index, address)

    def ask(self, receive_index: int, address: Address) -> None:
        """Send a PROBE there; its answer makes that the endpoint."""
        now, challenge = self._clock(), self._random(_PROBE_BYTES)
        self._probes = {place: probe for place, probe in self._probes.items() if now < probe[2]}
        self._probes[address] = (challenge, receive_index, now + PROBE_LIFE)
        self._plane.send_control(
            self.peer.name, bytes([ControlType.PROBE]) + challenge, receive_index=receive_index, address=address
        )

    def _probe(self, kind: int, receive_index: int, body: bytes, address: Address) -> DropReason | None:
        if len(body) != _PROBE_BYTES:
            return DropReason.CONTROL_MALFORMED
        if kind == ControlType.PROBE:
            self._plane.send_control(
                self.peer.name, bytes([ControlType.PROBE_REPLY]) + body, receive_index=receive_index, address=address
            )
            return None
        challenge, epoch, ends = self._probes.get(address, (b"", -1, 0.0))
        if epoch != receive_index or self._clock() >= ends or not hmac.compare_digest(challenge, body):
            return DropReason.HANDSHAKE_STATE
        del self._probes[address]
        if address == self.endpoint:
            self.carriers.answered(self._clock())
        self.set_endpoint(address)
        return None

    def count(self, reason: DropReason | None) -> None:
        """A handshake message or control record went no further."""
        if reason is not None:
            self.record.drops.count(reason)

    # events

    def pump(self) -> None:
        """Carry out what the machine wants, in order, then arm its timer.  Re-entrant calls are taken up in order."""
        if self._pumping or self._stopped:
            return
        self._pumping = True
        try:
            while (event := self.machine.next_event()) is not None:
                self._actions[type(event)](event)
        finally:
            self._pumping = False
            self._arm()

    def _arm(self, least: float = 0.0) -> None:
        """Set the one timer, not earlier than ``least`` seconds from now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.machine.next_timer()
        if due is None or self._stopped:
            return
        delay = min(max(least, due - self._clock()), LATE)
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            self._do_what_is_due()
        except Exception as error:
            # The peer must not be left without a timer, nor the loop be spun by one that fails again and again.
            self.log.error("internal error", **describe(error))
            self._arm(least=AFTER_ERROR)

    def _do_what_is_due(self) -> None:
        heard, said = self._traffic()
        if heard is not None:
            self.machine.heard(heard)
        if said is not None:
            self.machine.said(said)
        self.machine.handle_timer(self._clock())
        self.pump()

    def _send_cold(self, event: events.SendCold) -> None:
        target = event.address if isinstance(event.address, Address) else self.endpoint
        if event.address is not None and self._unanswered is not None:
            self._agreed_cold.add(self._unanswered)  # this is the M4 that tells the peer of it
        self._unanswered = None
        if target is not None:
            self._plane.send_handshake(event.datagrams, target)

    def _send_inner(self, event: events.SendInner) -> None:
        self._unanswered = None
        for payload in event.payloads:
            self._plane.send_control(self.peer.name, payload, receive_index=event.receive_index)

    def _need_key(self, event: events.NeedKey) -> None:
        if self.feed is not None:
            self.feed.ask(event)
        else:
            # Later, not now: the machine is in the middle of its events.
            loop = asyncio.get_running_loop()
            loop.call_soon(self.key_delivered, event.request, KeyFault.UNAVAILABLE)

    def _install(self, event: events.Install) -> None:
        self._plane.install(self.peer.name, event.keys)
        self._unanswered = None if event.keys.initiator else event.keys.receive_index

    def _hold(self, event: events.Hold) -> None:
        self._plane.hold(self.peer.name, event.receive_index)

    def _erase(self, event: events.Erase) -> None:
        self._plane.erase(self.peer.name, event.receive_index)
        self._agreed_cold.discard(event.receive_index)

    def _confirmed(self, event: events.Confirmed) -> None:
        self.record.confirmed(event, self._clock())
        self.log.info("epoch confirmed", **self.record.log_fields(event))
        self.path.woken()

    def _failed(self, event: events.AttemptFailed) -> None:
        fields = {"failure": event.failure.value, "detail": event.detail, "role": event.role.value}
        if event.failure in _NO_FAULT:
            self.log.info("handshake ended", **fields)
            return
        self.record.failed(event)
        self.log.warning("handshake failed", **fields)

    def _alarm(self, event: events.Alarm) -> None:
        self.record.alarm(f"{event.kind}: {event.detail}")
        self.log.error("alarm", kind=event.kind, detail=event.detail)

    def _dropped(self, event: events.Dropped) -> None:
        self.count(event.reason)

    def _chain_broken(self, _event: events.ChainBroken) -> None:
        self.log.warning("chain broken: the epoch rests on fresh secrets alone")

    # the key source's other words

    def _learn_names(self) -> None:
        """A device tells its link's name only when it has answered; before that it gives no key either."""
        pair = None if self.feed is None else self.feed.sae_pair()
        known = self.machine.parameters
        if pair is None or (pair.local, pair.remote) == (known.sae_local, known.sae_remote):
            return
        self.machine.sae_names(pair.local, pair.remote)

    def _tell_claim(self) -> None:
        if self.feed is not None:
            self.machine.claim(self.feed.claim())

    def _source_alarm(self, alarm: str | None) -> None:
        if alarm == self.record.source_alarm:
            return
        self.record.source_alarm = alarm
        if alarm is None:
            self.log.info("the key source's alarm is over")
            self.machine.unblock(self._clock())
            return
        self.record.alarm(f"key source: {alarm}")
        self.log.error("alarm of the key source", alarm=alarm, on_alarm=self.peer.on_alarm.value)
        self.machine.distrust_held_keys(self._clock())
        if self.peer.on_alarm is OnAlarm.REKEY_NOW:
            self.machine.rekey(self._clock())
        elif self.peer.on_alarm is OnAlarm.BLOCK_NOW:
            # The peer is not told: its own source tells it, or its packets are refused here.
            self._plane.erase_all(self.peer.name)
            self.machine.block(self._clock())
