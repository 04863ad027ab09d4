"""A site's connection to the fibre: its modulators (Alice) or its basis choice and detectors (Bob)."""

from __future__ import annotations

import asyncio

from keysource.base import End
from keysource.qkd.config import Address
from keysource.qkd.engine import seal
from keysource.qkd.errors import BadFrame, LinkError, PeerLost
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.records import detections_untrusted

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0
RUN_BYTES = 8


class Hardware:
    """Stays connected to the fibre; one block at a time."""

    looks_ahead = True

    def __init__(self, end: End, address: Address, key: bytes, digest: str, *, test: bool = False) -> None:
        """``test``: Bob's attenuator, for a monitor of the efficiency."""
        self._test = test
        self._end, self._address, self._key, self._digest = end, address, key, bytes.fromhex(digest)
        self._sealed: seal.Sealed | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: tuple[bytes, asyncio.Future[bytes]] | None = None
        self.run = bytes(RUN_BYTES)
        self.pace: str | None = None
        """As the fibre says: ``realtime`` or ``fast``."""
        self.trouble = "the fibre was not reached yet"
        """Why :attr:`ready` is False; a sentence."""

    @property
    def ready(self) -> bool:
        return self._sealed is not None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_connected())

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def fly(self, block: int, pulses: int, seed: bytes, patience: float | None) -> Detections | None:
        """Tell the settings of a block, wait until all its pulses are measured; Bob gets the detections, with
        pairs Alice gets hers.

        Raises:
            PeerLost: the fibre is not there, went away, or is silent for ``patience`` seconds (None: for ever).
            LinkError: it refuses.
        """
        sealed = self._sealed
        if sealed is None:
            raise PeerLost(self.trouble)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting = waiting = (block.to_bytes(8, "big") + self.run, future)
        try:
            await sealed.send(
                seal.PREPARE, seal.PREPARE_FORM.pack(block, self.run, pulses, self._digest, seed, self._test)
            )
            async with asyncio.timeout(patience):
                answer = await future
        except TimeoutError:
            raise PeerLost(f"the fibre did not finish block {block} in {patience or 0:.0f} s") from None
        finally:
            if self._waiting is waiting:
                self._waiting = None
        if self._end is End.A and not answer:
            return None
        try:
            return detections_untrusted(answer, pulses)
        except BadFrame as error:
            raise LinkError(f"the fibre: {error}") from None

    async def _keep_connected(self) -> None:
        wait = _FIRST_WAIT
        while True:
            try:
                async with asyncio.timeout(5):
                    reader, writer = await asyncio.open_connection(self._address.host, self._address.port)
                    sealed = await seal.dial(reader, writer, self._key, self._end)
                try:
                    await self._read(sealed)
                finally:
                    wait = wait if self._sealed is None else _FIRST_WAIT
                    self._sealed = None
                    await sealed.aclose()
            except (OSError, TimeoutError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or "timeout"
                self._lose(f"the fibre at {self._address} does not answer ({reason})")
            except LinkError as error:
                self._lose(str(error))
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _lose(self, reason: str) -> None:
        self.trouble = reason
        if self._waiting is not None and not self._waiting[1].done():
            self._waiting[1].set_exception(PeerLost(reason))

    async def _read(self, sealed: seal.Sealed) -> None:
        while True:
            kind, payload = await sealed.receive()
            if kind == seal.WELCOME:
                self.pace = payload.decode(errors="replace")[:20]
                self._sealed = sealed  # it has our key: ready
                continue
            if self._waiting is None or self._waiting[1].done():
                continue  # a block that was given up
            name, future = self._waiting
            if kind == seal.REFUSED:
                future.set_exception(LinkError(payload.decode(errors="replace")[:200]))
            elif kind == seal.FLOWN and payload[: len(name)] == name:
                future.set_result(payload[len(name) :])
