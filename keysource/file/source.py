"""``type = "file"``: couriered key material (``format`` says how the file looks).

Settings: ``path`` of the key file, ``end`` = ``"a"`` or ``"b"`` (the left site is a), optional ``owner`` that must
then be the one in the file.

A draw, in this order: position on disk (``position``), key bytes read, bytes in the file overwritten, key returned.
Killed anywhere between, the key is lost, never given again.  A key whose bytes are zero was used before: then the
state folder is older than the key file, and the source refuses everything from then on, as it does when the peer
has seen this end further than the state says (:class:`~keysource.errors.RolledBack`).
"""

from __future__ import annotations

import asyncio
import os
import stat
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from keysource.base import (
    KEY_BYTES,
    End,
    Hop,
    Key,
    Origin,
    Owner,
    SaePair,
    SourceContext,
    SourceStatus,
    derive_key_id,
)
from keysource.errors import (
    BadAnswer,
    BadSettings,
    Exhausted,
    KeySourceError,
    NotOwner,
    RolledBack,
    Unavailable,
    UnknownKeyID,
)
from keysource.file.format import HEADER_BYTES, Header, decode_untrusted, offset
from keysource.file.position import Position, PositionFile
from keysource.settings import parse_settings

_CLAIM = struct.Struct(">B16s1sII")
_CLAIM_VERSION = 1


class FileSettings(BaseModel):
    """The table ``[key_source.NAME]`` without ``type``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    end: Literal["a", "b"]
    owner: Literal["alternate", "a", "b"] | None = None


class FileSource:
    """A key source (and ``Claiming``) over one end's copy of a key file."""

    def __init__(self, settings: Mapping[str, object], context: SourceContext) -> None:
        self._settings = parse_settings(FileSettings, settings)
        self._end = End(self._settings.end)
        self._path = context.path(self._settings.path)
        self._state_folder = context.state
        self._keys: KeyFile | None = None
        self._worker: ThreadPoolExecutor | None = None

    async def start(self) -> None:
        """Open and lock.

        Raises:
            BadSettings: the key file or the state is missing, readable by others, damaged or in use.
            RolledBack: the next key was used before.
        """
        worker = ThreadPoolExecutor(1, thread_name_prefix="keyfile")
        opening = worker.submit(KeyFile, self._path, self._end, self._state_folder, self._wanted_owner())
        try:
            self._keys = await asyncio.wrap_future(opening)
        except BaseException:
            opening.add_done_callback(_close_result)
            worker.shutdown(wait=False)
            raise
        self._worker = worker

    def check_files(self) -> None:
        """See :class:`keysource.base.Checkable`.  The state is left alone: a running daemon has it."""
        descriptor, _writable = _open_private(self._path)
        try:
            _read_header(descriptor, self._path, self._wanted_owner())
        finally:
            os.close(descriptor)

    async def aclose(self) -> None:
        """Close and give up the lock, after the call under way.  May be called twice."""
        worker, self._worker = self._worker, None
        keys, self._keys = self._keys, None
        if worker is not None and keys is not None:
            worker.submit(keys.close)
            await asyncio.to_thread(worker.shutdown)

    def _wanted_owner(self) -> Owner | None:
        return None if self._settings.owner is None else Owner(self._settings.owner)

    def sae_pair(self, peer_sae: str) -> SaePair:
        """Named after the link: the same at both sites, whatever the configurations say."""
        link = self._opened().header.link
        return SaePair(f"{link}/{self._end}", f"{link}/{self._end.other}")

    async def status(self, peer_sae: str) -> SourceStatus:
        keys = self._keys
        if keys is None:
            return SourceStatus(False, f"{self._path}: the key file is not open", Origin.COURIERED)
        left = keys.left()
        reason = str(keys.refused or "") or ("" if left or keys.fetchable() else keys.nothing_left())
        return SourceStatus(not reason, reason, Origin.COURIERED, Hop.LOCAL, stored_keys=left)

    async def get_key(self, peer_sae: str) -> Key:
        """The next key that this end owns; milliseconds, for it waits for the disk."""
        return await self._run(self._opened().draw)

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        keys = self._opened()
        return await self._run(lambda: keys.fetch(key_id))

    def claim(self) -> bytes:
        """Link, end, how far this end used its keys, how far it saw the other end: 26 bytes."""
        keys = self._opened()
        place = keys.position
        return _CLAIM.pack(_CLAIM_VERSION, keys.header.link_id, self._end.encode(), place.next, place.seen)

    def check_claim(self, claim: bytes) -> None:
        """See :class:`keysource.base.Claiming`.  After ``RolledBack`` this source refuses every draw."""
        keys = self._opened()
        if len(claim) != _CLAIM.size or claim[0] != _CLAIM_VERSION:
            raise BadAnswer("the peer's claim about its key file has another form")
        _version, link_id, end, _used, seen = _CLAIM.unpack(claim)
        if link_id != keys.header.link_id:
            raise BadAnswer(f"the peer has another key file: link {link_id.hex()}, here {keys.header.link}")
        if end != self._end.other.encode():
            raise BadAnswer(f'both sites say end = "{self._end}" for the key file of link {keys.header.link}')
        if seen > keys.position.next:
            keys.refused = RolledBack(
                f"{keys.state_path}: says that {keys.position.next} positions are used, the peer has seen {seen}; "
                "a backup was restored: make a new key file for both sites"
            )
            raise keys.refused

    def _opened(self) -> KeyFile:
        if self._keys is None:
            raise Unavailable(f"{self._path}: the key file is not open", answered=True)
        return self._keys

    async def _run(self, call: Callable[[], Key]) -> Key:
        if self._worker is None:
            raise Unavailable(f"{self._path}: the key file is not open", answered=True)
        result = self._worker.submit(call)
        try:
            return await asyncio.wrap_future(result)
        except asyncio.CancelledError:
            result.add_done_callback(_wipe_result)  # used on disk already: it is burnt
            raise


