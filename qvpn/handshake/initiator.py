"""The initiator's side of one attempt, in the order of the messages (PROTOCOL.md, chapters 4 to 8)."""

from __future__ import annotations

import hmac

from qvpn.crypto import labels
from qvpn.crypto.aead import open_untrusted, seal
from qvpn.crypto.kem import Ephemeral
from qvpn.crypto.sign import sign, verifies
from qvpn.errors import BadPacket
from qvpn.handshake import policy, schedule, timers
from qvpn.handshake.chain import Link, Offer, next_link
from qvpn.handshake.core import STATES, Core, EpochInfo, lanes_said
from qvpn.handshake.events import AttemptFailed, ChainBroken, Failure, NeedKey, Role, SendCold, SendInner
from qvpn.handshake.parameters import KeyFault, KeyMaterial
from qvpn.handshake.port import ATTEMPT
from qvpn.handshake.state import INITIATOR, InitiatorEvent, InitiatorState, step
from qvpn.tunnel.drops import DropReason
from qvpn.wire import codec
from qvpn.wire.datagram import HEADER, MAC, Outgoing, open_retry_untrusted
from qvpn.wire.messages import (
    M1,
    NO_INDEX,
    P3,
    P4,
    TLV_CLAIM,
    KeyName,
    MessageType,
    Mode,
    Outcome,
    Policy,
    Reason,
)

_ENDS_DRAWING = {Reason.UNAVAILABLE, Reason.UNAUTHORISED, Reason.ORIGIN, Reason.ROLLED_BACK}
_ALARMING = {Reason.UNAUTHORISED, Reason.REUSED, Reason.ORIGIN, Reason.ROLLED_BACK}


