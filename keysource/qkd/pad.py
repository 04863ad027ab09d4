"""The authentication pad of one end and its state on disk: nothing of it is ever used twice.

The *pad file* is a copy of random bytes that the other end has too (``qvpn-qkd pair`` makes both).  Its first
:data:`HEAD_BYTES` are the link key: it keeps strangers from the connections (HMAC of the hello, sealing to the
fibre) and is no part of the one-time authentication.  The rest are *tickets* of 96 bytes, one per block
(``distill.mac``).  Every passed block puts one or two new tickets into the *refill*, so a link that makes key never
runs dry; the tickets of the file are for the first blocks and for blocks that gave nothing.

A ticket is numbered: ``i`` is the i-th of the file, ``2^62 + 4 block + j`` the j-th that a block gave.  A ticket is
spent on disk (fsync) before its number is sent.  After a reconnect both ends keep only what neither has spent and
both have.  ``spent`` counts for ever; each end remembers how far it has seen the other, so an end whose state was
restored from a backup is told so, and refuses.

A link whose ends know each other's identities needs no courier (``auth_bootstrap = "signature"``): its pad file is
the head alone (``engine.introduce``), and its blocks are *signed* until the first block under a ticket has passed,
which proves that both ends have the tickets of an earlier one.  From then on nothing is signed any more, whatever
happens, until an operator says so at both ends (``qvpn-qkd reseed``).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keysource.private import write_private
from keysource.qkd.distill.mac import TICKET_BYTES, Ticket
from keysource.qkd.errors import BadFrame, LinkSettings, PadEmpty, RolledBackLink, StateLost
from keysource.qkd.files import read_private

HEAD_BYTES = 64
DEFAULT_PAD_BYTES = 1024 * 1024
REFILL_TARGET = 32
"""Below so many refill tickets a block gives two, else one."""
REFILL_BASE = 1 << 62
SIGNED = 1 << 63
"""In the place of a ticket's number: the block is authenticated by signatures."""
FIRST_REFILLS = 4
"""Tickets that a signed block gives, where it has as many."""
_STATE = "link.json"
_NUMBERS = ("spent", "seen", "base_next", "next_block", "acked")
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Claims:
    """What an end says of its state when a connection begins."""

    spent: int
    seen: int
    base_next: int
    refills: frozenset[int]
    next_block: int
    acked: int
    held: frozenset[int]

    def as_dict(self) -> dict[str, Any]:
        raw = {name: getattr(self, name) for name in self.__slots__}
        return raw | {"refills": sorted(self.refills), "held": sorted(self.held)}

    @classmethod
    def from_untrusted(cls, raw: object) -> Claims:
        """Raises :class:`BadFrame`."""
        if not isinstance(raw, dict) or set(raw) != {*_NUMBERS, "refills", "held"}:
            raise BadFrame("claims with other fields")
        lists = (raw["refills"], raw["held"])
        if not all(isinstance(each, list) and len(each) <= 4096 for each in lists):
            raise BadFrame("claims with something else than lists")
        numbers = [*(raw[name] for name in _NUMBERS), *raw["refills"], *raw["held"]]
        if not all(type(n) is int and -1 <= n < 1 << 64 for n in numbers):
            raise BadFrame("claims with something else than numbers")
        plain = {name: raw[name] for name in _NUMBERS}
        return cls(**plain, refills=frozenset(raw["refills"]), held=frozenset(raw["held"]))


@dataclass(slots=True)
class _State:
    spent: int = 0
    seen: int = 0
    base_next: int = 0
    next_block: int = 0
    acked: int = -1
    signed: int = 0
    """Blocks under signatures that have passed."""
    unproven: bool = False
    """May blocks be signed where no ticket is left?"""
    refills: dict[int, bytes] = field(default_factory=dict, repr=False)


