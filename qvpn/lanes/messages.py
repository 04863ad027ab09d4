"""What the daemon and the process of a lane say to each other, one message a datagram of a private socket pair.

::

    kind u8 | length of the secret u8 | secret | facts as JSON

Only :class:`Install` has a secret: two record keys.  Decoders raise :class:`~qvpn.errors.BadPacket`, nothing else:
both ends are this program, but a process that sends nonsense must end with a sentence, not with a traceback.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qvpn.errors import BadPacket
from qvpn.netio.base import Address
from qvpn.tunnel.allowedips import IPNetwork
from qvpn.tunnel.keys import Cipher, EpochState

MAX_MESSAGE = 4 << 20
"""Bytes; the allowed networks of all peers are in one."""
KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class PeerSetup:
    """One peer, as its lane needs to know it.  Times in seconds."""

    name: str
    allowed_ips: tuple[IPNetwork, ...]
    overlap: float
    keepalive: float


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message of all: which lane this is, and for whom."""

    lane: int
    peers: tuple[PeerSetup, ...]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the peer's lane is to be looked for; None: nowhere."""

    peer: str
    address: Address | None


@dataclass(frozen=True, slots=True)
class Install:
    """One epoch's keys of this lane.  Indexes have the lane in them; ``hard_end`` is on CLOCK_BOOTTIME."""

    peer: str
    number: int
    receive_index: int
    send_index: int
    cipher: Cipher
    state: EpochState
    hard_end: float
    usable: bool
    """We may send on it at once: we are the initiator."""
    send_key: bytes = field(repr=False)
    receive_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Usable:
    """The peer has shown on lane 0 that it has this epoch."""

    peer: str
    receive_index: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Never send on this epoch again."""

    peer: str
    receive_index: int


@dataclass(frozen=True, slots=True)
class Erase:
    """Erase one epoch now, or all of the peer's."""

    peer: str
    receive_index: int | None


@dataclass(frozen=True, slots=True)
class PathSize:
    """What lane 0 has found of the path to a peer: bytes of UDP payload, which may be about to change."""

    peer: str
    payload: int
    provisional: bool


COUNTS = (
    "sent_bytes",
    "sent_packets",
    "sent_records",
    "received_bytes",
    "received_packets",
    "received_records",
    "opened",
    "marked",
    "source_checks",
    "tun_writes",
    "tun_refused",
)
"""The counters of :class:`LaneTraffic`, which have the names and meanings of those of ``dataplane.stats``."""


@dataclass(frozen=True, slots=True)
class LaneTraffic:
    """One peer on one lane: what one process counted since it started."""

    up: bool = False
    """It has an address that was proved, and an epoch to send on."""
    endpoint: str | None = None
    sent_bytes: int = 0
    sent_packets: int = 0
    sent_records: int = 0
    received_bytes: int = 0
    received_packets: int = 0
    received_records: int = 0
    opened: int = 0
    marked: int = 0
    source_checks: int = 0
    tun_writes: int = 0
    tun_refused: int = 0
    drops: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """From the lane's process: how it stands.  Sent every second, and at once when something changed."""

    peers: dict[str, LaneTraffic]
    drops: dict[str, int]
    send_errors: dict[str, int]
    limits: tuple[tuple[str, int], ...] = ()
    """Epochs (peer, receive index) of which so much is used that a new one is wanted."""


Message = Setup | Endpoint | Install | Usable | Hold | Erase | Report | PathSize

_KINDS: tuple[type[Message], ...] = (Setup, Endpoint, Install, Usable, Hold, Erase, Report, PathSize)


def encode(message: Message) -> bytearray:
    """One datagram.  The caller overwrites it once it is sent: it may hold keys."""
    secret = b""
    if isinstance(message, Install):
        secret = message.send_key + message.receive_key
    facts = json.dumps(_TO_JSON[type(message)](message), separators=(",", ":")).encode()
    return bytearray([_KINDS.index(type(message)), len(secret)]) + secret + facts


