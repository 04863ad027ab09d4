"""Keys of the source in the machine's hands: held for another try, or used for good (PROTOCOL.md, chapter 6)."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass, field

from qvpn.handshake import timers
from qvpn.handshake.parameters import KeyMaterial

REMEMBERED = 4096


def wipe(material: bytearray) -> None:
    """Overwrite the bytes that we know of; Python may hold copies."""
    material[:] = bytes(len(material))


class UsedKeys:
    """Hashes of the last 4096 key_IDs and of the last 4096 keys that were burnt or in a confirmed epoch."""

    def __init__(self) -> None:
        self._ids: OrderedDict[bytes, None] = OrderedDict()
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def add(self, key: KeyMaterial) -> None:
        for store, value in ((self._ids, _hash(key.key_id.encode())), (self._keys, _hash(key.material))):
            store[value] = None
            if len(store) > REMEMBERED:
                store.popitem(last=False)

    def has_id(self, key_id: str) -> bool:
        return _hash(key_id.encode()) in self._ids

    def has_key(self, key: KeyMaterial) -> bool:
        return _hash(key.material) in self._keys


def _hash(value: bytes | bytearray) -> bytes:
    return hashlib.sha256(value).digest()


@dataclass(slots=True)
class Held:
    """A key that waits for another try, until a moment."""

    key: KeyMaterial = field(repr=False)
    until: float
    since: float
    """When it was drawn or fetched."""


class Keyring:
    """Both sides' held keys of one peer, and what was used."""

    def __init__(self) -> None:
        self.used = UsedKeys()
        self.consumed = 0
        """Keys of confirmed epochs."""
        self._drawn: Held | None = None
        self._fetched: dict[str, Held] = {}
        self._trusted_from = -math.inf

    def distrust(self, now: float) -> None:
        """An alarm: what was drawn or fetched before is offered and taken no more.  What an attempt under way or an
        unconfirmed epoch has in hand is theirs."""
        self._trusted_from = now

    def hold_drawn(self, key: KeyMaterial, since: float) -> None:
        """I: a key that met no M4 waits for the next attempt."""
        if self._drawn is not None and self._drawn.key is not key:
            self.burn(self._drawn.key)
        self._drawn = Held(key, since + timers.HELD_KEY, since)

    def take_drawn(self, now: float) -> Held | None:
        held, self._drawn = self._drawn, None
        if held is not None and (now >= held.until or held.since < self._trusted_from):
            self.burn(held.key)
            return None
        return held

    def hold_fetched(self, key: KeyMaterial, now: float) -> None:
        """R: a fetched key stays for the same peer until its epoch is confirmed."""
        self._fetched[key.key_id] = Held(key, now + timers.HELD_KEY, now)

    def fetched(self, key_id: str, now: float) -> Held | None:
        self.expire(now)
        held = self._fetched.get(key_id)
        return None if held is None or held.since < self._trusted_from else held

    def burn(self, key: KeyMaterial) -> None:
        """Never again: remember and wipe."""
        self.used.add(key)
        self._fetched.pop(key.key_id, None)
        wipe(key.material)

    def confirm(self, key: KeyMaterial) -> None:
        """Its epoch is confirmed."""
        self.consumed += 1
        self.burn(key)

    def expire(self, now: float) -> None:
        for held in [held for held in self._fetched.values() if now >= held.until]:
            self.burn(held.key)
        if self._drawn is not None and now >= self._drawn.until:
            self.burn(self._drawn.key)
            self._drawn = None

    def clear(self) -> None:
        for held in tuple(self._fetched.values()):
            self.burn(held.key)
        if self._drawn is not None:
            self.burn(self._drawn.key)
            self._drawn = None
