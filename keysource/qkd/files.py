"""Private files: read only where nobody else can, written so that a crash leaves the old or the new one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from keysource.qkd.errors import LinkSettings


def read_private(path: Path, what: str) -> bytes:
    """The bytes of a file that is ours and closed to others.

    Raises:
        FileNotFoundError: it is not there.
        LinkSettings: it is not a file, not ours, or open to others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LinkSettings(f"{path}: {what} cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), 0):
            raise LinkSettings(f"{path}: {what} is not a file of this user")
        if status.st_mode & 0o077:
            raise LinkSettings(f"{path}: {what} is open to others; chmod 600 it")
        return stream.read()


def create_private(path: Path, data: bytes) -> None:
    """A new file, 0600, on disk when this returns.  Raises ``FileExistsError``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(path.parent)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file, 0600: after a crash it is the old or the new one; on disk when this returns."""
    new = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    create_private(new, data)
    new.replace(path)
    sync_folder(path.parent)


def lock_folder(folder: Path) -> int:
    """Make a folder (0700) and hold its lock until the process ends; the descriptor keeps it.

    Raises:
        LinkSettings: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LinkSettings(f"{folder}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LinkSettings(f"{folder}: another process of this link is running") from None
    return descriptor


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
