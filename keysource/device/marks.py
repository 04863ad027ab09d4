"""What the daemon hands over is written down first: the ``Ledger`` of ``server`` as one small file.

``{"version": 1, "link": ..., "end": ..., "next_block": N, "opened": [...]}``, replaced as a whole: new file, fsync,
rename, fsync of the folder.  A lock beside it keeps a second daemon out.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

from keysource.base import End
from keysource.errors import BadSettings
from keysource.private import write_private

_VERSION = 1


class Marks:
    """Blocks below ``next_block`` and the ``opened`` ones never go out again."""

    def __init__(
        self, folder: Path, link: str, end: End, erased: Callable[[int], None] = lambda before: None
    ) -> None:
        self.path = folder / "handed-over.json"
        self.next_block = 0
        self._identity = {"version": _VERSION, "link": link, "end": end.value}
        self._opened: set[int] = set()
        self._erased = erased
        self._lock = -1

    def open(self) -> None:
        """Lock and read.  Raises :class:`BadSettings`: another daemon runs, or the file is not ours."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._lock = os.open(self.path.with_suffix(".lock"), flags, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self.close()
            raise BadSettings(f"{self.path}: another device daemon uses this folder", key="state") from None
        except OSError as error:
            self.close()
            raise BadSettings(f"{self.path}: {error.strerror}", key="state") from None
        except (ValueError, KeyError, TypeError):
            self.close()
            raise BadSettings(
                f"{self.path}: is damaged or belongs to another link; nobody can say which keys were handed over",
                key="state",
            ) from None

    def close(self) -> None:
        """Give up the lock.  May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def is_spent(self, block: int) -> bool:
        return block < self.next_block or block in self._opened

    def erased(self, before: int) -> None:
        if before > self.next_block:
            self._write(before, {block for block in self._opened if block >= before})
        self._erased(before)

    def opened(self, block: int) -> None:
        self._write(self.next_block, self._opened | {block})

    def _read(self) -> None:
        try:
            value = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return
        if {name: value[name] for name in self._identity} != self._identity:
            raise ValueError("another link, end or version")
        numbers = [value["next_block"], *value["opened"]]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError("not a number")
        self.next_block, self._opened = value["next_block"], set(value["opened"])

    def _write(self, next_block: int, opened: set[int]) -> None:
        text = json.dumps(self._identity | {"next_block": next_block, "opened": sorted(opened)}).encode() + b"\n"
        write_private(self.path, text)
        self.next_block, self._opened = next_block, opened
