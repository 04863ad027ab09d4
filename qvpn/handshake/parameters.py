"""What the machine is told about one peer: configuration, not protocol state."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from qvpn.config.identity import Identity, PublicIdentity
from qvpn.config.schema import Initiate as Initiate
from qvpn.crypto.kem import HybridKem, Kem
from qvpn.crypto.suites import SUITES
from qvpn.handshake import timers
from qvpn.wire.datagram import DEFAULT_LIMIT
from qvpn.wire.messages import Mode, WireOrigin


class KeyFault(enum.Enum):
    """Why a key source gave no key, as far as the protocol cares."""

    UNAVAILABLE = "unavailable"  # it said "not now" and consumed nothing
    BROKEN = "broken"  # a timeout, a broken connection, a bad answer: the key may be gone
    REPEATED = "repeated"  # it gave a key or a key_ID that it had given before
    UNKNOWN = "unknown"
    UNAUTHORISED = "unauthorised"
    ROLLED_BACK = "rolled_back"


@dataclass(slots=True)
class KeyMaterial:
    """A key from the source with the names of both ends there.  ``material`` is wiped by the machine."""

    key_id: str
    origin: WireOrigin
    hops: int
    material: bytearray = field(repr=False)


@dataclass(frozen=True, slots=True)
class PeerParameters:
    """Times in seconds."""

    name: str
    identity: Identity
    peers: tuple[PublicIdentity, ...]
    """The peer's public identities; several while one rolls over.  The first decides *preferred*."""
    psk: bytes | None = field(default=None, repr=False)
    suites: tuple[int, ...] = (1,)
    """Accepted suites; the first is offered.  All of the identity's level."""
    mode: Mode = Mode.REQUIRE_QKD
    max_qkd_age: int = 0
    max_degraded: float | None = None
    allow_simulated: bool = False
    rekey: float = 60.0
    hard_end: float = 180.0
    initiate: Initiate = Initiate.AUTO
    keepalive: float | None = None
    """None: min(10 s, rekey)."""
    has_endpoint: bool = True
    label: str = "main"
    sae_local: str = ""
    sae_remote: str = ""
    lanes: int = 1
    datagram_limit: int = DEFAULT_LIMIT

    @property
    def keepalive_after(self) -> float:
        return timers.keepalive(self.rekey) if self.keepalive is None else self.keepalive

    def __post_init__(self) -> None:
        levels = {SUITES[code].level for code in self.suites} | {peer.level for peer in self.peers}
        if not self.suites or not self.peers or levels != {self.identity.level}:
            raise ValueError("suites, own identity and the peer's identities are not of one level")

    @property
    def preferred(self) -> bool:
        """Whether we are the preferred initiator: the smaller fingerprint."""
        return self.identity.public.fingerprint < self.peers[0].fingerprint


@dataclass(frozen=True, slots=True)
class Randomness:
    """Where chance comes from; vectors and simulations put their own in."""

    token: Callable[[int], bytes]
    """That many unpredictable bytes."""
    uniform: Callable[[], float]
    """A number in [0, 1) for jitter."""
    kem: Kem = field(default_factory=HybridKem)
