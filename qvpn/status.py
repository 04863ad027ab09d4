"""What the daemon tells about itself: frozen snapshots, and their JSON form (``schema`` 1).

Within one schema number fields are added, never renamed or removed.  Times are seconds; a time span that has no
value now is ``null``.  Nothing here is secret: of a key_ID only a hash is shown, the same at both ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field

SCHEMA = 1
SIMULATED = "SIMULATED: no quantum security"


@dataclass(frozen=True, slots=True)
class EpochView:
    """The epoch that a peer's packets leave under."""

    number: int
    state: str
    role: str
    """Who we were in its handshake: ``initiator`` or ``responder``."""
    age: float
    hard_end_in: float
    next_rekey_in: float | None
    origin: str | None
    """Where its key was made; None where no key of a source is in it."""
    key_id_hash: str | None
    """First 8 hexadecimal digits of SHA-256 of the key_ID: equal at both ends."""
    simulated: str | None
    """:data:`SIMULATED` while the epoch rests on a simulated key."""


@dataclass(frozen=True, slots=True)
class PeerLaneView:
    """One peer on one lane; lane 0 is the daemon itself."""

    number: int
    up: bool
    """Packets leave on it: it has an epoch to send on and an address that was proved."""
    endpoint: str | None
    sent_packets: int
    sent_bytes: int
    received_packets: int
    received_bytes: int
    drops: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LaneView:
    """The process of one lane beside lane 0."""

    number: int
    port: int
    """UDP."""
    pid: int | None
    up: bool
    """Its process runs and takes keys."""
    used: bool
    """The kernel gives packets to it: some peer can be reached on it."""
    restarts: int
    reason: str
    """How its process ended the last time; empty while it never did."""


@dataclass(frozen=True, slots=True)
class PathView:
    """What the path to a peer carries, in our direction; sizes in bytes of IP packets."""

    mtu: int
    """Of outer packets."""
    inner_mtu: int
    """Of inner packets that need not be cut."""
    link_mtu: int
    """Of the first link: what is used at most."""
    found: str
    """``link``: assumed from the first link; ``searching``: it did not pass, better is looked for; ``probe``: the
    peer got datagrams of this size."""
    age: float
    """Seconds since it changed."""
    probes: int
    answers: int
    falls: int
    """How often a size that used to pass passed no more."""
    echoed: int
    """Probes of the peer that were answered."""


@dataclass(frozen=True, slots=True)
class PeerView:
    """One peer."""

    name: str
    state: str
    """``qkd``, ``chained``, ``pqc`` or ``blocked``."""
    policy: str
    fingerprint: str
    endpoint: str | None
    key_source: str | None
    epoch: EpochView | None
    simulated: str | None
    last_handshake: float | None
    """Seconds since the newest epoch was confirmed."""
    rekeys: int
    """Epochs confirmed after the first one."""
    epochs: int
    """Epochs confirmed."""
    keys_used: int
    """Keys of the source that are in confirmed epochs."""
    handshake_seconds: float | None
    """How long the newest handshake took."""
    failures: int
    last_failure: str | None
    alarms: int
    last_alarm: str | None
    sent_packets: int
    sent_bytes: int
    received_packets: int
    received_bytes: int
    last_received: float | None
    """Seconds since the last record verified."""
    opened: int
    """Records opened since the start."""
    marked: int
    """Counters marked in the replay windows: as many as ``opened``."""
    source_checks: int
    """Inner packets and superpackets whose source address is the peer's: as many as the next two together."""
    tun_writes: int
    tun_refused: int
    path: PathView | None = None
    """None: the peer's address is not known."""
    drops: dict[str, int] = field(default_factory=dict)
    """Of all lanes, as the counters above."""
    carrier: str | None = None
    """Transport in use; None while the peer's address is not known."""
    transports: tuple[str, ...] = ()
    """What the configuration allows, the preferred one first."""
    carrier_changes: int = 0
    lanes: tuple[PeerLaneView, ...] = ()
    """Each lane; none where there is only lane 0."""


@dataclass(frozen=True, slots=True)
class SourceView:
    """One key source, as it last said."""

    name: str
    type: str
    ready: bool
    reason: str
    origin: str | None
    hop: str
    survives_harvest: bool
    stored_keys: int | None
    key_rate: float | None
    qber: float | None
    alarm: str | None
    restarts: int
    """How often it was opened again, or its process (``simulated``) started again."""
    lasts: float | None = None
    """Seconds that the stored keys last at the peers' rekey intervals when none arrives; None where none can tell."""


@dataclass(frozen=True, slots=True)
class SiteView:
    """The whole daemon."""

    site: str
    pid: int
    version: str
    uptime: float
    fingerprint: str
    listen: str
    interface: str
    mtu: int
    peers: tuple[PeerView, ...]
    key_sources: tuple[SourceView, ...]
    drops: dict[str, int] = field(default_factory=dict)
    send_errors: dict[str, int] = field(default_factory=dict)
    lanes: tuple[LaneView, ...] = ()
    """Processes of the lanes beside lane 0."""
    queues: dict[str, float] = field(default_factory=dict)
    """What waits, or waited, in front of the daemon's own packet path (lane 0), by the names of ``QueueStatus``."""
    carriers: dict[str, dict[str, int]] = field(default_factory=dict)
    """What each transport other than UDP counted."""

    def to_json(self) -> dict[str, object]:
        """Plain values for ``json.dumps``."""
        return {"schema": SCHEMA, **_plain(dataclasses.asdict(self))}


def _plain(value: dict[str, object]) -> dict[str, object]:
    return {key: _value(entry) for key, entry in value.items()}


def _value(value: object) -> object:
    if isinstance(value, dict):
        return _plain(value)
    if isinstance(value, list | tuple):
        return [_value(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6)
    return value


def key_id_hash(key_id: str) -> str:
    """What status and log show of a key_ID: enough to compare both ends, nothing to fetch a key with."""
    return hashlib.sha256(key_id.encode()).hexdigest()[:8]
