"""One TCP connection with a SHA-256 over what went in and over what came out."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable
from typing import Any

from qvpn.demo import payload

_CHUNK = 1 << 16


class StreamFailed(Exception):
    """The transfer did not come to its end; the message says where it stood."""


def source(remote: tuple[str, int], *, total: int, marker: bytes, timeout: float) -> dict[str, Any]:
    """Send ``total`` bytes of the pattern, each chunk numbered, and return bytes, seconds and the digest.

    Raises StreamFailed after ``timeout`` seconds without progress, OSError where no connection comes about.
    """
    digest = hashlib.sha256()
    pattern = payload.filled(_CHUNK, marker)
    left = total
    with socket.create_connection(remote, timeout) as connection:
        start = time.monotonic()
        number = 0
        while left:
            chunk = (number.to_bytes(8, "big") + pattern[8:])[:left]
            try:
                connection.sendall(chunk)
            except TimeoutError:
                raise StreamFailed(f"no progress for {timeout:g} s with {left} of {total} bytes left") from None
            digest.update(chunk)
            left -= len(chunk)
            number += 1
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(timeout)
        connection.recv(1)  # the sink closes when it has everything
        seconds = time.monotonic() - start
    return {"bytes": total, "seconds": seconds, "sha256": digest.hexdigest()}


def sink(local: tuple[str, int], *, timeout: float, ready: Callable[[], None]) -> dict[str, Any]:
    """Take one connection to its end; returns bytes, seconds, bits per second and the digest.

    The clock runs from the connection's start to its last byte.  Raises StreamFailed after ``timeout`` seconds
    without a connection or without a byte.
    """
    digest = hashlib.sha256()
    count = 0
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    with socket.create_server(local, family=family) as listener:
        listener.settimeout(timeout)
        ready()
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(timeout)
                start = time.monotonic()
                while data := connection.recv(1 << 18):
                    digest.update(data)
                    count += len(data)
                seconds = time.monotonic() - start
        except TimeoutError:
            raise StreamFailed(f"nothing came for {timeout:g} s, {count} bytes were here") from None
    return {
        "bytes": count,
        "seconds": seconds,
        "bits_per_second": int(count * 8 / seconds) if seconds else 0,
        "sha256": digest.hexdigest(),
    }
