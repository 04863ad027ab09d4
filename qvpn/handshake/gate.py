"""The gate of the port: which peer sent this handshake datagram, and may it cost us anything?

One :class:`Gate` per daemon.  It finds the peer by mac1 (within a budget for strange addresses), demands a cookie,
answers an M1 without one by RETRY, and puts fragments together (PROTOCOL.md, chapter 3).  The driver does what it
returns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from qvpn.errors import BadPacket
from qvpn.handshake.carrier import Cold, UdpAddress
from qvpn.handshake.cookie import CookieJar
from qvpn.handshake.parameters import PeerParameters, Randomness
from qvpn.handshake.port import ATTEMPT, ENTRY, Port, source_prefix
from qvpn.handshake.schedule import NO_PSK
from qvpn.tunnel.drops import DropReason
from qvpn.wire import datagram as wire
from qvpn.wire.fragments import Reassembler
from qvpn.wire.messages import MessageType

TRIALS_PER_SOURCE = 200
TRIALS_TOTAL = 5000
QUESTIONS_TOTAL, QUESTIONS_RESERVED = 64, 8
"""M1, M3 and M3R in parts at a time, and how many of these only known endpoints get."""
QUESTIONS_PER_PEER, QUESTIONS_PER_SOURCE = 16, 2
ANSWERS_TOTAL, ANSWERS_PER_PEER, ANSWERS_PER_SOURCE = 512, 4, 2
REMEMBERED = 4096
"""Addresses and sources remembered at the most."""

_FROM_INITIATOR = (MessageType.M1, MessageType.M3, MessageType.M3R)


@dataclass(frozen=True, slots=True)
class Complete:
    """Hand it on: ``machines[peer].receive(message_type, message, carrier, now)``."""

    peer: str
    message_type: MessageType
    message: bytes = field(repr=False)
    carrier: Cold


@dataclass(frozen=True, slots=True)
class Reply:
    """Send this RETRY to the address the datagram came from."""

    peer: str
    datagram: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """A fragment; the rest of its message is still to come."""

    peer: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """Count it; ``peer`` is None where no peer's mac1 fits."""

    reason: DropReason
    peer: str | None = None


Verdict = Complete | Reply | Stored | Dropped


@dataclass(frozen=True, slots=True)
class _Peer:
    name: str
    suites: tuple[int, ...]
    theirs: tuple[bytes, ...] = field(repr=False)
    """Gate key of each public identity of the peer as sender."""
    ours: tuple[bytes, ...] = field(repr=False)
    """Our gate key towards each."""

    def identity(self, datagram: wire.Datagram) -> int | None:
        for place, key in enumerate(self.theirs):
            if datagram.mac1_fits(key):
                return place
        return None


class Budget:
    """mac1 trials for unknown addresses: so many a second per source and in all."""

    def __init__(self) -> None:
        self._second = 0
        self._spent: dict[Hashable, int] = {}
        self._total = 0

    def allows(self, source: Hashable, trials: int, now: float) -> bool:
        if int(now) != self._second:
            self._second, self._spent, self._total = int(now), {}, 0
        spent = self._spent.get(source, 0)
        if spent >= TRIALS_PER_SOURCE or self._total >= TRIALS_TOTAL:
            return False
        self._spent[source] = spent + trials
        self._total += trials
        return True


