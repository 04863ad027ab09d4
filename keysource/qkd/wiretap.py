"""Whoever sits on the classical channel between Bob and Alice: reads every frame, and touches what she likes.

Reading it is allowed by every proof: the channel is authenticated, not secret.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from keysource.qkd.distill.wire import Frame, Kind
from keysource.settings import Address

Touch = Callable[[str, Frame], Sequence[Frame] | None]
"""("A" or "B" who sent it, frame) -> what goes on instead; None cuts the connection."""
_KEPT = 4
"""Blocks whose frames are kept."""
_OF_A_BLOCK = range(Kind.START, 256)


class Wiretap:
    """A proxy at ``listen`` in front of Alice at ``target``."""

    def __init__(self, listen: Address, target: Address) -> None:
        self._listen, self._target = listen, target
        self.touch: Touch | None = None
        self.blocks: dict[int, list[tuple[str, Frame]]] = {}
        """Frames of the last blocks, by block number, as they were sent."""
        self._block = -1
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self._listen.host, self._listen.port)

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        writers = [writer]
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            there, back = await asyncio.open_connection(self._target.host, self._target.port)
            writers.append(back)
            ways = [asyncio.create_task(self._pump(*way)) for way in ((reader, back, "B"), (there, writer, "A"))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        for each in writers:
            each.close()
        if task is not None:
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sender: str) -> None:
        while True:
            length = int.from_bytes(await reader.readexactly(4), "big")
            onward = self._passed_on(sender, await reader.readexactly(length))
            if onward is None:
                return
            for body in onward:
                writer.write(len(body).to_bytes(4, "big") + body)
            await writer.drain()

    def _passed_on(self, sender: str, body: bytes) -> list[bytes] | None:
        """What goes on instead of a frame (kind and payload), as bytes that need not be frames any more."""
        frame = Frame(Kind(body[0]), body[1:])
        self._note(sender, frame)
        if self.touch is None:
            return [body]
        onward = self.touch(sender, frame)
        return None if onward is None else [bytes([each.kind]) + each.payload for each in onward]

    def _note(self, sender: str, frame: Frame) -> None:
        if frame.kind not in _OF_A_BLOCK:
            return
        if frame.kind is Kind.START:
            self._block = int.from_bytes(frame.payload[:8], "big")
            self.blocks[self._block] = []
            for old in sorted(self.blocks)[:-_KEPT]:
                del self.blocks[old]
        if self._block in self.blocks:
            self.blocks[self._block].append((sender, frame))
