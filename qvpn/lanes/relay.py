"""Frames that a lane cannot send go to lane 0 over a socket pair, one datagram each, as the TUN gave them.

A frame is a virtio-net header and a packet; plain packets may follow one another in one datagram, a superpacket
stands alone.  What does not fit into the socket's buffer is lost and counted: nothing ever waits here.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence

from qvpn.netio import offload
from qvpn.netio.base import MAX_READ, VNET_HEADER
from qvpn.tunnel import ip

RELAY_BUFFER = 4 << 20
_SO_SNDBUFFORCE = 32
DATAGRAMS = 16
"""Datagrams per batch: the lane's traffic must not keep lane 0 from its own."""


def relay_pair() -> tuple[socket.socket, socket.socket]:
    """(lane 0's end, the lane's end).  Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for each in (ours, theirs):
        each.setblocking(False)
    try:
        theirs.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, RELAY_BUFFER)
    except OSError:  # without CAP_NET_ADMIN: as much as anybody may have
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RELAY_BUFFER)
    return ours, theirs


class RelayOutlet:
    """The lane's end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def __call__(self, frames: memoryview) -> bool:
        """Hand frames over; False: there was no room."""
        try:
            self._end.send(frames)
        except OSError:
            return False
        return True


class RelayInlet:
    """Lane 0's end: a :class:`~qvpn.netio.base.Tun` that only gives."""

    def __init__(self, end: socket.socket, name: str) -> None:
        self._end = end
        self.name = name
        self.mtu = 0
        self.merges_udp = False
        self._errors: Counter[str] = Counter()

    @property
    def errors(self) -> dict[str, int]:
        return dict(self._errors)

    def read_batch(self, arena: memoryview, limit: int) -> list[tuple[int, int]]:
        batch: list[tuple[int, int]] = []
        position, last = 0, len(arena) - MAX_READ
        for _ in range(DATAGRAMS):
            if position > last or len(batch) >= limit:
                break
            try:
                length = os.readv(self._end.fileno(), [arena[position : position + MAX_READ]])
            except OSError:
                break
            if not length:  # the lane's process is gone; whoever keeps it will hear of that by itself
                break
            frames = _split(arena, position, position + length)
            batch += frames
            position += length
            if frames and arena[frames[-1][0] + 1] != offload.GSO_NONE:
                break
        return batch

    def write_batch(self, packets: Sequence[memoryview]) -> int:
        return 0

    def fileno(self) -> int:
        return self._end.fileno()

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        """The event loop watches :meth:`fileno` instead."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._end.close()


def _split(arena: memoryview, start: int, end: int) -> list[tuple[int, int]]:
    """(offset, length) of each frame; what does not parse is one frame, for :class:`Outbound` to refuse."""
    frames: list[tuple[int, int]] = []
    while start < end:
        inner = start + VNET_HEADER
        length = ip.packet_length(arena, inner, end) if inner < end and arena[start + 1] == offload.GSO_NONE else 0
        size = VNET_HEADER + length if length else end - start
        frames.append((start, size))
        start += size
    return frames
