"""The one interface through which the tunnel drinks: :class:`KeySource`.

A third party implements the five methods below in a class, names it in the entry point group
``qvpn.key_sources`` and has a key source; ``python -m keysource.conformance`` examines it.

Two ends, one key: the *initiator* of a handshake is master SAE and calls :meth:`KeySource.get_key`, which gives a
key nobody had before together with its key_ID.  The key_ID travels (encrypted and signed) to the *responder*,
the slave SAE, which calls :meth:`KeySource.get_key_with_id`.  Both calls consume: the key is gone afterwards,
whatever becomes of the answer.  These are the semantics of ETSI GS QKD 014 V1.1.1 clauses 5.3 and 5.4.
"""

from __future__ import annotations

import enum
import hashlib
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from keysource.errors import BadSettings
from keysource.private import read_secret

KEY_BYTES = 32
"""Every session key drawn from a source is 256 bits, no more and no less."""


class Origin(enum.StrEnum):
    """Where a key was made.  Bound into the handshake by both ends; they must agree."""

    QKD = "qkd"  # one quantum link between the two sites
    RELAYED = "relayed"  # several QKD links and the trusted nodes between them
    COURIERED = "couriered"  # random key material carried by hand
    EXTERNAL = "external"  # a key manager whose operator said nothing more
    SIMULATED = "simulated"  # no quantum security


class Hop(enum.StrEnum):
    """How a key reaches the daemon on its last hop, and so what a recorder of that hop gets."""

    LOCAL = "local"  # a socket or file on this host
    ZONE = "zone"  # inside one trusted perimeter
    PQ_TLS = "pq-tls"  # TLS whose negotiated group is post-quantum (read back, not hoped for)
    CLASSICAL_TLS = "classical-tls"  # can be harvested today and decrypted tomorrow


class End(enum.StrEnum):
    """Which end of a link this is.  End ``a`` is the left site of ``qvpn init``."""

    A = "a"
    B = "b"

    @property
    def other(self) -> End:
        return End.B if self is End.A else End.A


class Owner(enum.StrEnum):
    """Who may issue the keys of a link as master SAE; the same word must stand at both ends."""

    ALTERNATE = "alternate"  # even positions end a, odd positions end b
    A = "a"
    B = "b"

    def of(self, position: int) -> End:
        if self is Owner.ALTERNATE:
            return End.A if position % 2 == 0 else End.B
        return End(self.value)


def wipe(buffer: bytearray) -> None:
    """Overwrite with zeros, in place; the length stays."""
    buffer[:] = bytes(len(buffer))


@dataclass(slots=True)
class Key:
    """One key, to be used once.  ``material`` is wiped by whoever mixed it in; it never appears in a repr."""

    key_id: str
    """A UUID in lower case with hyphens, or 1-64 bytes of printable ASCII."""
    material: bytearray = field(repr=False)
    """Exactly :data:`KEY_BYTES` bytes."""
    origin: Origin
    hops: int = 0
    """Trusted nodes between the two ends; 0 is a direct link."""

    def wipe(self) -> None:
        """Overwrite the bytes.  Python may hold other copies; this removes the one we know of."""
        wipe(self.material)


@dataclass(frozen=True, slots=True)
class SaePair:
    """The names of both ends at their key managers.  The KDF binds them, in the order initiator, responder."""

    local: str
    remote: str


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """A snapshot for policy, status and forecast.  Never carries a key or a key_ID."""

    ready: bool
    """True when a draw here, or a fetch of what the peer draws, is expected to succeed now: it is sent to the peer,
    who then need not waste a key."""
    reason: str = ""
    """Why not ready, one sentence; empty when ready."""
    origin: Origin | None = None
    hop: Hop = Hop.LOCAL
    stored_keys: int | None = None
    """Keys that this end could draw now; None where the source cannot tell."""
    key_rate: float | None = None
    """Keys per second that arrive, measured; None where the source cannot tell."""
    alarm: str | None = None
    """An alarm of the device (QBER, monitor, authentication), or None."""
    qber: float | None = None
    """Quantum bit error ratio of the last block, 0..1, where the source knows it."""
    survives_harvest: bool = True
    """False when whoever records the last hop today can have the key tomorrow."""
    restarts: int = 0
    """How often the source had to start the process it rests on again; 0 where it has none."""