class Attempt:
    """One attempt.  ``over`` is True once it has ended; ``accepted`` holds its epoch if it ended well."""

    def __init__(self, core: Core, now: float, inner: EpochInfo | None) -> None:
        self.core = core
        self.state = InitiatorState.IDLE
        self.inner = inner
        self.accepted: EpochInfo | None = None
        self.started = now
        self.deadline = now + timers.DEADLINE
        self.last_reply: float | None = None
        self.request: int | None = None
        self.asked_at = 0.0
        self._retries: list[float] = []
        self._answered_retry = False  # a RETRY made us send M1 since the last retransmission
        self._begin(now)

    @property
    def over(self) -> bool:
        return self.state is InitiatorState.IDLE

    @property
    def no_reply_at(self) -> float | None:
        """When an inner attempt that met silence goes cold."""
        if self.inner is None:
            return None
        since = self.last_reply if self.last_reply is not None else self.started
        return since + timers.no_reply(self.core.parameters.rekey)

    def next_timer(self) -> float:
        times = [self.deadline]
        if self.state in (InitiatorState.WAIT_M2, InitiatorState.WAIT_M4):
            times.append(self._resend_at)
        if self.request is not None:
            times.append(self.asked_at + timers.SOURCE_CALL)
        if self.no_reply_at is not None:
            times.append(self.no_reply_at)
        return min(times)

    def handle_timer(self, now: float) -> None:
        """Resend, go cold, give up: whatever is due."""
        if now >= self.deadline:
            self.end(InitiatorEvent.DEADLINE, Failure.DEADLINE, f"no end within {timers.DEADLINE:.0f} s", now)
            return
        lost = self.inner is not None and self.inner.receive_index not in self.core.epochs
        if lost or (self.no_reply_at is not None and now >= self.no_reply_at):
            self.go_cold(now)
            return
        if self.request is not None and now >= self.asked_at + timers.SOURCE_CALL:
            self.on_key(self.request, KeyFault.BROKEN, now)
        elif self.state in (InitiatorState.WAIT_M2, InitiatorState.WAIT_M4) and now >= self._resend_at:
            self._step(InitiatorEvent.RESEND)
            self._answered_retry = False
            self._send(now, again=True)

    # M1

    def _begin(self, now: float) -> None:
        core = self.core
        self._answered_retry = False
        self.identity = core.identity if self.inner is None else self.inner.identity
        self.suite = core.suite(core.parameters.suites[0])
        self.index = core.port.allocate(core.parameters.name, ATTEMPT)
        self.peer_index = NO_INDEX
        self.attempt = 0
        self.mismatches = 0
        self.key: KeyMaterial | None = None
        self.key_since = now
        self._name: KeyName | None = None
        self._ephemeral: Ephemeral | None = core.random.kem.generate(self.suite)
        self._offer: Offer = core.chain.offer()
        new, old = self._offer.ids
        self._m1 = codec.encode_m1(M1(self.index, self._ephemeral.ek, self._ephemeral.x25519, new, old))
        self._e4 = self._th4 = b""
        self._policy = core.policy()
        self._resend_delay = timers.RESEND_FIRST
        if self.state is InitiatorState.IDLE:
            self._step(InitiatorEvent.START)
        self._compose(MessageType.M1, self._m1)
        self._send(now)

    def on_retry(self, message: bytes, now: float) -> None:
        """A cookie: send the same M1 again with it, at most a few times a second.

        Where there is no PSK an observer can forge RETRY and be first: each one counts for a while, and only the
        first after a retransmission is answered at once.  Else a forger who is nearer than R would use the count up
        by answering each of our answers before R's own RETRY comes; so that one is kept and has its turn, whatever
        the forger sends behind it.
        """
        if self.state is not InitiatorState.WAIT_M2 or self.inner is not None:
            self.core.drop(DropReason.HANDSHAKE_STATE, "RETRY")
            return
        self._retries = [when for when in self._retries if now - when < timers.RETRY_WINDOW]
        if len(self._retries) >= timers.RETRIES:
            self.core.drop(DropReason.HANDSHAKE_BUDGET, "RETRY")
            return
        first = self._out.datagrams(self.core.own_gate[self.identity], None, self.core.datagram_limit)[0]
        mac1 = first[-2 * MAC : -MAC]
        if message[12 : HEADER.size] != self._out.message_id:
            self.core.drop(DropReason.HANDSHAKE_STATE, "RETRY of another M1")
            return
        try:
            cookie = open_retry_untrusted(message, self.core.peer_gate[self.identity], mac1)
        except BadPacket as error:
            self.core.drop(DropReason.HANDSHAKE_AUTHENTICATION, str(error))
            return
        self._retries.append(now)
        self.core.cookies.add(cookie, now)
        self._step(InitiatorEvent.RETRY)
        if not self._answered_retry:
            self._answered_retry = True
            self._send(now)

    # M2

    def on_m2(self, message: bytes, sender_index: bytes | None, now: float) -> None:
        """Verify R first; only then is a key source asked.  ``sender_index``: of the datagrams, None inside."""
        if self.state is not InitiatorState.WAIT_M2:
            self.core.drop(DropReason.HANDSHAKE_STATE, "M2")
            return
        try:
            self._read_m2(message, sender_index)
        except BadPacket as error:
            self._step(InitiatorEvent.M2_BAD)
            self.core.drop(DropReason.HANDSHAKE_AUTHENTICATION, f"M2: {error}")
            return
        self._ephemeral = None
        self.last_reply = now
        if self.inner is None:
            self.core.cookies.worked()
        if self._selected is None and self._offer.new is not None:
            self.core.emit(ChainBroken())
        core = self.core
        if core.parameters.mode is Mode.PQC_ONLY or not (self.peer_policy.ready and core.policy().ready):
            why = (
                "the peer's key source is not ready" if not self.peer_policy.ready else "our key source is not ready"
            )
            self._none_or_end(InitiatorEvent.M2_NONE, InitiatorEvent.M2_END, Failure.NOT_READY, why, now)
            return
        self._step(InitiatorEvent.M2_DRAW)
        self._draw(now)

    def _read_m2(self, message: bytes, sender_index: bytes | None) -> None:
        core, suite, ephemeral = self.core, self.suite, self._ephemeral
        if ephemeral is None:
            raise BadPacket("no ephemeral keys")
        m2 = codec.decode_m2_untrusted(suite, message, self._offer.ids)
        if sender_index not in (None, m2.index):
            raise BadPacket("M2 whose index is not the sender index of its datagrams")
        secret = ephemeral.decapsulate_untrusted(m2.ciphertext, m2.x25519)
        selected = self._offer.selected(m2.chain_selected)
        epoch = (selected.epoch + 1) & 0xFFFFFFFF if selected else 0
        ctx = schedule.context(
            suite.code, core.fingerprint, core.peer_prints[self.identity], core.parameters.psk, epoch
        )
        kex = schedule.key_exchange(
            ctx, selected.secret if selected else None, core.parameters.psk, secret, self._m1, m2.clear
        )
        plain = open_untrusted(suite, kex.hk_r, kex.iv_r, 0, kex.th1, m2.sealed)
        p2 = codec.decode_p2_untrusted(suite, plain)
        th2 = schedule.th2(kex.th1, p2.raw)
        if not verifies(core.parameters.peers[self.identity], labels.SIGN_RESPONDER, th2, p2.signatures):
            raise BadPacket("signature does not verify")
        self.peer_index = m2.index
        self.peer_policy: Policy = p2.body.policy
        self.peer_claim = p2.body.tlvs.get(TLV_CLAIM)
        self.peer_lanes = lanes_said(p2.body.tlvs)
        self._selected: Link | None = selected
        self._epoch, self._kex, self._th2, self._e2 = epoch, kex, th2, m2.sealed

    # the key

    def _draw(self, now: float) -> None:
        """A held key first; else ask the source, within the budget."""
        held = self.core.keys.take_drawn(now)
        if held is not None:
            self.key_since = held.since
            self._use(held.key, now)
            return
        if not self.core.bucket.take(now):
            self._no_key("more draws than the budget allows", now)
            return
        self.request = self.core.next_request()
        self.asked_at = now
        self.core.emit(NeedKey(self.request, Role.INITIATOR, None, self.peer_claim))

    def on_key(self, request: int, answer: KeyMaterial | KeyFault, now: float) -> None:
        """The answer to NeedKey of this attempt."""
        self.request = None
        if isinstance(answer, KeyFault):
            if answer is KeyFault.ROLLED_BACK:
                self.core.rolled_back = True
                self.core.alarm("rolled_back", "the peer has seen our key source further than its state says")
            if answer is KeyFault.UNAUTHORISED:
                self.core.alarm("unauthorised", "our key source refuses us")
            if answer is KeyFault.REPEATED:
                self.core.alarm("key_repeated", "our key source gave a key that it had given before")
            self._no_key(f"our key source: {answer.value}", now)
            return
        self.key_since = self.asked_at  # an alarm between question and answer counts against it
        self._use(answer, now)

    def _use(self, key: KeyMaterial, now: float) -> None:
        core = self.core
        if core.keys.used.has_id(key.key_id) or core.keys.used.has_key(key):
            core.alarm("key_repeated", "our key source gave a key that was used before")
            core.keys.burn(key)
            self._no_key("our key source repeats keys", now)
            return
        if not policy.origin_allowed(core.parameters, key.origin):
            core.keys.burn(key)
            core.alarm("origin", "require-qkd refuses a simulated key: allow_simulated is not set")
            self._no_key("a simulated key, and allow_simulated is not set", now)
            return
        self.key = key
        self._name = KeyName(core.parameters.label, key.key_id, key.origin, key.hops)
        self._step(InitiatorEvent.KEY)
        self._send_m3(now)

    def _no_key(self, why: str, now: float) -> None:
        self._none_or_end(InitiatorEvent.NO_KEY_NONE, InitiatorEvent.NO_KEY_END, Failure.NO_KEY, why, now)

    def _none_or_end(self, none: InitiatorEvent, end: InitiatorEvent, failure: Failure, why: str, now: float) -> None:
        core = self.core
        allowed = policy.may_send_none(
            core.parameters, self.peer_policy, self._selected, now, core.degraded_allowed(now)
        )
        if not allowed:
            self.end(end, failure, why, now)
            return
        self.key = self._name = None
        self._step(none)
        self._send_m3(now)

    # M3 and M3R

    def _send_m3(self, now: float) -> None:
        core, suite, kex = self.core, self.suite, self._kex
        keys = (self._name,) if self._name else ()
        if self.attempt == 0:
            self._policy = core.policy()
        p3 = codec.encode_p3(P3(self._policy, self.attempt, keys, core.tlvs()))
        if self.attempt == 0:
            aad, th3 = self._th2, schedule.th3(self._th2, self._e2, p3)
        else:
            aad, th3 = schedule.retry_aad(self._th4, self._e4), schedule.th3(self._th4, self._e4, p3)
        signatures = sign(core.parameters.identity, labels.SIGN_INITIATOR, th3)
        self._e3 = seal(suite, kex.hk_i, kex.iv_i, self.attempt, aad, p3 + signatures)
        self._th4 = schedule.th4(th3, self._e3)
        self._compose(MessageType.M3 if self.attempt == 0 else MessageType.M3R, self._e3)
        self._send(now)

    # M4

    def on_m4(self, message: bytes, now: float) -> None:
        if self.state is not InitiatorState.WAIT_M4:
            self.core.drop(DropReason.HANDSHAKE_STATE, "M4")
            return
        try:
            p4 = self._read_m4(message)
        except BadPacket as error:
            self._step(InitiatorEvent.M4_BAD)
            self.core.drop(DropReason.HANDSHAKE_AUTHENTICATION, f"M4: {error}")
            return
        self.last_reply = now
        self._e4 = message
        if p4.outcome is Outcome.REFUSED:
            self._drop_key(burn=True, now=now)  # offered again it would be refused again
            self.end(InitiatorEvent.M4_END, Failure.REFUSED, f"the peer refuses: {p4.reason.name.lower()}", now)
        elif p4.outcome is Outcome.RETRY_KEY:
            self._on_retry_key(p4.reason, now)
        else:
            self._on_outcome(p4, now)

    def _read_m4(self, message: bytes) -> P4:
        kex = self._kex
        plain = open_untrusted(self.suite, kex.hk_r, kex.iv_r, 1 + self.attempt, self._th4, message)
        p4 = codec.decode_p4_untrusted(self.suite, plain)
        if p4.outcome in (Outcome.OK, Outcome.RETRY_KEY) and self.key is None:
            raise BadPacket(f"{p4.outcome.name} in answer to no key")
        if p4.outcome.degraded:
            if self.key is not None:
                raise BadPacket(f"{p4.outcome.name} in answer to a key")
            signed = self._th4 + bytes([p4.outcome])
            if not verifies(self.core.parameters.peers[self.identity], labels.SIGN_DEGRADED, signed, p4.signatures):
                raise BadPacket("signature does not verify")
        return p4

    def _on_retry_key(self, reason: Reason, now: float) -> None:
        if reason in _ALARMING:
            self.core.alarm("retry_key", f"the peer cannot take our key: {reason.name.lower()}")
        # a peer whose source said "not now" has consumed nothing: the key may serve in the next attempt
        self._drop_key(burn=reason is not Reason.UNAVAILABLE, now=now)
        self._again(reason in _ENDS_DRAWING, f"the peer cannot take our key: {reason.name.lower()}", now)

    def _on_outcome(self, p4: P4, now: float) -> None:
        core = self.core
        secret = bytes(self.key.material) if self.key else b""
        keys = (self._name,) if self._name else ()
        info = schedule.keys_info(keys, core.parameters.sae_local, core.parameters.sae_remote)
        final = schedule.qkd_round(self._kex, secret, self._e3, p4.outcome, info, self._th4)
        if not hmac.compare_digest(final.confirm, p4.confirm):
            self._on_mismatch(p4.outcome, now)
            return
        if p4.outcome.degraded and not policy.accepts(
            core.parameters, self.peer_policy, p4.outcome, self._selected, now, core.degraded_allowed(now)
        ):
            self.end(InitiatorEvent.M4_END, Failure.POLICY, f"our policy refuses {p4.outcome.name}", now)
            return
        self._accept(p4.outcome, final, now)

    def _on_mismatch(self, outcome: Outcome, now: float) -> None:
        if outcome.degraded:
            self.end(InitiatorEvent.M4_END, Failure.KEY_MISMATCH, "confirmation does not verify", now)
            return
        self.mismatches += 1
        self.core.alarm(
            "key_mismatch", "the two key sources gave different bytes for one key_ID, or the SAE names differ"
        )
        self._drop_key(burn=True, now=now)
        self._again(False, "key mismatch", now)

    def _again(self, ends_drawing: bool, why: str, now: float) -> None:
        """After RETRY-KEY or a mismatch: another key, none, or the end."""
        failure = Failure.KEY_MISMATCH if self.mismatches else Failure.NO_KEY
        if self.attempt >= 2:
            self.end(InitiatorEvent.M4_END, failure, why, now)
            return
        self.attempt += 1
        last_chance = self.attempt == 2 and self.core.parameters.mode is Mode.PREFER_QKD
        if ends_drawing or last_chance or self.mismatches >= 2:
            self._none_or_end(InitiatorEvent.M4_NONE, InitiatorEvent.M4_END, failure, why, now)
            return
        self._step(InitiatorEvent.M4_DRAW)
        self._draw(now)

    def _accept(self, outcome: Outcome, final: schedule.Final, now: float) -> None:
        core = self.core
        link = next_link(final.chain, self._selected, self._epoch)
        if self.key is not None:
            link = Link(final.chain, self._epoch, self.key_since, self.key.origin)
        info = EpochInfo(
            self.index,
            self._epoch,
            STATES[outcome],
            Role.INITIATOR,
            now,
            0.0,
            self.started,
            link,
            self._selected,
            self.key,
            self._name,
        )
        info.identity = self.identity
        info.lanes = self.peer_lanes
        self.key = None
        self._step(InitiatorEvent.M4_ACCEPT)
        core.port.becomes_epoch(self.index)
        core.install(info, self.suite, self.peer_index, final, now)
        core.chain.advance(link, self._selected)
        core.sending = info
        self.accepted = info
        del self._kex

    # ends

    def end(self, event: InitiatorEvent, failure: Failure, why: str, now: float) -> None:
        """The attempt is over without an epoch."""
        if self.over:
            return
        self._step(event)
        self._let_go(now)
        if self.inner is None and self.last_reply is None:
            # silence: while the peer's identity rolls over it may be the other one that answers
            self.core.identity = (self.identity + 1) % len(self.core.parameters.peers)
        self.core.emit(AttemptFailed(failure, why))

    def go_cold(self, now: float) -> None:
        """An inner attempt met silence: begin anew outside, at once, in the time that is left."""
        self._step(InitiatorEvent.NO_REPLY)
        self._let_go(now)
        self.core.emit(AttemptFailed(Failure.NO_REPLY, "no answer inside the epoch"))
        self.inner = None
        self.last_reply = None
        self._begin(now)

    def _let_go(self, now: float) -> None:
        self.core.port.release(self.index)
        self._ephemeral = None
        self.request = None
        self._drop_key(burn=False, now=now)

    def _drop_key(self, burn: bool, now: float) -> None:
        if self.key is None:
            return
        if burn:
            self.core.keys.burn(self.key)
        elif now < self.key_since + timers.HELD_KEY:
            self.core.keys.hold_drawn(self.key, self.key_since)
        else:
            self.core.keys.burn(self.key)
        self.key = self._name = None

    # sending

    def _compose(self, kind: MessageType, body: bytes) -> None:
        message_id = self.core.random.token(4)
        self._out = Outgoing(kind, self.suite.code, self.index, self.peer_index, message_id, body)

    def _send(self, now: float, *, again: bool = False) -> None:
        core = self.core
        cap = timers.resend_cap(core.parameters.rekey)
        self._resend_delay = min(cap, 2 * self._resend_delay) if again else min(cap, timers.RESEND_FIRST)
        self._resend_at = now + timers.spread(self._resend_delay, core.random.uniform())
        if self.inner is not None:
            target = self.index if self._out.type is MessageType.M1 else self.peer_index
            core.emit(SendInner(self.inner.receive_index, self._out.payloads(target)))
            return
        cookie = core.cookies.next(now) if again else core.cookies.newest(now)
        core.emit(SendCold(self._out.datagrams(core.own_gate[self.identity], cookie, core.datagram_limit)))

    def _step(self, event: InitiatorEvent) -> None:
        after = step(INITIATOR, self.state, event)
        if after is None:
            raise AssertionError(f"{event} in {self.state}")
        self.state = after
