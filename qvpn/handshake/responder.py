"""The responder's side of one handshake, in the order of the messages (PROTOCOL.md, chapters 4 to 8)."""

from __future__ import annotations

import hmac
from collections.abc import Hashable
from dataclasses import dataclass

from qvpn.crypto import labels
from qvpn.crypto.aead import open_untrusted, seal
from qvpn.crypto.sign import sign, verifies
from qvpn.errors import BadPacket
from qvpn.handshake import policy, schedule, timers
from qvpn.handshake.carrier import Carrier, Cold
from qvpn.handshake.chain import Link, next_link
from qvpn.handshake.core import STATES, Core, EpochInfo, lanes_said
from qvpn.handshake.events import NeedKey, Role
from qvpn.handshake.parameters import KeyFault, KeyMaterial
from qvpn.handshake.port import ENTRY, source_prefix
from qvpn.handshake.state import RESPONDER, ResponderEvent, ResponderState, step
from qvpn.tunnel.drops import DropReason
from qvpn.wire import codec
from qvpn.wire.datagram import Outgoing
from qvpn.wire.messages import (
    P2,
    P3,
    P4,
    TLV_CLAIM,
    KeyName,
    MessageType,
    Mode,
    Outcome,
    Policy,
    Reason,
    Signed,
)

REASONS = {
    KeyFault.UNAVAILABLE: Reason.UNAVAILABLE,
    KeyFault.BROKEN: Reason.INTERNAL,
    KeyFault.UNKNOWN: Reason.UNKNOWN_KEY,
    KeyFault.REPEATED: Reason.REUSED,
    KeyFault.UNAUTHORISED: Reason.UNAUTHORISED,
    KeyFault.ROLLED_BACK: Reason.ROLLED_BACK,
}
_LIVES = {
    ResponderState.HALF_OPEN: timers.HALF_OPEN,
    ResponderState.RETRY: timers.ANSWER_LIFE,
    ResponderState.CONFIRM: timers.ANSWER_LIFE,
    ResponderState.CONFIRM_NONE: timers.ANSWER_LIFE,
    ResponderState.REFUSED: timers.ANSWER_LIFE,
}


_ADDRESSES = 4
"""Addresses that one answer is repeated to: the peer's, and a few that copied its message."""


@dataclass(slots=True)
class _Answers:
    """How often one address may still have the answer, and when it had it last."""

    left: int = timers.ANSWER_REPEATS
    at: float = -timers.ANSWER_SPACING


