"""How a classical connection begins: both ends prove that they have the pad, compare terms, and get into step.

::

    B -> A  HELLO   version u8, 32 random bytes
    A -> B  HELLO   version u8, 32 random bytes
    B -> A  CLAIMS  JSON {terms, claims}, HMAC-SHA256
    A -> B  CLAIMS  JSON {terms, claims}, HMAC-SHA256

The HMAC key comes from the head of the pad and both random strings.  It is computational on purpose: it keeps
strangers from burning tickets and from moving the block counter; no key's secrecy rests on it.  Sans-IO.
"""

from __future__ import annotations

import hmac
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keysource.base import End
from keysource.qkd.distill.wire import Frame, Kind
from keysource.qkd.errors import BadFrame, Disagreement
from keysource.qkd.pad import Claims

VERSION = 3
_RANDOM = 32
_MAC = 32
MAX_HELLO = 64 * 1024


@dataclass(frozen=True, slots=True)
class AgreedTerms:
    """What both configurations must say alike."""

    link: str
    owner: str
    auth_bootstrap: str
    """``psk`` or ``signature``."""
    preset: str
    efficiency_tests: bool
    """Do some of Bob's gates test his detectors (``monitor`` = efficiency or both)?"""
    repeatable: bool
    """Deterministic test mode: no key is delivered."""
    plan: str
    """Digest of plan, optics, error budget and proof."""


class Greeting:
    """One end of one connection's beginning."""

    def __init__(self, end: End, link_key: bytes, terms: AgreedTerms) -> None:
        self._end, self._terms, self._link_key = end, terms, link_key
        self._mine = os.urandom(_RANDOM)
        self._key = b""

    def hello(self) -> Frame:
        return Frame(Kind.HELLO, bytes([VERSION]) + self._mine)

    def take_hello_untrusted(self, frame: Frame) -> None:
        """Raises :class:`BadFrame`, :class:`Disagreement`."""
        if frame.kind is not Kind.HELLO or len(frame.payload) != 1 + _RANDOM:
            raise BadFrame("no hello at the beginning of a connection")
        if frame.payload[0] != VERSION:
            raise Disagreement(f"the other end speaks version {frame.payload[0]} of the link, this one {VERSION}")
        theirs = frame.payload[1:]
        pair = (self._mine, theirs) if self._end is End.A else (theirs, self._mine)
        self._key = HKDF(hashes.SHA256(), 32, b"".join(pair), b"qvpn-qkd hello v1").derive(self._link_key)

    def run(self, size: int) -> bytes:
        """A name for this session that both ends know and nobody repeats."""
        return HKDF(hashes.SHA256(), size, self._key, b"qvpn-qkd run v1").derive(self._link_key)

    def claims(self, claims: Claims) -> Frame:
        text = json.dumps({"terms": asdict(self._terms), "claims": claims.as_dict()}).encode()
        return Frame(Kind.CLAIMS, text + self._mac(self._end, text))

    def take_claims_untrusted(self, frame: Frame) -> Claims:
        """The other end's claims.

        Raises:
            BadFrame: not the holder of our pad.
            Disagreement: it is, but its configuration differs.
        """
        text, mac = frame.payload[:-_MAC], frame.payload[-_MAC:]
        if frame.kind is not Kind.CLAIMS or not hmac.compare_digest(mac, self._mac(self._end.other, text)):
            raise BadFrame("the other end does not have this link's pad")
        try:
            raw = json.loads(text)
            terms, claims = dict(raw["terms"]), raw["claims"]
        except (ValueError, KeyError, TypeError):
            raise BadFrame("claims of another form") from None
        self._compare(terms)
        return Claims.from_untrusted(claims)

    def _compare(self, theirs: dict[str, Any]) -> None:
        for name, mine in asdict(self._terms).items():
            if theirs.get(name) != mine:
                raise Disagreement(f"the other end has {name} {theirs.get(name)!r}, this end {mine!r}")

    def _mac(self, end: End, text: bytes) -> bytes:
        return hmac.digest(self._key, end.value.encode() + text, "sha256")


def lost_blocks(a: Claims, b: Claims) -> bool:
    """Is there a block that only one end has?  A block is safe at an end that holds it or whose client took it."""
    return _lacks(a, b) or _lacks(b, a)


def _lacks(end: Claims, other: Claims) -> bool:
    """Has ``other`` a block that ``end`` has not?"""
    known = other.held | ({other.acked} if other.acked >= 0 else set())
    return any(block > end.acked and block not in end.held for block in known)
