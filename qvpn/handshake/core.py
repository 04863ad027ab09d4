"""What initiator, responder and machine of one peer share: events out, sending, chain, keys, epochs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qvpn.config.schema import MAX_LANES
from qvpn.crypto.suites import SUITES, Suite
from qvpn.handshake import timers
from qvpn.handshake.carrier import Carrier, Cold
from qvpn.handshake.chain import Chain, Link
from qvpn.handshake.cookie import CookieBox
from qvpn.handshake.events import (
    Alarm,
    ChainBroken,
    Confirmed,
    Dropped,
    Erase,
    Event,
    Hold,
    Install,
    Role,
    SendCold,
    SendInner,
)
from qvpn.handshake.keyring import Keyring
from qvpn.handshake.parameters import KeyMaterial, PeerParameters, Randomness
from qvpn.handshake.port import Port
from qvpn.handshake.schedule import NO_PSK, Final
from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import EpochKeys, EpochState
from qvpn.wire.datagram import Outgoing, gate_key
from qvpn.wire.messages import TLV_CLAIM, TLV_LANES, KeyName, Mode, Outcome, Policy, WireOrigin

STATES = {Outcome.OK: EpochState.QKD, Outcome.CHAINED: EpochState.CHAINED, Outcome.ABSENT: EpochState.PQC}


def lanes_said(tlvs: Mapping[int, bytes]) -> int:
    """How many lanes the sender of these TLVs can receive on (PROTOCOL.md, chapter 4)."""
    value = tlvs.get(TLV_LANES, b"")
    return min(max(value[0], 1), MAX_LANES) if value else 1


@dataclass(slots=True)
class EpochInfo:
    """An epoch that the packet path has from us."""

    index: bytes
    number: int
    state: EpochState
    role: Role
    installed: float
    hard_end: float
    started: float
    link: Link = field(repr=False)
    selected: Link | None = field(repr=False)
    key: KeyMaterial | None = field(repr=False)
    name: KeyName | None = None
    confirmed: bool = False
    held: bool = False
    lanes: int = 1
    """How many the peer says that it can receive on."""
    identity: int = 0
    """Which of the peer's public identities it was agreed with."""
    chain_expected: bool = False
    """R had a chain when M1 came, so that one without is worth a word."""

    @property
    def receive_index(self) -> int:
        return int.from_bytes(self.index, "big")

    @property
    def simulated(self) -> bool:
        """Whether the epoch rests on a simulated key, its own or its chain's."""
        if self.name is not None:
            return self.name.origin is WireOrigin.SIMULATED
        return self.state is EpochState.CHAINED and self.link.qkd_origin is WireOrigin.SIMULATED