class KeyFile:
    """The blocking part; all but ``claim``'s reads of the immutable ``position`` happen in one worker thread."""

    def __init__(self, path: Path, end: End, state: Path, owner: Owner | None) -> None:
        self.path, self.end = path, end
        self.refused: KeySourceError | None = None
        self._descriptor, self._writable = _open_private(path)
        try:
            self.header = _read_header(self._descriptor, path, owner)
            self._index: dict[str, int] | None = None
            self._positions = PositionFile(state, self.header.link, end)
            self.position = self._positions.open()
            self._wipe_used()
            self._refuse_if_used_before()
        except BaseException:
            self.close()
            raise

    @property
    def state_path(self) -> Path:
        return self._positions.path

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if hasattr(self, "_positions"):
            self._positions.close()

    def left(self) -> int:
        """Keys that this end may still draw."""
        return len(self._owned(self.end)[self._drawn() :])

    def fetchable(self) -> bool:
        """Has the other end a key left, as far as was seen here?"""
        others = self._owned(self.end.other)
        return bool(others) and self.position.seen <= others[-1]

    def nothing_left(self) -> str:
        if not self._owned(self.end):
            return f"{self.path}: all keys are issued by end {self.end.other}"
        return f"{self.path}: all {len(self._owned(self.end))} keys of end {self.end} are used"

    def draw(self) -> Key:
        self._check()
        rest = self._owned(self.end)[self._drawn() :]
        if not rest:
            raise Exhausted(self.nothing_left()) if self._owned(self.end) else NotOwner(self.nothing_left())
        self._advance(self.position.draw(rest[0]))
        return self._take(rest[0], derive_key_id(self.header.link, 0, rest[0]))

    def fetch(self, key_id: str) -> Key:
        self._check()
        others = self._owned(self.end.other)
        if self._index is None:
            self._index = {derive_key_id(self.header.link, 0, p): p for p in others}
        position = self._index.get(key_id.lower())
        if position is None:
            raise UnknownKeyID(f"{self.path}: no key of end {self.end.other} has this key_ID")
        if self.position.was_fetched(position):
            raise UnknownKeyID(f"{self.path}: key {position} of end {self.end.other} was used before")
        self._advance(self.position.fetched(position, others))
        return self._take(position, key_id.lower())

    def _owned(self, end: End) -> range:
        """The positions that ``end`` issues."""
        match self.header.owner:
            case Owner.ALTERNATE:
                return range(0 if end is End.A else 1, self.header.count, 2)
            case owner:
                return range(self.header.count if owner.of(0) is end else 0)

    def _drawn(self) -> int:
        """How many of this end's positions are below ``next``."""
        owned = self._owned(self.end)
        return len(range(owned.start, min(self.position.next, owned.stop), owned.step))

    def _check(self) -> None:
        if self.refused is not None:
            raise self.refused

    def _advance(self, position: Position) -> None:
        try:
            self._positions.write(position)
        except OSError as error:
            message = f"{self._positions.path}: cannot be written ({error.strerror})"
            raise Unavailable(message, answered=True) from None
        self.position = position

    def _take(self, position: int, key_id: str) -> Key:
        material = self._read(position)
        if not any(material):
            self._refuse_used(position)
        self._overwrite(position)
        return Key(key_id, material, Origin.COURIERED)

    def _read(self, position: int) -> bytearray:
        material = bytearray(KEY_BYTES)
        if os.preadv(self._descriptor, [material], offset(position)) != KEY_BYTES:
            raise Unavailable(f"{self.path}: the key file became shorter", answered=True)
        return material

    def _overwrite(self, position: int) -> None:
        """Best effort: not synced, and the disk may keep the old bytes elsewhere."""
        if self._writable:
            try:
                os.pwrite(self._descriptor, bytes(KEY_BYTES), offset(position))
            except OSError:
                self._writable = False

    def _wipe_used(self) -> None:
        """What a crash between position and overwriting left behind."""
        fetched = (p for p in self._owned(self.end.other) if self.position.was_fetched(p))
        for position in (*self._owned(self.end)[: self._drawn()], *fetched):
            if self._writable and any(self._read(position)):
                self._overwrite(position)

    def _refuse_if_used_before(self) -> None:
        for position in self._owned(self.end)[self._drawn() :][:1]:
            material = self._read(position)
            if not any(material):
                self._refuse_used(position)
            material[:] = bytes(KEY_BYTES)

    def _refuse_used(self, position: int) -> None:
        self.refused = RolledBack(
            f"{self.path}: key {position} was used before, but {self._positions.path} does not say so; "
            "a backup was restored: make a new key file for both sites"
        )
        raise self.refused


