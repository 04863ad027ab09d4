"""Files that hold a secret: read only where nobody but us can, and after a crash the old one or the new one."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_secret(path: Path) -> bytes:
    """The bytes of a regular file that is ours and closed to group and others, judged on the open descriptor.

    Raises:
        OSError: it cannot be opened; a symbolic link is not followed.
        ValueError: it is no regular file, belongs to somebody else, or others have a right to it; one sentence.
    """
    # O_NONBLOCK: a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        info = os.fstat(stream.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{path}: is not a file")
        if info.st_uid != os.geteuid():
            raise ValueError(
                f"{path}: belongs to user {info.st_uid}, not to user {os.geteuid()} who runs this; chown it"
            )
        if info.st_mode & 0o077:
            raise ValueError(f"{path}: is open to others (mode {stat.S_IMODE(info.st_mode):04o}); chmod 600 it")
        return stream.read()


def create_private(path: Path, data: bytes) -> None:
    """A new file, 0600, on disk when this returns.  Raises ``FileExistsError``."""
    _create(path, data)
    sync(path.parent)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file, 0600: after a crash it is the old or the new one; on disk when this returns."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    _create(new, data)
    new.replace(path)
    sync(path.parent)  # else a power cut takes the new name back


def _create(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """A file or folder: what it holds is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
