"""The keys of one link, in memory, at one end: each is handed out once, then it is gone.  Sans-IO.

Blocks come in (from a device); this end *draws* the keys that it owns, oldest first, and *fetches* the other end's
keys by their key_ID.  Nobody can fetch a key that is this end's to issue, and nobody can draw the other end's: so
two ends that draw at the same time never issue one key twice (``keysource.base.Owner``).

**Bounds.**  The stock is ``full`` when each kind of key that the link has (own, other's) has ``capacity`` keys;
then whoever feeds it waits.  Where only one kind is used up, the other would stop the link: so beyond twice the
capacity the oldest keys of a kind are wiped, at the fetching end only beyond four times, for it may lag behind.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from keysource.base import KEY_BYTES, End, Key, Origin, Owner, derive_key_id, wipe
from keysource.errors import Exhausted, NotOwner, UnknownKeyID

RATE_WINDOW = 60.0
"""Seconds over which the key rate is measured."""


class Stock:
    """Keys of one end of ``link``, not yet used.  ``now`` is in seconds of any steady clock."""

    def __init__(
        self, link: str, end: End, owner: Owner, origin: Origin, hops: int = 0, *, capacity: int = 4096
    ) -> None:
        self.link, self.end, self.owner, self.origin, self.hops = link, end, owner, origin, hops
        self._own: _Keys = OrderedDict()
        self._others: _Keys = OrderedDict()
        self._capacity = capacity
        self._arrivals: deque[tuple[float, int]] = deque()
        self._since: float | None = None
        self._last_block = -1
        self._first_block: int | None = None

    @property
    def drawable(self) -> int:
        """Keys that this end can draw now."""
        return len(self._own)

    @property
    def fetchable(self) -> int:
        """Keys that the other end may have drawn or may draw."""
        return len(self._others)

    @property
    def next_block(self) -> int:
        """Blocks below this number are of no use any more."""
        return self._last_block + 1

    @property
    def first_block(self) -> int | None:
        """Of blocks below this number no key is here, nor will be; None before the first block."""
        return self._first_block

    @property
    def full(self) -> bool:
        kinds = [keys for keys, held in ((self._own, self._issues), (self._others, self._fetches)) if held]
        return all(len(keys) >= self._capacity for keys in kinds)

    @property
    def _issues(self) -> bool:
        return self.owner is Owner.ALTERNATE or self.owner.of(0) is self.end

    @property
    def _fetches(self) -> bool:
        return self.owner is Owner.ALTERNATE or self.owner.of(0) is not self.end

    def add_block(self, block: int, keys: bytearray, now: float) -> int:
        """Take the keys of a block; ``keys`` is wiped.  Gives how many were new: a block comes once only."""
        count = len(keys) // KEY_BYTES if block > self._last_block else 0
        for position in range(count):
            material = keys[position * KEY_BYTES : (position + 1) * KEY_BYTES]
            mine = self.owner.of(position) is self.end
            (self._own if mine else self._others)[derive_key_id(self.link, block, position)] = (block, material)
        wipe(keys)
        if count:
            self._last_block = block
            self._first_block = block if self._first_block is None else self._first_block
            self._note_arrival(count, now)
            _drop_oldest(self._own, 2 * self._capacity)
            _drop_oldest(self._others, 4 * self._capacity)
        return count

    def draw(self) -> Key:
        """The oldest key that this end owns.

        Raises:
            NotOwner: all keys of this link are issued by the other end.
            Exhausted: none is left.
        """
        if not self._issues:
            raise NotOwner(f"link {self.link}: all keys are issued by end {self.end.other}")
        if not self._own:
            raise Exhausted(f"link {self.link}: no key is left that end {self.end} may issue")
        key_id, (_block, material) = self._own.popitem(last=False)
        return Key(key_id, material, self.origin, self.hops)

    def fetch(self, key_id: str) -> Key:
        """The key that the other end drew.  Raises :class:`UnknownKeyID`: not here, no longer, or ours to issue."""
        entry = self._others.pop(key_id.lower(), None)
        if entry is None:
            raise UnknownKeyID(f"link {self.link}: no key of end {self.end.other} has this key_ID here")
        return Key(key_id.lower(), entry[1], self.origin, self.hops)

    def void(self, before: int) -> int:
        """Wipe the unused keys of blocks below ``before``; gives how many."""
        self._last_block = max(self._last_block, before - 1)
        if self._first_block is not None:
            self._first_block = max(self._first_block, before)
        dropped = 0
        for keys in (self._own, self._others):
            for key_id in [k for k, (block, _material) in keys.items() if block < before]:
                wipe(keys.pop(key_id)[1])
                dropped += 1
        return dropped

    def key_rate(self, now: float) -> float | None:
        """Keys of both owners per second that arrived in the last :data:`RATE_WINDOW`; None before the first."""
        if self._since is None:
            return None
        while self._arrivals and self._arrivals[0][0] < now - RATE_WINDOW:
            self._arrivals.popleft()
        elapsed = max(1.0, min(RATE_WINDOW, now - self._since))
        return sum(count for _at, count in self._arrivals) / elapsed

    def started(self, now: float) -> None:
        """The feed begins: the key rate counts from here."""
        self._since = now if self._since is None else self._since

    def wipe(self) -> None:
        """Overwrite and forget every key."""
        for keys in (self._own, self._others):
            _drop_oldest(keys, 0)

    def _note_arrival(self, count: int, now: float) -> None:
        self.started(now)
        self._arrivals.append((now, count))


_Keys = OrderedDict[str, tuple[int, bytearray]]


def _drop_oldest(keys: _Keys, keep: int) -> None:
    while len(keys) > keep:
        _key_id, (_block, material) = keys.popitem(last=False)
        wipe(material)