class Gate:
    """All peers of one port."""

    def __init__(self, port: Port, randomness: Randomness, now: float) -> None:
        self._port = port
        self._random = randomness
        self._cookies = CookieJar(randomness.token, now)
        self._budget = Budget()
        self._peers: dict[str, _Peer] = {}
        self._endpoints: dict[str, UdpAddress] = {}
        self._seen: OrderedDict[UdpAddress, str] = OrderedDict()
        self._answers = Reassembler(ANSWERS_TOTAL)
        self._questions = Reassembler(QUESTIONS_TOTAL)

    def add_peer(self, parameters: PeerParameters) -> None:
        """Raises ValueError if the name is taken."""
        if parameters.name in self._peers:
            raise ValueError(f"peer {parameters.name!r} is there already")
        own = parameters.identity.public.fingerprint
        psk = parameters.psk or NO_PSK
        prints = [peer.fingerprint for peer in parameters.peers]
        self._peers[parameters.name] = _Peer(
            parameters.name,
            parameters.suites,
            tuple(wire.gate_key(psk, own, theirs, theirs) for theirs in prints),
            tuple(wire.gate_key(psk, own, theirs, own) for theirs in prints),
        )

    def set_endpoint(self, name: str, address: UdpAddress | None) -> None:
        """The peer's address, from configuration or roaming; call it whenever it changes."""
        if address is None:
            self._endpoints.pop(name, None)
        else:
            self._endpoints[name] = address

    def receive(self, data: bytes, address: UdpAddress, now: float) -> Verdict:
        """Judge one datagram whose first byte is 1 to 6."""
        try:
            datagram = wire.decode_untrusted(data)
        except BadPacket:
            return Dropped(DropReason.HANDSHAKE_MALFORMED)
        found = self._find(datagram, address, now)
        if isinstance(found, DropReason):
            return Dropped(found)
        peer, identity = found
        if datagram.suite not in peer.suites:
            return Dropped(DropReason.HANDSHAKE_MALFORMED, peer.name)
        if datagram.type in _FROM_INITIATOR and not any(
            datagram.mac2_fits(cookie) for cookie in self._cookies.valid(address, now)
        ):
            return self._without_cookie(datagram, peer, identity, address, now)
        self._remember(address, peer.name)
        carrier = Cold(
            address,
            datagram.suite,
            datagram.sender,
            datagram.receiver,
            datagram.message_id,
            configured=self._endpoints.get(peer.name) == address,
            identity=identity,
        )
        if datagram.type is MessageType.RETRY:
            return Complete(peer.name, MessageType.RETRY, datagram.raw, carrier)
        return self._assemble(datagram, peer, carrier, now)

    def _find(self, datagram: wire.Datagram, address: UdpAddress, now: float) -> tuple[_Peer, int] | DropReason:
        """The peer whose mac1 fits and which of its identities."""
        if datagram.type is not MessageType.M1:
            waits = ATTEMPT if datagram.type not in _FROM_INITIATOR else ENTRY
            peer = self._peers.get(self._port.owner(datagram.receiver, waits) or "")
            identity = peer.identity(datagram) if peer else None
            if peer is None or identity is None:
                return DropReason.HANDSHAKE_UNKNOWN_PEER
            return peer, identity
        known = dict.fromkeys(self._known(address))
        for name in known:
            identity = self._peers[name].identity(datagram)
            if identity is not None:
                return self._peers[name], identity
        others = [peer for name, peer in self._peers.items() if name not in known]
        if not others:
            return DropReason.HANDSHAKE_UNKNOWN_PEER
        trials = sum(len(peer.theirs) for peer in others)
        if not self._budget.allows(source_prefix(address.ip), trials, now):
            return DropReason.HANDSHAKE_BUDGET
        # a random start spreads the cost of being last over all peers
        start = int(self._random.uniform() * len(others))
        for peer in others[start:] + others[:start]:
            identity = peer.identity(datagram)
            if identity is not None:
                return peer, identity
        return DropReason.HANDSHAKE_UNKNOWN_PEER

    def _known(self, address: UdpAddress) -> Iterator[str]:
        seen = self._seen.get(address)
        if seen in self._peers and seen is not None:
            yield seen
        for name, endpoint in self._endpoints.items():
            if endpoint == address:
                yield name

    def _remember(self, address: UdpAddress, name: str) -> None:
        self._seen[address] = name
        self._seen.move_to_end(address)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def _without_cookie(
        self, datagram: wire.Datagram, peer: _Peer, identity: int, address: UdpAddress, now: float
    ) -> Verdict:
        """RETRY is smaller than any fragment that causes it, so nobody is flooded through us."""
        if datagram.type is not MessageType.M1 or datagram.index != 0 or len(datagram.raw) < wire.RETRY_BYTES:
            return Dropped(DropReason.HANDSHAKE_COOKIE, peer.name)
        cookie = self._cookies.cookie(address, now)
        return Reply(peer.name, wire.encode_retry(datagram, peer.ours[identity], cookie, self._random.token(16)))

    def _assemble(self, datagram: wire.Datagram, peer: _Peer, carrier: Cold, now: float) -> Verdict:
        """The known endpoint has places of its own, so that strangers cannot take them."""
        key = (peer.name, carrier.address, datagram.type, datagram.sender, datagram.message_id)
        question = datagram.type in _FROM_INITIATOR
        pool = self._questions if question else self._answers
        per_source, per_peer = (
            (QUESTIONS_PER_SOURCE, QUESTIONS_PER_PEER) if question else (ANSWERS_PER_SOURCE, ANSWERS_PER_PEER)
        )
        if carrier.configured:
            limits: tuple[tuple[Hashable, int], ...] = ((("endpoint", peer.name), per_source),)
        else:
            source = source_prefix(carrier.address.ip)
            limits = ((("source", source), per_source), (("peer", peer.name), per_peer))
        reserved = QUESTIONS_RESERVED if question and not carrier.configured else 0
        try:
            message = pool.add(key, limits, datagram, now, reserved=reserved)
        except BadPacket:
            return Dropped(DropReason.HANDSHAKE_MALFORMED, peer.name)
        if message is None:
            return Stored(peer.name)
        return Complete(peer.name, datagram.type, message, carrier)
