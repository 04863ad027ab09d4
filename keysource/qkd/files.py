"""A link's private files, with its own errors, and the lock of its folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from keysource.private import read_secret
from keysource.qkd.errors import LinkSettings


def read_private(path: Path, what: str) -> bytes:
    """The bytes of a file that is ours and closed to others.

    Raises:
        FileNotFoundError: it is not there.
        LinkSettings: it is not a file, not ours, or open to others.
    """
    try:
        return read_secret(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LinkSettings(f"{path}: {what} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LinkSettings(f"{what}: {error}") from None


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