def _no_other(name: str) -> KeySource:
    raise BadSettings(f"there is no key source {name!r}")


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What the daemon gives a source beside its own table."""

    name: str
    """Name of the table ``[key_source.NAME]``."""
    base: Path
    """Folder of the configuration file; relative paths in the table start here."""
    state: Path
    """The site's state folder (0700, locked): consumption is fsynced here *before* a key is used."""
    site: str
    """Name of our site."""
    read_file: Callable[[Path], bytes] = field(default=lambda path: path.read_bytes(), repr=False)
    """Reads a file that may be public."""
    read_secret: Callable[[Path], bytes] = field(default=read_secret, repr=False)
    """Reads a file that must be 0600 and owned by us; raises ``OSError`` or ``ValueError`` with a sentence."""

    other: Callable[[str], KeySource] = field(default=_no_other, repr=False)
    """Another source of the same file by the name of its table, for one that is made of several; raises
    :class:`~keysource.errors.BadSettings`."""

    def path(self, value: str) -> Path:
        """A path of the table, relative to the configuration file."""
        return self.base / value


@runtime_checkable
class KeySource(Protocol):
    """A source of keys shared with the peer's site.

    All methods may be called concurrently from one event loop.  Cancelling a call never returns a key to the
    stock.  After :meth:`start` the source keeps itself going: it reconnects, and says so in :meth:`status`.
    """

    async def start(self) -> None:
        """Open what is needed.  Raises :class:`~keysource.errors.KeySourceError` only for what will not heal."""

    async def aclose(self) -> None:
        """Stop, wipe the stock.  May be called twice."""

    def sae_pair(self, peer_sae: str) -> SaePair:
        """The two SAE names for keys with this peer.  ``peer_sae`` is the peer's ``sae`` in the configuration."""

    async def status(self, peer_sae: str) -> SourceStatus:
        """How the source is.  Bounded to 2 s by the caller; consumes nothing."""

    async def get_key(self, peer_sae: str) -> Key:
        """Draw a key nobody had before, as master SAE."""

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        """Fetch the key that the peer drew, as slave SAE."""


@runtime_checkable
class Claiming(Protocol):
    """A source whose two ends can get out of step tells the peer where it is.

    One with a position on disk says how far it is, so that a restored backup is noticed; one with a stock in memory
    says what it still has, so that after a restart nobody draws what the other end has lost.  The claims travel
    inside the authenticated handshake.  Optional: :func:`isinstance` decides.
    """

    def claim(self) -> bytes:
        """At most 64 bytes: how far this end has used its keys and how far it saw the other end; empty: no claim."""

    def check_claim(self, claim: bytes) -> None:
        """Compare the peer's claim with our state.

        Raises:
            RolledBack: the peer has seen us further than our state says; drawing would use keys twice.
            BadAnswer: the claim has another form.
        """


@runtime_checkable
class Checkable(Protocol):
    """A source that can look at the files its table names without starting.  Optional: :func:`isinstance` decides."""

    def check_files(self) -> None:
        """Opens no connection, writes nothing, consumes nothing.

        Raises:
            BadSettings: a file is missing, of another kind, or readable by others.
        """


@runtime_checkable
class Composed(Protocol):
    """A source made of others.  Optional: :func:`isinstance` decides."""

    def parts(self) -> dict[str, SourceStatus]:
        """What each part last said, by its name; empty before the first :meth:`KeySource.status`."""


@runtime_checkable
class Looking(Protocol):
    """A source that takes keys from somewhere as soon as it is started.  Optional: :func:`isinstance` decides."""

    async def look(self) -> SourceStatus | None:
        """How it is, without :meth:`KeySource.start`: nothing is taken.  None: a start takes nothing either."""


SourceFactory = Callable[[Mapping[str, object], SourceContext], KeySource]
"""What an entry point of ``qvpn.key_sources`` names: a class or function called with the table (without its
``type``) and the context.  Raises :class:`~keysource.errors.BadSettings`.  It opens nothing: ``start`` does."""


def derive_key_id(link: str, block: int, position: int) -> str:
    """The key_ID both ends give to one position of one block: a UUIDv8 (RFC 9562 clause 5.8) of SHA-256.

    ``block`` is an unsigned 64-bit, ``position`` an unsigned 32-bit number.  Without the link's name a key_ID
    tells nothing about key bytes: they do not enter.
    """
    name = link.encode()
    digest = hashlib.sha256(
        b"qvpn key_ID v1"
        + len(name).to_bytes(4, "big")
        + name
        + block.to_bytes(8, "big")
        + position.to_bytes(4, "big")
    ).digest()
    raw = bytearray(digest[:16])
    raw[6] = (raw[6] & 0x0F) | 0x80
    raw[8] = (raw[8] & 0x3F) | 0x80
    return str(uuid.UUID(bytes=bytes(raw)))
