"""Secrets that can be forgotten, one for each epoch, for stores that cannot: a database keeps old rows in its log, in
dead rows and on standbys.

An epoch's key lies in the database wrapped under the site key *and* the secret of its slot here.  A slot is
overwritten in place and synced when its epoch ends: from then on no copy of the database gives that key, whoever has
the site key.  All KME processes of one host share the file (writers lock it); it is as forgetful as its medium, and
must be in no backup.  Without the file the stored keys of its epochs are lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import struct
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from keysource.base import KEY_BYTES
from keysource.kme import crashpoints
from keysource.kme.pki import write_new
from keysource.kme.records import StoreError
from keysource.private import sync

_NAME = b"qvpn-kme slots 1"
_SLOT, _SLOTS = 64, 64
_NUMBER = struct.Struct(">Q")
_CHECK = 16


class Slots:
    """One open file; may be used from several threads."""

    def __init__(self, path: Path) -> None:
        """Makes the file where there is none.  Raises :class:`StoreError`."""
        self.path = path
        self._mutex = threading.Lock()
        try:
            self._create()
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None
        mode = os.fstat(self._file).st_mode
        if not stat.S_ISREG(mode) or mode & 0o077:
            os.close(self._file)
            raise StoreError(f"{path}: it must be a file with mode 0600")
        if not self._raw().startswith(_NAME):
            os.close(self._file)
            raise StoreError(f"{path}: this is not a file of epoch keys of a PostgreSQL store")

    def close(self) -> None:
        os.close(self._file)

    def secret(self, number: int) -> bytes | None:
        """Of an epoch; None where it was forgotten, or never was here."""
        return next((secret for _slot, epoch, secret in self._read() if epoch == number), None)

    def make(self, number: int) -> None:
        """A new secret, on the disk when this returns; one that the same number had is overwritten.

        Raises:
            StoreError: all slots are in use.
        """
        with self._locked():
            there = {slot: epoch for slot, epoch, _secret in self._read()}
            mine = [slot for slot, epoch in there.items() if epoch == number]
            free = [slot for slot in range(_SLOTS) if slot not in there]
            if not mine + free:
                raise StoreError(f"{self.path}: {_SLOTS} epochs are alive; old rows were not wrapped anew")
            content = _NUMBER.pack(number) + os.urandom(KEY_BYTES)
            self._write((mine + free)[0], content + _check(content))

    def forget(self, below: int, keep: Collection[int]) -> None:
        """Overwrite the secrets of epochs below a number, except those that are alive."""
        with self._locked():
            for slot, epoch, _secret in list(self._read()):
                if epoch < below and epoch not in keep:
                    self._write(slot, os.urandom(_SLOT))
                    crashpoints.at("epoch.half-destroyed")
                    self._write(slot, b"")

    def _read(self) -> Iterator[tuple[int, int, bytes]]:
        """Slot, epoch and secret; a slot that was torn by a crash has none."""
        raw = self._raw()
        for slot in range(_SLOTS):
            content = raw[_SLOT * (slot + 1) :][: _NUMBER.size + KEY_BYTES + _CHECK]
            secret = content[_NUMBER.size : -_CHECK]
            if any(content) and content[-_CHECK:] == _check(content[:-_CHECK]):
                yield slot, _NUMBER.unpack(content[: _NUMBER.size])[0], secret

    def _raw(self) -> bytes:
        return os.pread(self._file, _SLOT * (_SLOTS + 1), 0)

    def _write(self, slot: int, content: bytes) -> None:
        os.pwrite(self._file, content.ljust(_SLOT, b"\0"), _SLOT * (slot + 1))
        os.fsync(self._file)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _create(self) -> None:
        """The whole file or none; of two processes that start at once, one makes it."""
        if self.path.exists():
            return
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        part.unlink(missing_ok=True)
        write_new(part, _NAME.ljust(_SLOT, b"\0") + bytes(_SLOT * _SLOTS), 0o600)
        try:
            sync(part)
            with contextlib.suppress(FileExistsError):
                os.link(part, self.path)
        finally:
            part.unlink()
        sync(self.path.parent)


def _check(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_CHECK]