class Core:
    """Shared by the roles of one peer."""

    def __init__(self, parameters: PeerParameters, randomness: Randomness, port: Port, now: float) -> None:
        self.parameters = parameters
        self.datagram_limit = parameters.datagram_limit
        self.cookies = CookieBox()
        self.random = randomness
        self.port = port
        self.events: deque[Event] = deque()
        self.chain = Chain()
        self.keys = Keyring()
        self.bucket = timers.Bucket(parameters.rekey, now)
        self.epochs: dict[int, EpochInfo] = {}
        self.sending: EpochInfo | None = None
        self.ready = False
        self.claim: bytes | None = None
        self.rolled_back = False
        self.degraded_since: float | None = None
        self.give_way: Callable[[str, object, float], None] = lambda key_id, entry, now: None
        """Erase the unconfirmed epoch of another entry that has this held key."""
        self.identity = 0
        """Which public identity of the peer the next cold attempt tries."""
        self.requests = 0
        self.fingerprint = parameters.identity.public.fingerprint
        self.peer_prints = tuple(peer.fingerprint for peer in parameters.peers)
        psk = parameters.psk or NO_PSK
        self.own_gate = tuple(gate_key(psk, self.fingerprint, peer, self.fingerprint) for peer in self.peer_prints)
        self.peer_gate = tuple(gate_key(psk, self.fingerprint, peer, peer) for peer in self.peer_prints)

    # what both roles say

    def suite(self, code: int) -> Suite:
        return SUITES[code]

    def policy(self) -> Policy:
        ready = self.ready and not self.rolled_back and self.parameters.mode is not Mode.PQC_ONLY
        return Policy(self.parameters.mode, ready, self.parameters.max_qkd_age)

    def tlvs(self) -> dict[int, bytes]:
        tlvs = {}
        if self.parameters.lanes > 1:
            tlvs[TLV_LANES] = bytes([self.parameters.lanes])
        if self.claim and self.parameters.mode is not Mode.PQC_ONLY:
            tlvs[TLV_CLAIM] = self.claim
        return tlvs

    def next_request(self) -> int:
        self.requests += 1
        return self.requests

    # events

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def drop(self, reason: DropReason, detail: str = "") -> None:
        self.emit(Dropped(reason, detail))

    def alarm(self, kind: str, detail: str) -> None:
        self.emit(Alarm(kind, detail))

    def answer(self, message: Outgoing, carrier: Carrier, handshake_index: bytes) -> None:
        """R: the same way back that the question came."""
        if isinstance(carrier, Cold):
            datagrams = message.datagrams(self.own_gate[carrier.identity], None, self.datagram_limit)
            self.emit(SendCold(datagrams, carrier.address))
        else:
            self.emit(SendInner(carrier.receive_index, message.payloads(handshake_index)))

    def tell(self, info: EpochInfo, payload: bytes) -> None:
        """A control message of one record inside this epoch."""
        self.emit(SendInner(info.receive_index, (payload,)))

    # degraded time

    def degraded_allowed(self, now: float) -> bool:
        """Whether ``max_degraded`` still lets this side run without a key."""
        limit = self.parameters.max_degraded
        return limit is None or self.degraded_since is None or now - self.degraded_since < limit

    def _hard_end(self, state: EpochState, now: float) -> float:
        end = now + self.parameters.hard_end
        limit = self.parameters.max_degraded
        if state is not EpochState.PQC or limit is None or self.parameters.mode is Mode.PQC_ONLY:
            return end
        return min(end, (self.degraded_since if self.degraded_since is not None else now) + limit)

    # epochs

    def install(self, info: EpochInfo, suite: Suite, send_index: bytes, final: Final, now: float) -> None:
        """Give an epoch to the packet path."""
        initiator = info.role is Role.INITIATOR
        info.hard_end = self._hard_end(info.state, now)
        self.epochs[info.receive_index] = info
        keys = EpochKeys(
            number=info.number,
            receive_index=info.receive_index,
            send_index=int.from_bytes(send_index, "big"),
            cipher=suite.cipher,
            state=info.state,
            hard_end=info.hard_end,
            initiator=initiator,
            send_key=lambda lane: final.record_key(initiator, lane),
            receive_key=lambda lane: final.record_key(not initiator, lane),
            lanes=min(self.parameters.lanes, info.lanes),
        )
        self.emit(Install(keys))

    def hold(self, info: EpochInfo) -> None:
        info.held = True
        self.emit(Hold(info.receive_index))
        if self.sending is info:
            others = [other for other in self.epochs.values() if other.confirmed and not other.held]
            self.sending = max(others, key=lambda other: other.installed, default=None)

    def confirm(self, info: EpochInfo, now: float) -> None:
        """The first record under the epoch has verified."""
        info.confirmed = True
        if info.role is Role.RESPONDER and not info.held:
            if info.selected is None and info.chain_expected:
                self.emit(ChainBroken())
            self.chain.advance(info.link, info.selected)
        if not info.held and (self.sending is None or self.sending.installed <= info.installed):
            self.sending = info  # the order of installation decides, as in the packet path
        self.chain.confirmed(info.link)
        if info.key is not None:
            self.keys.confirm(info.key)
            info.key = None
        if info.state is EpochState.PQC:
            if self.degraded_since is None:
                self.degraded_since = now
        else:
            self.degraded_since = None
        self.emit(
            Confirmed(info.receive_index, info.number, info.state, info.role, info.name, info.started, info.simulated)
        )

    def erase(self, info: EpochInfo, *, keep_index: bool = False) -> None:
        """Take an epoch from the packet path; ``keep_index`` where an entry goes on under its index."""
        if self.epochs.pop(info.receive_index, None) is None:
            return
        if not keep_index:
            self.port.release(info.index)
        if info.key is not None and info.role is Role.INITIATOR:
            self.keys.burn(info.key)  # accepted, never confirmed: R's copy is held there, ours is of no more use
            info.key = None
        self.emit(Erase(info.receive_index))
        if self.sending is info:
            others = [other for other in self.epochs.values() if other.confirmed and not other.held]
            self.sending = max(others, key=lambda other: other.installed, default=None)
