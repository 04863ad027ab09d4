"""What the store takes and gives: links, keys, offers and answers.  Plain values, and their errors."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from keysource.base import KEY_BYTES, End, Origin, Owner

UNIT_BITS = 8 * KEY_BYTES
_WEAKEST_FIRST = (Origin.SIMULATED, Origin.EXTERNAL, Origin.COURIERED, Origin.RELAYED, Origin.QKD)

NO_STANDBY = (
    "synchronous_standby_names of the PostgreSQL server is empty, so nothing confirms a commit but its own disk, and"
    " a failover could give a key out twice; set it, or require_standby = false in [store]"
)


class StoreError(Exception):
    """The store cannot be opened, is another KME's, or a stored key is damaged; one sentence."""


class Damaged(StoreError):
    """A stored key cannot be unwrapped."""


class KeysNotFound(Exception):
    """At least one key_ID is not here for this pair; nothing was touched."""


class Alarmed(Exception):
    """The store knows of an alarm on this link; one sentence.  Nothing was touched."""


class NotTheSlave(Exception):
    """At least one key is reserved for other slave SAEs only; nothing was touched."""


class BadDeposit(Exception):
    """A key from the other KME was not authentic, or its key_ID is taken; one sentence."""


@dataclass(frozen=True, slots=True)
class LinkRow:
    """What is remembered of a link.  ``alarm`` is empty where there is none."""

    peer: str
    name: str
    end: End
    owner: Owner
    origin: Origin
    hops: int
    next_block: int = 0
    alarm: str = ""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key that has just left the store."""

    key_id: str
    material: bytearray = field(repr=False)
    origin: Origin
    hops: int


class Unit(NamedTuple):
    """256 bits of a link, the grain in which its two ends count.  A key of another size is made of whole ones."""

    key_id: str
    block: int


@dataclass(frozen=True, slots=True)
class Terms:
    """For whom keys are, how long each is, and what they claim to be."""

    master: str
    slaves: tuple[str, ...]
    size: int = UNIT_BITS
    """Bits; a multiple of 8."""
    origin: Origin | None = None
    """What each key may claim at most, where its parts come over several links; None: what its units are."""
    hops: int = 0

    @property
    def units(self) -> int:
        """Units that a key of this size is made of; what is left over of the last one is thrown away."""
        return -(-self.size // UNIT_BITS)


@dataclass(frozen=True, slots=True)
class Offer:
    """A key that the other KME is asked to reserve.  ``token`` is random and told to that KME only.

    The key is its units one after the other, cut to size; its key_ID is that of the first unit.
    """

    key_id: str
    block: int
    token: str = field(repr=False)
    more: tuple[Unit, ...] = ()

    @property
    def units(self) -> tuple[Unit, ...]:
        return (Unit(self.key_id, self.block), *self.more)


@dataclass(frozen=True, slots=True)
class Deposit:
    """A key on its way to a KME at another link than the one it comes from: under a one-time pad and MAC.

    ``masked`` is the key XOR the units ``pad``; ``tag`` is :func:`deposit_tag` under the unit ``mac``.
    """

    key_id: str
    token: str = field(repr=False)
    pad: tuple[Unit, ...]
    mac: Unit
    masked: bytes = field(repr=False)
    tag: bytes = field(repr=False)

    @property
    def units(self) -> tuple[Unit, ...]:
        return (*self.pad, self.mac)


@dataclass(frozen=True, slots=True)
class Reservation:
    """How the other KME answers: units that it does not hold, and how far its stock reaches."""

    missing: list[str]
    first_block: int
    """It has no free unit of the asking end in any block below."""
    next_block: int
    """It has received all blocks below."""
    origin: Origin | None = None
    """The weakest of what is reserved now, for the audit log of that KME; None where that is nothing."""
    hops: int = 0
    """Likewise the most."""


@dataclass(frozen=True, slots=True)
class Counts:
    """``own_free`` and ``peer_free`` count units; the others keys."""

    own_free: int
    peer_free: int
    reserved: int
    issued: int
    fetched: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What keys must be to be issued; the mandatory extensions that this KME knows."""

    origins: tuple[Origin, ...] = tuple(Origin)
    max_hops: int = 255


ANY = Wanted()


def weakest(origins: Iterable[Origin]) -> Origin:
    """The origin that a key made of several parts may claim."""
    return min(origins, key=_WEAKEST_FIRST.index)


def at_most(claimed: Origin, known: Origin) -> bool:
    """Is ``claimed`` no better than ``known``?"""
    return _WEAKEST_FIRST.index(claimed) <= _WEAKEST_FIRST.index(known)


def xor(left: bytes | bytearray, right: bytes | bytearray) -> bytearray:
    """Of ``len(left)`` bytes; ``right`` may be longer."""
    number = int.from_bytes(left, "big") ^ int.from_bytes(right[: len(left)], "big")
    return bytearray(number.to_bytes(len(left), "big"))


def deposit_tag(key: bytes | bytearray, link: str, terms: Terms, deposit: Deposit) -> bytes:
    """HMAC-SHA-256 over everything the receiver will believe; ``key`` is a unit that serves for nothing else."""
    fields = [link, terms.master, str(len(terms.slaves)), *terms.slaves, str(terms.size)]
    fields += [str(terms.origin), str(terms.hops)]
    fields += [deposit.key_id, str(len(deposit.units)), *(unit.key_id for unit in deposit.units)]
    text = b"".join(len(part).to_bytes(4, "big") + part for part in (value.encode() for value in fields))
    return hmac.new(key, b"qvpn-kme deposit v1" + text + deposit.masked, hashlib.sha256).digest()
