"""How far a site has used its key file or key stream: on disk before a key is used, so that kill -9 gives none twice.

One JSON object per link and end, replaced as a whole: new file, fsync, rename, fsync of the folder.  A lock file
beside it keeps a second process out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from keysource.base import End
from keysource.errors import BadSettings

WINDOW = 1024
"""The other end's positions that are this far below the highest seen count as used."""
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Position:
    """``next`` and ``seen`` are one above the highest position used: by this end, and by the other as seen here."""

    next: int = 0
    seen: int = 0
    missing: frozenset[int] = frozenset()
    """Positions below ``seen`` that the other end owns and that were not fetched: at most :data:`WINDOW` back."""

    def draw(self, position: int) -> Position:
        return replace(self, next=position + 1)

    def fetched(self, position: int, owned_by_other: range) -> Position:
        """After the other end's ``position`` was used; ``owned_by_other`` steps over all positions it owns."""
        if position < self.seen:
            return replace(self, missing=self.missing - {position})
        lowest = max(self.seen, position - WINDOW)
        skipped = {p for p in range(lowest, position) if p in owned_by_other}
        kept = {p for p in self.missing | skipped if p >= position - WINDOW}
        return replace(self, seen=position + 1, missing=frozenset(kept))

    def was_fetched(self, position: int) -> bool:
        return position < self.seen and position not in self.missing


class PositionFile:
    """The position of one end of one link, in ``folder``.  Not for several threads at once.

    ``what`` is what is used up, for people; ``prefix`` begins the file's name.
    """

    def __init__(
        self, folder: Path, link: str, end: End, *, prefix: str = "keyfile", what: str = "key file", key: str = "path"
    ) -> None:
        self.path = folder / f"{prefix}-{link}-{end}.position"
        self._what, self._key = what, key
        self._identity = {"version": _VERSION, "link": link, "end": end.value}
        self._folder = -1
        self._lock = -1

    def open(self) -> Position:
        """Lock and read.

        Raises:
            BadSettings: another process has it, it is damaged, or the folder cannot be used.
        """
        try:
            self._folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            lock = f"{self.path.name}.lock"
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._lock = os.open(lock, flags, 0o600, dir_fd=self._folder)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return self._read()
        except BlockingIOError:
            self.close()
            raise BadSettings(f"{self.path}: another process uses this {self._what}", key=self._key) from None
        except OSError as error:
            self.close()
            raise BadSettings(f"{self.path}: {error.strerror}", key=self._key) from error
        except (ValueError, KeyError, TypeError):
            self.close()
            raise BadSettings(
                f"{self.path}: is damaged; start again with a new {self._what} at both sites", key=self._key
            ) from None

    def write(self, position: Position) -> None:
        """Replace the file; when this returns it is on disk.

        Raises:
            OSError: it may be on disk or not; the key must not be used now, but the same write may be tried again.
        """
        numbers = {"next": position.next, "seen": position.seen, "missing": sorted(position.missing)}
        text = json.dumps(self._identity | numbers).encode() + b"\n"
        new = f"{self.path.name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(new, flags, 0o600, dir_fd=self._folder)
        try:
            if os.write(descriptor, text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(new, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        os.fsync(self._folder)

    def close(self) -> None:
        """Give up the lock.  May be called twice."""
        for descriptor in (self._lock, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._folder = -1

    def _read(self) -> Position:
        try:
            descriptor = os.open(self.path.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._folder)
        except FileNotFoundError:
            return Position()
        with os.fdopen(descriptor, "rb") as file:
            value = json.loads(file.read())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path.name}.new", dir_fd=self._folder)
        if {name: value[name] for name in self._identity} != self._identity:
            raise ValueError("another link, end or version")
        numbers = [value["next"], value["seen"], *value["missing"]]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError("not a position")
        return Position(value["next"], value["seen"], frozenset(value["missing"]))