def _open_private(path: Path) -> tuple[int, bool]:
    """A descriptor of a file that nobody else may read, and whether it may be written."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO of that name shall not stop us
    writable = True
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | flags)
        except OSError:  # a read-only medium is a good place for keys
            writable = False
            descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        raise BadSettings(f"{path}: {error.strerror}", key="path") from None
    found = os.fstat(descriptor)
    problem = ""
    if not stat.S_ISREG(found.st_mode):
        problem = "is not a file"
    elif found.st_mode & 0o077:
        problem = f"can be read by others (mode {stat.S_IMODE(found.st_mode):04o}); chmod 600 it"
    elif found.st_uid not in (os.geteuid(), 0):
        problem = f"belongs to user {found.st_uid}, not to user {os.geteuid()} who runs this; chown it"
    if problem:
        os.close(descriptor)
        raise BadSettings(f"{path}: {problem}", key="path")
    return descriptor, writable


def _read_header(descriptor: int, path: Path, owner: Owner | None) -> Header:
    try:
        header = decode_untrusted(os.pread(descriptor, HEADER_BYTES, 0))
    except BadSettings as error:
        raise BadSettings(f"{path}: {error}", key="path") from None
    if os.fstat(descriptor).st_size != offset(header.count):
        raise BadSettings(f"{path}: is not complete; it should hold {header.count} keys", key="path")
    if owner not in (None, header.owner):
        raise BadSettings(f'{path}: was made with owner = "{header.owner}", not "{owner}"', key="owner")
    return header


def _wipe_result(result: Future[Key]) -> None:
    if not result.cancelled() and result.exception() is None:
        result.result().wipe()


def _close_result(result: Future[KeyFile]) -> None:
    if not result.cancelled() and result.exception() is None:
        result.result().close()
