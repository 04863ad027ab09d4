"""The audit log: who got, was promised or was refused which key, and when.  Never a key, never a key_ID in clear.

JSON Lines, mode 0600, or 0640 where a rotation makes it so (more is taken away), one ``write`` with ``O_APPEND`` for
each line, before the answer goes out: where the line cannot be written, the answer is 503.  A key stands there as the
SHA-256 of its key_ID, so that two KMEs' logs can be laid side by side and neither lets anybody fetch a key.

Rotation needs no signal: before each line it is asked whether the path still names the open file; after a ``rename``
or a removal the line goes into a new file.  (``copytruncate`` works too, since every write appends.)
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keysource.kme.ratelimit import TokenBucket

_MODE = 0o640  # at most: a group of auditors may read
_REFUSALS = 10.0  # lines a second: a stranger must not fill the disk


class AuditError(Exception):
    """The audit log cannot be written; one sentence."""


class Audit:
    """Appends to one file."""

    def __init__(self, path: Path, kme_id: str) -> None:
        self._path, self._kme = path, kme_id
        self._file = -1
        self._refusals = TokenBucket(_REFUSALS, 10 * _REFUSALS)
        self._left_out = 0
        self._torn = False

    def open(self) -> None:
        """Raises :class:`AuditError`."""
        try:
            self._follow()
        except OSError as error:
            raise AuditError(f"{self._path}: the audit log: {error.strerror}") from None

    def close(self) -> None:
        descriptor, self._file = self._file, -1
        if descriptor >= 0:
            os.close(descriptor)

    def write(self, event: str, key_ids: Iterable[str] = (), **facts: Any) -> None:
        """One line.  ``facts`` must be JSON and nothing secret.  Raises :class:`AuditError`."""
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "kme": self._kme, "event": event, **facts}
        if hashes := [hashlib.sha256(key_id.encode()).hexdigest() for key_id in key_ids]:
            line["keys"] = hashes
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            self._follow()
            written = os.write(self._file, b"\n" + data if self._torn else data)
            self._torn = written < len(data)  # a full disk; the next line begins with an end
            if self._torn:
                raise OSError(errno.ENOSPC, "only a part of a line was written")
        except OSError as error:
            raise AuditError(f"{self._path}: the audit log: {error.strerror}") from None

    def refused(self, reason: str, now: float, **facts: Any) -> None:
        """A refusal; of very many, the rest is only counted, in the next line."""
        if self._refusals.wait(now):
            self._left_out += 1
            return
        if self._left_out:
            facts["left_out"], self._left_out = self._left_out, 0
        self.write("refused", reason=reason, **facts)

    def _follow(self) -> None:
        """Have the file open that the path names now."""
        if self._file >= 0:
            try:
                named, mine = self._path.lstat(), os.fstat(self._file)
                if (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino):
                    return
            except FileNotFoundError:
                pass
            self.close()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(self._path, flags, 0o600)
        mode = os.fstat(self._file).st_mode & 0o777
        if mode & ~_MODE:  # as a rotation made it
            os.fchmod(self._file, mode & _MODE)
