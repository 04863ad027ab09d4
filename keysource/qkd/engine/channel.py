"""The classical channel: frames over TCP.  In clear, as QKD's public channel is; authentication comes per block."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from keysource.qkd.distill.wire import Frame, frame_untrusted
from keysource.qkd.errors import BadFrame, PeerLost

MAX_FRAME = 64 * 1024 * 1024
PATIENCE = 30.0
"""Seconds until a silent peer counts as lost."""


class Channel:
    """One connection.  After the first error it is of no more use."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        no_delay(writer)

    @property
    def closed(self) -> bool:
        return self._reader.at_eof() or self._writer.is_closing()

    async def send(self, frame: Frame) -> None:
        """Raises :class:`PeerLost`."""
        try:
            self._writer.write((1 + len(frame.payload)).to_bytes(4, "big") + bytes([frame.kind]) + frame.payload)
            async with asyncio.timeout(PATIENCE):
                await self._writer.drain()
        except TimeoutError:
            raise PeerLost(f"the peer took nothing for {PATIENCE:.0f} s") from None
        except OSError as error:
            raise PeerLost(f"the classical channel broke: {error.strerror or error}") from None

    async def receive(self, patience: float = PATIENCE, limit: int = MAX_FRAME) -> Frame:
        """The next frame.

        Raises:
            PeerLost: the connection ended, or nothing came for ``patience`` seconds.
            BadFrame: not a frame.
        """
        try:
            async with asyncio.timeout(patience):
                length = int.from_bytes(await self._reader.readexactly(4), "big")
                if not 1 <= length <= limit:
                    raise BadFrame(f"a frame of {length} bytes")
                return frame_untrusted(await self._reader.readexactly(length))
        except TimeoutError:
            raise PeerLost(f"the peer said nothing for {patience:.0f} s") from None
        except (asyncio.IncompleteReadError, OSError):
            raise PeerLost("the peer closed the classical channel") from None

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def no_delay(writer: asyncio.StreamWriter) -> None:
    """Hundreds of small questions and answers a block: no Nagle.  And notice hosts that vanished."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