class LinkState:
    """Pad and block counter of one end.  Methods that change it return after the change is on disk."""

    def __init__(self, folder: Path, pad_file: Path, link: str | None, end: str, *, signed: bool = False) -> None:
        """``link``: its name; None takes one from the pad.  ``signed``: the pad file is a head alone.

        Raises :class:`LinkSettings` where a file is missing, open to others, too short or of another link.
        """
        self._path = folder / _STATE
        self._pad_file, self._signed = pad_file, signed
        try:
            pad = read_private(pad_file, "the authentication pad")
        except FileNotFoundError:
            raise LinkSettings(f"{pad_file}: there is no authentication pad (qvpn-qkd pair makes it)") from None
        if len(pad) != HEAD_BYTES if signed else len(pad) < HEAD_BYTES + TICKET_BYTES:
            what = "secret of a link that signs its first block" if signed else "authentication pad"
            raise LinkSettings(f"{pad_file}: {len(pad)} bytes are no {what}")
        self._pad = pad
        self.link = link or f"link-{self.link_key(b'name').hex()[:12]}"
        fingerprint = hashlib.sha256(pad).hexdigest()[:32]
        self._identity = {"version": _VERSION, "link": self.link, "end": end, "pad": fingerprint}
        self._state = self._load()
        self._write()

    def __repr__(self) -> str:
        return f"LinkState(spent={self._state.spent}, next_block={self._state.next_block})"

    @property
    def head(self) -> bytes:
        """The link key: what a signing Alice gives a Bob who has none."""
        return self._pad[:HEAD_BYTES]

    @property
    def base_tickets(self) -> int:
        """Tickets in the pad file, spent or not."""
        return (len(self._pad) - HEAD_BYTES) // TICKET_BYTES

    @property
    def tickets_left(self) -> int:
        return self.base_tickets - self._state.base_next + len(self._state.refills)

    @property
    def next_block(self) -> int:
        return self._state.next_block

    @property
    def acked(self) -> int:
        """Highest block that a client has taken over safely, -1 where there is none."""
        return self._state.acked

    @property
    def spent(self) -> int:
        return self._state.spent

    @property
    def signed_blocks(self) -> int:
        """How many blocks have passed under signatures."""
        return self._state.signed

    @property
    def unproven(self) -> bool:
        """No block under a ticket has passed yet: where none is left, the next block is signed."""
        return self._state.unproven

    def link_key(self, purpose: bytes) -> bytes:
        """32 bytes for one purpose from the head of the pad: computational, never used as pad."""
        return link_key(self._pad, purpose)

    def claims(self, held: frozenset[int]) -> Claims:
        s = self._state
        return Claims(s.spent, s.seen, s.base_next, frozenset(s.refills), s.next_block, s.acked, held)

    def check_rollback(self, peer: Claims) -> None:
        """Raises :class:`RolledBackLink` where the peer has seen us further than we remember."""
        if peer.seen > self._state.spent:
            raise RolledBackLink(
                f"{self._path}: the peer has seen {peer.seen} spent tickets, this state {self._state.spent}: "
                "it is a backup, and would use pad twice; make a new pad for both ends (qvpn-qkd pair)"
            )

    def settle(self, peer: Claims) -> None:
        """Both ends do this with each other's claims: from here on their pads are in step."""
        s = self._state
        s.seen = max(s.seen, peer.spent)
        s.spent = max(s.spent, peer.spent)
        s.base_next = max(s.base_next, peer.base_next)
        s.next_block = max(s.next_block, peer.next_block)
        s.refills = {number: t for number, t in s.refills.items() if number in peer.refills}
        self._write()

    def next_ticket(self) -> int:
        """The number to spend next: refill first, oldest first; :data:`SIGNED` where there is none and may be none.

        Raises :class:`PadEmpty`.
        """
        if self._state.refills:
            return min(self._state.refills)
        if self._state.base_next < self.base_tickets:
            return self._state.base_next
        if self._state.unproven:
            return SIGNED
        cure = "make a new pad for both ends (qvpn-qkd pair)"
        if self._signed:
            cure = "let both ends sign again (qvpn-qkd reseed FILE at each)"
        raise PadEmpty(f"{self._pad_file}: the authentication key is used up; {cure}")

    def refills_wanted(self, most: int = FIRST_REFILLS) -> int:
        """Tickets that the next block puts back; a signed one as many as it can, up to ``most``."""
        if self._state.unproven and self.tickets_left == 0:
            return min(FIRST_REFILLS, most)
        return 2 if len(self._state.refills) < REFILL_TARGET else 1

    def saw(self, peer_spent: int) -> None:
        """How far the peer is; on disk with the next change."""
        self._state.seen = max(self._state.seen, peer_spent)

    def spend(self, number: int, block: int) -> Ticket:
        """Take a ticket for a block and burn both numbers, on disk, before either is used.

        Raises:
            BadFrame: that ticket or block is not the next one.
            PadEmpty: none is left.
        """
        s = self._state
        if number == SIGNED or number != self.next_ticket() or block != s.next_block:
            raise BadFrame(f"ticket {number} for block {block} is out of step")
        if number in s.refills:
            material = s.refills.pop(number)
        else:
            start = HEAD_BYTES + number * TICKET_BYTES
            material = self._pad[start : start + TICKET_BYTES]
            s.base_next = number + 1
        s.spent += 1
        s.next_block = block + 1
        self._write()
        return Ticket(number, material)

    def spend_signed(self, block: int) -> None:
        """Burn the number of a block that is signed; on disk.

        Raises:
            BadFrame: the next block is not signed, or has another number.
            PadEmpty: no ticket is left, and none may be missing any more.
        """
        s = self._state
        if self.next_ticket() != SIGNED or block != s.next_block:
            raise BadFrame(f"a signed block {block} is out of step")
        s.spent += 1
        s.next_block = block + 1
        self._write()

    def refill(self, block: int, tickets: list[bytes], *, signed: bool = False) -> None:
        """Put a passed block's tickets into the reserve.  ``signed``: it had no ticket itself; one that had shows
        that both ends have some, and from now on nothing is signed."""
        if signed:
            self._state.signed += 1
        else:
            self._state.unproven = False
        for index, material in enumerate(tickets):
            self._state.refills[REFILL_BASE + 4 * block + index] = material
        self._write()

    def reseed(self) -> None:
        """Forget all tickets and let blocks be signed again: an operator's decision, at both ends.

        Raises :class:`LinkSettings` on a link with a couriered pad.
        """
        if not self._signed:
            raise LinkSettings(f"{self._pad_file}: a couriered pad; make a new one for both ends (qvpn-qkd pair)")
        self._state.refills.clear()
        self._state.unproven = True
        self._write()

    def acknowledge(self, block: int) -> None:
        """A client has all blocks up to this one."""
        if block > self._state.acked:
            self._state.acked = block
            self._write()

    def _load(self) -> _State:
        try:
            raw = json.loads(read_private(self._path, "the link's state"))
        except FileNotFoundError:
            return _State(unproven=self._signed)
        except ValueError:
            raise LinkSettings(f"{self._path}: not the state of a link") from None
        if not isinstance(raw, dict) or {name: raw.get(name) for name in self._identity} != self._identity:
            raise LinkSettings(f"{self._path}: the state of another link, end or pad")
        refills = {int(number): bytes.fromhex(text) for number, text in raw["refills"]}
        numbers = {name: int(raw[name]) for name in _NUMBERS}
        signed, unproven = int(raw.get("signed", 0)), bool(raw.get("unproven", False))
        return _State(**numbers, signed=signed, unproven=unproven, refills=refills)

    def _write(self) -> None:
        s = self._state
        refills = [[number, material.hex()] for number, material in s.refills.items()]
        names = (*_NUMBERS, "signed", "unproven")
        raw = self._identity | {name: getattr(s, name) for name in names} | {"refills": refills}
        try:
            write_private(self._path, json.dumps(raw).encode())
        except OSError as error:
            raise StateLost(f"{self._path}: the state cannot be written: {error.strerror}") from None


def make_pad(size: int = DEFAULT_PAD_BYTES) -> bytes:
    """Random bytes for both ends' pad files."""
    return os.urandom(size)


def link_key(pad: bytes, purpose: bytes) -> bytes:
    """32 bytes for one purpose from the head of a pad."""
    return HKDF(hashes.SHA256(), 32, b"qvpn-qkd link key v1", purpose).derive(pad[:HEAD_BYTES])
