"""Files that hold a secret: read only where nobody but us can."""

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
