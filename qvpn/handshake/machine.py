"""One peer's handshake, sans-IO: both roles, every timer, chain, keys and the lives of epochs.

The driver feeds it, takes every event from :meth:`PeerHandshake.next_event` after each call, carries them out in
order, and then calls :meth:`PeerHandshake.handle_timer` no earlier than :meth:`PeerHandshake.next_timer`.
``now`` is in seconds of CLOCK_BOOTTIME and never falls.
"""

from __future__ import annotations

from dataclasses import replace

from qvpn.errors import BadPacket
from qvpn.handshake import timers
from qvpn.handshake.answers import Answers
from qvpn.handshake.carrier import Carrier, Cold, Inner
from qvpn.handshake.chain import Chain
from qvpn.handshake.core import Core, EpochInfo
from qvpn.handshake.events import AttemptFailed, Event, Failure, Role
from qvpn.handshake.initiator import Attempt
from qvpn.handshake.keyring import wipe
from qvpn.handshake.liveness import Liveness
from qvpn.handshake.parameters import Initiate, KeyFault, KeyMaterial, PeerParameters, Randomness
from qvpn.handshake.port import Port
from qvpn.handshake.snapshot import Snapshot as Snapshot
from qvpn.handshake.state import InitiatorEvent, InitiatorState
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import EpochState
from qvpn.wire.datagram import DEFAULT_LIMIT, decode_inner_untrusted
from qvpn.wire.fragments import Reassembler
from qvpn.wire.messages import ControlType, MessageType

MAX_INNER_PARTS = 4
MIN_LIMIT = 576
"""Bytes of UDP payload that every path is taken to carry; suite 03 needs 12 datagrams of it."""
POSTPONE = 1.0