class Entry:
    """One handshake that we answer.

    Raises :class:`BadPacket` from the constructor where M1 cannot be used; nothing is kept then.
    """

    def __init__(self, core: Core, message: bytes, carrier: Carrier, now: float) -> None:
        self.core = core
        self.state = ResponderState.NONE
        self.carrier = carrier
        self.started = now
        self.m1 = message
        self.suite = core.suite(carrier.suite)
        self.identity = carrier.identity if isinstance(carrier, Cold) else core.epochs[carrier.receive_index].identity
        self.loses = False
        """The preferred peer (we) has accepted its own M4: never send on this one."""
        self.epoch: EpochInfo | None = None
        self.request: int | None = None
        self.asked_at = 0.0
        self.attempt = 0
        self.source: Hashable | None = source_prefix(carrier.address.ip) if isinstance(carrier, Cold) else None
        self._bad = 0
        self._answers: dict[Hashable, _Answers] = {}
        self._m3 = self._e4 = self._th4 = b""
        self._policy: Policy | None = None
        self._lanes = 1
        self._key: KeyMaterial | None = None
        self._read_m1(message, carrier)
        self._step(ResponderEvent.M1, now)
        self._send(now)

    @property
    def over(self) -> bool:
        return self.state is ResponderState.GONE

    def next_timer(self) -> float:
        return self.asked_at + timers.SOURCE_CALL if self.state is ResponderState.FETCH else self.expires

    def handle_timer(self, now: float) -> None:
        if self.state is ResponderState.FETCH:
            if self.request is not None and now >= self.asked_at + timers.SOURCE_CALL:
                self.on_key(self.request, KeyFault.BROKEN, now)
        elif now >= self.expires:
            self.expire(now)

    # M1 and M2

    def _read_m1(self, message: bytes, carrier: Carrier) -> None:
        core, suite = self.core, self.suite
        m1 = codec.decode_m1_untrusted(suite, message)
        if isinstance(carrier, Cold) and m1.index != carrier.sender_index:
            raise BadPacket("M1 whose index is not the sender index of its datagrams")
        answer = core.random.kem.encapsulate_untrusted(suite, m1.ek, m1.x25519)
        self._chain_expected = core.chain.expected
        which, self._selected = core.chain.select(m1.chain_new, m1.chain_old)
        self._epoch = (self._selected.epoch + 1) & 0xFFFFFFFF if self._selected else 0
        self.index = core.port.allocate(core.parameters.name, ENTRY)
        self.peer_index = m1.index
        clear = codec.encode_m2_clear(self.index, answer.ciphertext, answer.x25519, which)
        ctx = schedule.context(
            suite.code, core.peer_prints[self.identity], core.fingerprint, core.parameters.psk, self._epoch
        )
        chain = self._selected.secret if self._selected else None
        self._kex = schedule.key_exchange(ctx, chain, core.parameters.psk, answer.secret, message, clear)
        p2 = codec.encode_p2(P2(core.policy(), core.tlvs()))
        self._th2 = schedule.th2(self._kex.th1, p2)
        signatures = sign(core.parameters.identity, labels.SIGN_RESPONDER, self._th2)
        self._e2 = seal(suite, self._kex.hk_r, self._kex.iv_r, 0, self._kex.th1, p2 + signatures)
        self._compose(MessageType.M2, clear + self._e2)

    def again(self, carrier: Carrier, now: float) -> None:
        """The same M1 once more: the same M2."""
        if self._step(ResponderEvent.M1_SAME, now) and self.state is ResponderState.HALF_OPEN:
            self._repeat(carrier, now)

    # M3 and M3R

    def on_m3(self, kind: MessageType, message: bytes, carrier: Carrier, now: float, ignore: bool) -> bool:
        """Verify I, then decide.  True if both of I's signatures verified for the first time on these bytes."""
        if self._m3 and hmac.compare_digest(message, self._m3):
            if self._step(ResponderEvent.M3_SAME, now) and self.state is not ResponderState.FETCH:
                self._repeat(carrier, now)
            return False
        first = self.state is ResponderState.HALF_OPEN
        bad = ResponderEvent.M3_BAD if first else ResponderEvent.M3R_BAD
        if step(RESPONDER, self.state, bad) is None or first != (kind is MessageType.M3):
            self.core.drop(DropReason.HANDSHAKE_STATE, f"{kind.name} in {self.state}")
            return False
        if first and ignore:
            self._step(ResponderEvent.M3_IGNORED, now)
            self.core.drop(DropReason.HANDSHAKE_STATE, "M3 while our own attempt moves")
            return False
        attempt = 0 if first else self.attempt + 1
        try:
            p3, th3 = self._read_m3(message, attempt)
        except BadPacket as error:
            self._step(bad, now)
            self.core.drop(DropReason.HANDSHAKE_AUTHENTICATION, f"{kind.name}: {error}")
            if first and self._bad >= timers.BAD_M3:
                self._step(ResponderEvent.TOO_MANY_BAD, now)
                self.discard()
            return False
        self._leave()  # the peer has proved itself: no longer one of the half-open
        self.attempt, self._m3, self.carrier = attempt, message, carrier
        self._policy = p3.body.policy
        self._lanes = lanes_said(p3.body.tlvs)
        self._th4 = schedule.th4(th3, message)
        if self.epoch is not None:
            self.core.alarm("key_mismatch", "the peer could not confirm a key: two key sources gave different bytes")
        self._forget_epoch(burn=True)
        self._decide(p3.body, first, now)
        return True

    def _read_m3(self, message: bytes, attempt: int) -> tuple[Signed[P3], bytes]:
        core, kex = self.core, self._kex
        if attempt > 2:
            raise BadPacket("more than two M3R")
        aad = self._th2 if attempt == 0 else schedule.retry_aad(self._th4, self._e4)
        plain = open_untrusted(self.suite, kex.hk_i, kex.iv_i, attempt, aad, message)
        self._bad += 1  # it decrypts, so whoever sent it made M1; a stranger's bytes do not count against the peer
        p3 = codec.decode_p3_untrusted(self.suite, plain)
        th3 = schedule.th3(self._th2, self._e2, p3.raw) if attempt == 0 else schedule.th3(self._th4, self._e4, p3.raw)
        if not verifies(core.parameters.peers[self.identity], labels.SIGN_INITIATOR, th3, p3.signatures):
            raise BadPacket("signature does not verify")
        if p3.body.attempt != attempt or (self._policy is not None and p3.body.policy != self._policy):
            raise BadPacket("attempt or policy is not that of this handshake")
        return p3, th3

    def _decide(self, body: P3, first: bool, now: float) -> None:
        core = self.core
        take, none, refuse = (
            (ResponderEvent.M3_KEY, ResponderEvent.M3_NONE, ResponderEvent.M3_REFUSE)
            if first
            else (ResponderEvent.M3R_KEY, ResponderEvent.M3R_NONE, ResponderEvent.M3R_REFUSE)
        )
        if not body.keys:
            outcome = policy.decide_none(
                core.parameters, body.policy, self._selected, now, core.degraded_allowed(now)
            )
            if outcome is Outcome.REFUSED:
                self._step(refuse, now)
                self._reply(P4(Outcome.REFUSED, Reason.POLICY), now)
            else:
                self._step(none, now)
                self._finish(outcome, None, None, now)
            return
        name = body.keys[0]
        if core.parameters.mode is Mode.PQC_ONLY or not policy.origin_allowed(core.parameters, name.origin):
            self._step(refuse, now)
            self._reply(P4(Outcome.REFUSED, Reason.POLICY), now)
            return
        self._step(take, now)
        self._fetch(name, body.tlvs.get(TLV_CLAIM), now)

    # the key

    def _fetch(self, name: KeyName, claim: bytes | None, now: float) -> None:
        core = self.core
        self._name = name
        if core.keys.used.has_id(name.key_id):
            core.alarm("key_repeated", "the peer named a key_ID that was used before")
            self._no_key(Reason.REUSED, now)
            return
        held = core.keys.fetched(name.key_id, now)
        if held is not None:
            core.give_way(name.key_id, self, now)
            self._use(held.key, held.since, now)
            return
        self.request = core.next_request()
        self.asked_at = now
        core.emit(NeedKey(self.request, Role.RESPONDER, name, claim))

    def on_key(self, request: int, answer: KeyMaterial | KeyFault, now: float) -> None:
        """The answer to NeedKey of this entry."""
        self.request = None
        if isinstance(answer, KeyFault):
            if answer is KeyFault.ROLLED_BACK:
                self.core.rolled_back = True
                self.core.alarm("rolled_back", "the peer has seen our key source further than its state says")
            elif answer is KeyFault.UNAUTHORISED:
                self.core.alarm("unauthorised", "our key source refuses us the peer's key")
            elif answer is KeyFault.REPEATED:
                self.core.alarm("key_repeated", "our key source gave a key that it had given before")
            self._no_key(REASONS[answer], now)
            return
        self.core.keys.hold_fetched(answer, self.asked_at)
        self._use(answer, self.asked_at, now)

    def _use(self, key: KeyMaterial, since: float, now: float) -> None:
        core = self.core
        if (key.origin, key.hops) != (self._name.origin, self._name.hops):
            core.alarm(
                "origin",
                f"the peer says {self._name.origin.name.lower()} over {self._name.hops} hops, "
                f"our source {key.origin.name.lower()} over {key.hops}",
            )
            core.keys.burn(key)
            self._no_key(Reason.ORIGIN, now)
        elif core.keys.used.has_key(key):
            core.alarm("key_repeated", "our key source gave key bytes that were used before")
            core.keys.burn(key)
            self._no_key(Reason.REUSED, now)
        else:
            self._step(ResponderEvent.KEY, now)
            self._finish(Outcome.OK, key, since, now)

    def _no_key(self, reason: Reason, now: float) -> None:
        self._step(ResponderEvent.NO_KEY, now)
        self._reply(P4(Outcome.RETRY_KEY, reason), now)

    # M4

    def _finish(self, outcome: Outcome, key: KeyMaterial | None, since: float | None, now: float) -> None:
        """Install for receiving, then send M4."""
        core = self.core
        names = (self._name,) if key else ()
        info = schedule.keys_info(names, core.parameters.sae_remote, core.parameters.sae_local)
        secret = bytes(key.material) if key else b""
        final = schedule.qkd_round(self._kex, secret, self._m3, outcome, info, self._th4)
        link = (
            Link(final.chain, self._epoch, since, key.origin)
            if key
            else next_link(final.chain, self._selected, self._epoch)
        )
        self._key = key
        self.epoch = EpochInfo(
            self.index,
            self._epoch,
            STATES[outcome],
            Role.RESPONDER,
            now,
            0.0,
            self.started,
            link,
            self._selected,
            key,
            self._name if key else None,
        )
        self.epoch.chain_expected = self._chain_expected
        self.epoch.identity = self.identity
        self.epoch.lanes = self._lanes
        core.install(self.epoch, self.suite, self.peer_index, final, now)
        if self.loses:
            self.lose()
        signatures = b""
        if outcome.degraded:
            signatures = sign(core.parameters.identity, labels.SIGN_DEGRADED, self._th4 + bytes([outcome]))
        self._reply(P4(outcome, Reason.NONE, final.confirm, signatures), now)

    def _reply(self, p4: P4, now: float) -> None:
        kex = self._kex
        self._e4 = seal(self.suite, kex.hk_r, kex.iv_r, 1 + self.attempt, self._th4, codec.encode_p4(p4))
        self._compose(MessageType.M4, self._e4)
        self._send(now)

    # ends

    def lose(self) -> None:
        """Our own handshake won: receive on this epoch, never send."""
        self.loses = True
        if self.epoch is not None:
            self.epoch.link = Link(b"", self.epoch.number)  # its C_next is erased
            self.core.hold(self.epoch)

    def confirmed(self, now: float) -> None:
        """The first record under the epoch verified."""
        self._step(ResponderEvent.FIRST_RECORD, now)
        self.core.port.becomes_epoch(self.index)
        self._leave()

    def expire(self, now: float) -> None:
        """Too late: the unconfirmed epoch goes with the entry, a fetched key stays held for its 60 s."""
        self._step(ResponderEvent.EXPIRE, now)
        self._forget_epoch(burn=False)
        self.core.port.release(self.index)
        self._leave()

    def discard(self) -> None:
        """Let go in any state: the machine stops, or the peer said CLOSE.  The epoch is the caller's to erase."""
        self.core.port.release(self.index)
        self._leave()

    def drop_key(self, key_id: str, now: float) -> bool:
        """Give way to a newer handshake that was offered the same held key."""
        if self.epoch is None or self.epoch.name is None or self.epoch.name.key_id != key_id:
            return False
        self.expire(now)
        return True

    def _forget_epoch(self, burn: bool) -> None:
        epoch, self.epoch = self.epoch, None
        if epoch is None:
            return
        if burn and epoch.key is not None:
            self.core.keys.burn(epoch.key)
        self.core.erase(epoch, keep_index=True)

    def _leave(self) -> None:
        if self.source is not None:
            self.core.port.leave(self.source)
            self.source = None

    # sending

    def _compose(self, kind: MessageType, body: bytes) -> None:
        message_id = self.core.random.token(4)
        self._out = Outgoing(kind, self.suite.code, self.index, self.peer_index, message_id, body)
        self._answers.clear()

    def _repeat(self, carrier: Carrier, now: float) -> None:
        """Back to where the question came from; what one address uses up, another still has."""
        to = carrier.address if isinstance(carrier, Cold) else None
        if to not in self._answers and len(self._answers) >= _ADDRESSES:
            self.core.drop(DropReason.HANDSHAKE_BUDGET, "answer asked for from too many addresses")
            return
        answers = self._answers.setdefault(to, _Answers())
        if answers.left <= 0 or now - answers.at < timers.ANSWER_SPACING:
            self.core.drop(DropReason.HANDSHAKE_BUDGET, "answer repeated too often")
            return
        answers.left, answers.at = answers.left - 1, now
        self.core.answer(self._out, carrier, self.peer_index)

    def _send(self, now: float) -> None:
        to = self.carrier.address if isinstance(self.carrier, Cold) else None
        self._answers[to] = _Answers(at=now)
        self.core.answer(self._out, self.carrier, self.peer_index)

    def _step(self, event: ResponderEvent, now: float) -> bool:
        """Follow the table; False and a count where it has no such row."""
        after = step(RESPONDER, self.state, event)
        if after is None:
            self.core.drop(DropReason.HANDSHAKE_STATE, f"{event} in {self.state}")
            return False
        if after is not self.state or event is ResponderEvent.M1:
            self.expires = now + _LIVES.get(after, 0.0)
        self.state = after
        return True