def decode(data: bytes | bytearray | memoryview) -> Message:
    """Raises :class:`BadPacket`."""
    if len(data) < 2 or data[0] >= len(_KINDS):
        raise BadPacket("a message between daemon and lane that cannot be one")
    kind, length = _KINDS[data[0]], data[1]
    secret, facts = bytes(data[2 : 2 + length]), bytes(data[2 + length :])
    if length != (2 * KEY_BYTES if kind is Install else 0):
        raise BadPacket("a message between daemon and lane with keys of the wrong length")
    try:
        return _FROM_JSON[kind](json.loads(facts), secret)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise BadPacket(f"a message {kind.__name__} between daemon and lane that does not parse") from None


def _address_out(address: Address | None) -> list[Any] | None:
    return None if address is None else [str(address.ip), address.port, address.scope]


def _address_in(value: Any) -> Address | None:
    if value is None:
        return None
    ip, port, scope = value
    return Address(ipaddress.ip_address(ip), int(port), int(scope))


def _setup_out(setup: Setup) -> dict[str, Any]:
    peers = [
        [peer.name, [str(net) for net in peer.allowed_ips], peer.overlap, peer.keepalive] for peer in setup.peers
    ]
    return {"lane": setup.lane, "peers": peers}


def _setup_in(facts: Any, _secret: bytes) -> Setup:
    return Setup(
        int(facts["lane"]),
        tuple(
            PeerSetup(str(name), tuple(ipaddress.ip_network(net) for net in nets), float(overlap), float(keepalive))
            for name, nets, overlap, keepalive in facts["peers"]
        ),
    )


def _install_out(install: Install) -> dict[str, Any]:
    return {
        "peer": install.peer,
        "number": install.number,
        "receive_index": install.receive_index,
        "send_index": install.send_index,
        "cipher": install.cipher.value,
        "state": install.state.value,
        "hard_end": install.hard_end,
        "usable": install.usable,
    }


def _install_in(facts: Any, secret: bytes) -> Install:
    return Install(
        peer=str(facts["peer"]),
        number=int(facts["number"]),
        receive_index=int(facts["receive_index"]),
        send_index=int(facts["send_index"]),
        cipher=Cipher(facts["cipher"]),
        state=EpochState(facts["state"]),
        hard_end=float(facts["hard_end"]),
        usable=bool(facts["usable"]),
        send_key=secret[:KEY_BYTES],
        receive_key=secret[KEY_BYTES:],
    )


def _report_out(report: Report) -> dict[str, Any]:
    fields = LaneTraffic.__dataclass_fields__
    return {
        "peers": {name: {key: getattr(traffic, key) for key in fields} for name, traffic in report.peers.items()},
        "drops": report.drops,
        "send_errors": report.send_errors,
        "limits": report.limits,
    }


def _report_in(facts: Any, _secret: bytes) -> Report:
    return Report(
        {str(name): _traffic_in(traffic) for name, traffic in facts["peers"].items()},
        _counts(facts["drops"]),
        _counts(facts["send_errors"]),
        tuple((str(peer), int(index)) for peer, index in facts["limits"]),
    )


def _traffic_in(facts: Any) -> LaneTraffic:
    return LaneTraffic(**{**facts, "drops": _counts(facts["drops"])})


def _counts(facts: Any) -> dict[str, int]:
    return {str(name): int(count) for name, count in facts.items()}


_TO_JSON: dict[type[Message], Callable[[Any], Any]] = {
    Setup: _setup_out,
    Endpoint: lambda message: [message.peer, _address_out(message.address)],
    Install: _install_out,
    Usable: lambda message: [message.peer, message.receive_index],
    Hold: lambda message: [message.peer, message.receive_index],
    Erase: lambda message: [message.peer, message.receive_index],
    Report: _report_out,
    PathSize: lambda message: [message.peer, message.payload, message.provisional],
}

_FROM_JSON: dict[type[Message], Callable[[Any, bytes], Message]] = {
    Setup: _setup_in,
    Endpoint: lambda facts, _: Endpoint(str(facts[0]), _address_in(facts[1])),
    Install: _install_in,
    Usable: lambda facts, _: Usable(str(facts[0]), int(facts[1])),
    Hold: lambda facts, _: Hold(str(facts[0]), int(facts[1])),
    Erase: lambda facts, _: Erase(str(facts[0]), None if facts[1] is None else int(facts[1])),
    Report: _report_in,
    PathSize: lambda facts, _: PathSize(str(facts[0]), int(facts[1]), bool(facts[2])),
}
