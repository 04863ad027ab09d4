"""A quantum random number generator at a character device, a FIFO or a Unix socket: raw samples, one byte each."""

from __future__ import annotations

import os
import select
import socket
import stat
from pathlib import Path

from keysource.device.server import peer_is_trusted
from keysource.qkd.errors import BadRandomness, LinkSettings

PATIENCE = 5.0
"""Seconds without a byte until the generator counts as broken."""


class Qrng:
    """``Qrng(path)(size)`` reads so many samples.  They are waited for: a generator should give 10 kB/s or more."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`LinkSettings` for what is no generator: a file, whose bytes come again, or a socket of
        somebody else's process."""
        self._path = path
        self._socket: socket.socket | None = None
        try:
            kind = path.stat().st_mode
            if stat.S_ISSOCK(kind):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(PATIENCE)
                self._socket.connect(os.fspath(path))
                self._descriptor = self._socket.fileno()
            elif stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            else:
                raise LinkSettings(f"{path}: a random number generator is a character device, a FIFO or a socket")
        except OSError as error:
            raise LinkSettings(f"{path}: {error.strerror or error}") from None
        if self._socket is not None and not peer_is_trusted(self._socket):
            raise LinkSettings(f"{path}: the socket is of another user's process")

    def __call__(self, size: int) -> bytes:
        """Raises :class:`BadRandomness` where it gives nothing, or ends."""
        found = bytearray()
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while len(found) < size:
            if not poll.poll(1000.0 * PATIENCE):
                raise BadRandomness(f"{self._path}: the random number generator gave nothing for {PATIENCE:.0f} s")
            try:
                some = os.read(self._descriptor, size - len(found))
            except BlockingIOError:
                continue
            except OSError as error:
                raise BadRandomness(f"{self._path}: {error.strerror}") from None
            if not some:
                raise BadRandomness(f"{self._path}: the random number generator has ended")
            found += some
        return bytes(found)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self._descriptor)