class PeerHandshake:
    """All of one peer's handshakes."""

    def __init__(self, parameters: PeerParameters, port: Port, randomness: Randomness, now: float) -> None:
        self._core = Core(parameters, randomness, port, now)
        self._random = randomness
        self._port = port
        self._attempt: Attempt | None = None
        self._answers = Answers(self._core)
        self._core.give_way = self._answers.give_way
        self._inner_parts = Reassembler(2 * MAX_INNER_PARTS)
        self._endpoint = parameters.has_endpoint
        self._started = False
        self._stopped = False
        self._blocked = False
        self._start_at: float | None = None
        self._start_cold = False
        self._stretch = 1.0
        self._backoff = timers.BACKOFF_FIRST
        self._liveness = Liveness(self._core, now)
        self._late: dict[int, float] = {}
        """Draws that no attempt waits for any more, and when they were asked for."""
        self._epochs = self._failures = 0
        self._last_failure = ""

    @property
    def parameters(self) -> PeerParameters:
        return self._core.parameters

    # the driver's orders

    def start(self, now: float) -> None:
        """Begin: with an endpoint, and unless ``initiate`` is ``never``, a cold attempt starts at once."""
        self._started = True
        self._schedule(now, cold=True)
        self._run_due(now)

    def jumped(self, now: float) -> None:
        """The wall clock jumped without a suspend: a cold attempt beside the live epoch; erases nothing."""
        if self._started and not self._stopped:
            self._go_cold(now)
            self._run_due(now)

    def forked(self, now: float) -> None:
        """This machine is a copy of another: nonces would repeat, so epochs, chain and keys go at once."""
        self._erase_everything(now, "the machine was forked")
        self._core.chain = Chain()
        self._core.keys.clear()
        if self._started:
            self._schedule(now, cold=True)
            self._run_due(now)

    def block(self, now: float) -> None:
        """No epoch and no handshake until :meth:`unblock`: the operator's answer to an alarm."""
        self._blocked = True
        self._erase_everything(now, "blocked by an alarm")
        self._start_at = None

    def distrust_held_keys(self, now: float) -> None:
        """The key source has an alarm: no key that came from it before ``now`` is offered or taken again."""
        self._core.keys.distrust(now)

    def unblock(self, now: float) -> None:
        """Begin again; nothing if not blocked."""
        if self._blocked:
            self._blocked = False
            if self._started:
                self._schedule(now, cold=True)
                self._run_due(now)

    def sae_names(self, local: str, remote: str) -> None:
        """The names of both ends at the key source, where they are known only once it answers."""
        self._core.parameters = replace(self._core.parameters, sae_local=local, sae_remote=remote)

    def datagram_limit(self, limit: int) -> None:
        """Bytes of UDP payload that the path to the peer carries; kept within 576 to 1200."""
        self._core.datagram_limit = max(MIN_LIMIT, min(limit, DEFAULT_LIMIT))

    def stretch(self, factor: float) -> None:
        """Keys are short: from the next epoch on let epochs live that many times longer, as far as ``hard_end``
        allows; 1 or less is the configured interval."""
        self._stretch = max(1.0, factor)

    def rekey(self, now: float) -> None:
        """Start an attempt now, inside the newest epoch where there is one; nothing if one is running."""
        if self._started and self._attempt is None:
            self._schedule(now, cold=False)
            self._run_due(now)

    def stop(self, now: float) -> None:
        """CLOSE to the peer, Erase for every epoch, keys wiped.  The machine is dead afterwards."""
        if self._stopped:
            return
        self._stopped = True
        if self._core.sending is not None:
            self._core.tell(self._core.sending, bytes([ControlType.CLOSE, 0]))
        if self._attempt is not None:
            self._attempt.end(InitiatorEvent.STOP, Failure.STOPPED, "stopped", now)
            self._attempt = None
        self._answers.discard()
        for info in tuple(self._core.epochs.values()):
            self._core.erase(info)
        self._core.keys.clear()

    def endpoint_known(self, known: bool, now: float) -> None:
        """Whether the driver has an address to send to.  Without one no cold attempt is started."""
        self._endpoint = known
        self._core.cookies.clear()
        self._run_due(now)

    def source_ready(self, ready: bool, now: float) -> None:
        """What the key source says of itself.  A source that comes back while we are blocked starts an attempt."""
        back = ready and not self._core.ready
        self._core.ready = ready
        if back and self._started and self._core.sending is None and self._start_at is not None:
            self._start_at = min(self._start_at, now)
            self._run_due(now)

    def claim(self, claim: bytes | None) -> None:
        """The source's claim (at most 64 bytes) for the next message; set it again whenever it changes."""
        self._core.claim = claim

    # what arrived

    def receive(self, message_type: MessageType, message: bytes, carrier: Carrier, now: float) -> DropReason | None:
        """A complete message or a RETRY, as the gate gave it.  The result says why it was dropped, if it was."""
        if self._stopped or self._blocked:
            return DropReason.HANDSHAKE_STATE
        if message_type is MessageType.M1:
            return self._on_m1(message, carrier, now)
        index = carrier.receiver_index if isinstance(carrier, Cold) else carrier.handshake_index
        if message_type in (MessageType.M3, MessageType.M3R):
            return self._on_m3(message_type, index, message, carrier, now)
        return self._on_answer(message_type, index, message, carrier, now)

    def control(self, receive_index: int, payload: bytes, now: float) -> DropReason | None:
        """The plaintext of a control record of this epoch: HANDSHAKE, EPOCH_OK, EPOCH_ACK, KEEPALIVE or CLOSE.

        PROBE and PROBE_REPLY are the driver's; here they count as unknown.  Call :meth:`first_record` before.
        """
        info = self._core.epochs.get(receive_index)
        if self._stopped or info is None or not payload:
            return DropReason.CONTROL_MALFORMED
        if payload[0] == ControlType.HANDSHAKE:
            return self._on_fragment(info, payload, now)
        if payload[0] == ControlType.EPOCH_OK and len(payload) == 1:
            self._core.tell(info, bytes([ControlType.EPOCH_ACK]))
        elif payload[0] == ControlType.CLOSE and len(payload) == 2:
            self.closed_by_peer(now, info)
        elif payload[0] not in (ControlType.EPOCH_ACK, ControlType.KEEPALIVE) or len(payload) != 1:
            return DropReason.CONTROL_MALFORMED
        return None

    def key(self, request: int, answer: KeyMaterial | KeyFault, now: float) -> None:
        """The answer to NeedKey.  May come late or never: a late key of a draw is held for the next attempt."""
        if isinstance(answer, KeyFault):
            self._core.ready = self._core.ready and answer is not KeyFault.UNAVAILABLE
        attempt = self._attempt
        if attempt is not None and attempt.request == request:
            attempt.on_key(request, answer, now)
            self._after_attempt(now)
            return
        if self._answers.key(request, answer, now):
            return
        asked = self._late.pop(request, None)
        if not isinstance(answer, KeyMaterial):
            return
        if asked is not None and not self._stopped:
            self._core.keys.hold_drawn(answer, asked)
        else:
            wipe(answer.material)

    def first_record(self, receive_index: int, now: float) -> None:
        """The first record under this epoch verified."""
        info = self._core.epochs.get(receive_index)
        if info is None or info.confirmed:
            return
        self._answers.confirmed(info, now)
        self._core.confirm(info, now)
        self._epochs += 1
        if info.role is Role.RESPONDER and self._attempt and self._attempt.state is InitiatorState.WAIT_M2:
            self._end_attempt(InitiatorEvent.YIELD, Failure.YIELDED, "the peer's handshake was first", now)
        self._liveness.confirmed(info, now)
        if not info.held:
            self._backoff = timers.BACKOFF_FIRST
            self._schedule_rekey(info)

    def heard(self, when: float) -> None:
        """When the newest record of the peer verified, under the epoch that we send on."""
        self._liveness.heard(when)

    def said(self, when: float) -> None:
        """When the newest record to the peer left; without it a keepalive goes out although data did."""
        self._liveness.said(when)

    def limit(self, receive_index: int, now: float | None = None) -> None:
        """The epoch has used up its AEAD calls: a rekey is due now."""
        sending = self._core.sending
        if sending is not None and sending.receive_index == receive_index and self._attempt is None:
            self._start_at = -1.0
            self._start_cold = False

    def closed_by_peer(self, now: float, carrier: EpochInfo) -> None:
        """CLOSE verified: its epoch and older ones go, the chain stays, a cold attempt follows after the back-off.

        A CLOSE that was held back on its way does not touch what was agreed since.
        """
        if any(info.confirmed and info.installed > carrier.installed for info in self._core.epochs.values()):
            self._core.erase(carrier)
            return
        self._erase_everything(now, "the peer has stopped")
        self._start_cold = True
        if self._start_at is None or self._start_at <= now:
            self._back_off(now)

    def _erase_everything(self, now: float, why: str) -> None:
        for info in tuple(self._core.epochs.values()):
            self._core.erase(info)
        self._end_attempt(InitiatorEvent.STOP, Failure.STOPPED, why, now)
        self._answers.discard()
        self._liveness.forget()

    # time

    def handle_timer(self, now: float) -> None:
        """Do all that is due."""
        if self._stopped:
            return
        for info in tuple(self._core.epochs.values()):
            if now >= info.hard_end:
                self._end_epoch(info, now)
        self._answers.handle_timer(now)
        self._core.keys.expire(now)
        if self._attempt is not None and now >= self._attempt.next_timer():
            request, asked = self._attempt.request, self._attempt.asked_at
            self._attempt.handle_timer(now)
            if request is not None and self._attempt.request != request:
                self._late[request] = asked
            self._after_attempt(now)
        if self._liveness.due(now):
            self._go_cold(now)
        self._run_due(now)

    def next_timer(self) -> float | None:
        """When to call :meth:`handle_timer`; None: never."""
        if self._stopped:
            return None
        times = [info.hard_end for info in self._core.epochs.values()]
        times += self._answers.next_timers()
        if self._attempt is not None:
            times.append(self._attempt.next_timer())
        elif self._start_at is not None and self._may_start():
            times.append(self._start_at)
        times += self._liveness.next_timers()
        return min(times, default=None)

    # what to do, and how it stands

    def next_event(self) -> Event | None:
        """The next thing for the driver to carry out, in order."""
        if not self._core.events:
            return None
        event = self._core.events.popleft()
        if isinstance(event, AttemptFailed) and event.failure not in (Failure.YIELDED, Failure.STOPPED):
            self._failures += 1
            self._last_failure = f"{event.failure}: {event.detail}"
        return event

    def snapshot(self, now: float) -> Snapshot:
        """For status and metrics."""
        sending = self._core.sending
        live = sending is not None and now < sending.hard_end
        return Snapshot(
            state=sending.state if sending is not None and live else EpochState.BLOCKED,
            epoch=sending.number if sending else None,
            epoch_installed=sending.installed if sending else None,
            hard_end=sending.hard_end if sending else None,
            role=sending.role if sending else None,
            key=sending.name if sending else None,
            simulated=bool(sending and sending.simulated),
            attempt=str(self._attempt.state) if self._attempt else "IDLE",
            answering=tuple(str(entry.state) for entry in self._answers),
            epochs=self._epochs,
            failures=self._failures,
            last_failure=self._last_failure,
            keys_used=self._core.keys.consumed,
            next_rekey=self._start_at if self._attempt is None else now,
            preferred=self.parameters.preferred,
        )

    def live(self, now: float) -> bool:
        """True while a confirmed epoch is alive."""
        return any(info.confirmed and now < info.hard_end for info in self._core.epochs.values())

    # messages

    def _on_m1(self, message: bytes, carrier: Carrier, now: float) -> DropReason | None:
        if self._moves(now):
            return DropReason.HANDSHAKE_STATE
        return self._answers.on_m1(message, carrier, now)

    def _on_m3(
        self, kind: MessageType, index: bytes, message: bytes, carrier: Carrier, now: float
    ) -> DropReason | None:
        entry = self._answers.find(index, carrier)
        if entry is None:
            return DropReason.HANDSHAKE_STATE
        if entry.on_m3(kind, message, carrier, now, self._moves(now)) and self._yields():
            self._end_attempt(InitiatorEvent.YIELD, Failure.YIELDED, "the preferred peer was first", now)
        self._answers.sweep()
        return None

    def _on_answer(
        self, kind: MessageType, index: bytes, message: bytes, carrier: Carrier, now: float
    ) -> DropReason | None:
        attempt = self._attempt
        if attempt is None or attempt.index != index:
            return DropReason.HANDSHAKE_STATE
        inside = carrier.receive_index if isinstance(carrier, Inner) else None
        if inside != (attempt.inner.receive_index if attempt.inner else None):
            return DropReason.HANDSHAKE_STATE
        if kind is MessageType.RETRY:
            attempt.on_retry(message, now)
        elif carrier.suite != attempt.suite.code:
            return DropReason.HANDSHAKE_MALFORMED
        elif kind is MessageType.M2:
            attempt.on_m2(message, carrier.sender_index if isinstance(carrier, Cold) else None, now)
        else:
            attempt.on_m4(message, now)
        self._after_attempt(now)
        return None

    def _on_fragment(self, info: EpochInfo, payload: bytes, now: float) -> DropReason | None:
        try:
            part = decode_inner_untrusted(payload)
            if part.suite not in self.parameters.suites:
                raise BadPacket("suite that is not configured")
            message = self._inner_parts.add(
                (info.index, part.type, part.handshake_index, part.message_id),
                ((info.index, MAX_INNER_PARTS),),
                part,
                now,
            )
        except BadPacket:
            return DropReason.CONTROL_MALFORMED
        if message is None:
            return None
        carrier = Inner(info.receive_index, part.suite, part.handshake_index)
        return self.receive(part.type, message, carrier, now)

    # both start at once

    def _preferred(self) -> bool:
        return self.parameters.initiate is Initiate.AUTO and self.parameters.preferred

    def advances(self, now: float) -> bool:
        """Our own attempt had an authenticated reply in the last 3 s."""
        reply = self._attempt.last_reply if self._attempt is not None else None
        return reply is not None and now - reply < timers.MOVES

    def _moves(self, now: float) -> bool:
        """Our own attempt advances, and we are preferred."""
        return self._preferred() and self._endpoint and self.advances(now)

    def _yields(self) -> bool:
        return self.parameters.initiate is Initiate.AUTO and not self.parameters.preferred

    # our own attempts

    def _may_start(self) -> bool:
        if not self._started or self._blocked or self.parameters.initiate is Initiate.NEVER:
            return False
        return self._endpoint or self._inner_epoch() is not None

    def _inner_epoch(self) -> EpochInfo | None:
        sending = self._core.sending
        return sending if sending is not None and sending.confirmed and not self._start_cold else None

    def _schedule(self, when: float, *, cold: bool) -> None:
        self._start_at, self._start_cold = when, cold

    def _schedule_rekey(self, info: EpochInfo) -> None:
        jitter = self._random.uniform()
        preferred = self.parameters.preferred or self.parameters.initiate is Initiate.ALWAYS
        rekey, hard_end = self.parameters.rekey, self.parameters.hard_end
        stretched = min(rekey * self._stretch, timers.longest_rekey(rekey, hard_end))
        self._schedule(info.installed + timers.rekey_after(stretched, preferred, jitter), cold=False)

    def _back_off(self, now: float) -> None:
        delay = timers.spread(self._backoff, self._random.uniform())
        self._backoff = min(2 * self._backoff, timers.backoff_cap(self.parameters.rekey))
        self._schedule(now + delay, cold=self._start_cold)

    def _run_due(self, now: float) -> None:
        if self._stopped or self._attempt is not None or self._start_at is None or now < self._start_at:
            return
        if not self._may_start():
            return
        if not self._preferred() and self._answers.ending():
            # the preferred peer has proved itself and an epoch is about to come: two at once help nobody
            self._start_at = now + POSTPONE
            return
        self._start_at = None
        self._attempt = Attempt(self._core, now, self._inner_epoch())

    def _after_attempt(self, now: float) -> None:
        """The attempt may have ended: in an epoch, or in a back-off."""
        attempt = self._attempt
        if attempt is None or not attempt.over:
            return
        self._attempt = None
        info = attempt.accepted
        if info is None:
            self._back_off(now)
            return
        self._start_cold = False
        if self._preferred():
            # whatever the peer began before this moment loses: both sides send on ours
            self._answers.lose()
        self._core.sending = info
        self._liveness.accepted(info, now)

    def _end_attempt(self, event: InitiatorEvent, failure: Failure, why: str, now: float) -> None:
        attempt = self._attempt
        if attempt is None:
            return
        if attempt.request is not None:
            self._late[attempt.request] = attempt.asked_at
        attempt.end(event, failure, why, now)
        self._after_attempt(now)

    # epochs in time

    def _end_epoch(self, info: EpochInfo, now: float) -> None:
        """The hard end: an entry that still waits for its first record ends with it."""
        if not self._answers.hard_end(info, now):
            self._core.erase(info)

    def _go_cold(self, now: float) -> None:
        """A cold attempt now, in the place of an inner one that runs."""
        if self._attempt is None:
            self._schedule(now, cold=True)
        elif self._attempt.inner is not None:
            if self._attempt.request is not None:
                self._late[self._attempt.request] = self._attempt.asked_at
            self._attempt.go_cold(now)
