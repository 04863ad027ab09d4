"""The pulses of the next block fly while this one is distilled: a link's two halves work at once.

Nothing is announced earlier for that: what is said of a block is said after its own START, when all its pulses are
measured.  What flies ahead has a seed of its own; where it comes to nothing (the session ends, the fibre fails) the
seed is thrown away with it, because settings that were sent once must never be sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from keysource.qkd.engine.frontends import Flown, FrontEnd
from keysource.qkd.errors import LinkError
from keysource.qkd.optics.settings import fresh_seed


class Ahead:
    """One session's flights.  :meth:`seed` first, then :meth:`fly` with it."""

    def __init__(self, hardware: FrontEnd, may: Callable[[], bool]) -> None:
        """``may``: asked when a block has flown, whether the next one should begin."""
        self._hardware, self._may = hardware, may
        self._next: tuple[int, bytes, asyncio.Task[Flown]] | None = None

    async def seed(self, block: int) -> bytes:
        """Of the settings of a block: the one with which it flies already, or a fresh one.

        Raises :class:`LinkError` where its flight has failed: only a new session has a new name, so that the fibre
        cannot pair fresh settings of this end with those of the other that have flown already.
        """
        if self._next is not None:
            number, seed, task = self._next
            failed = task.done() and (task.cancelled() or task.exception() is not None)
            if number == block and not failed:
                return seed
            await self.aclose()
            if number == block:
                raise LinkError(f"block {block} flew ahead and was lost on the way")
        return fresh_seed()

    async def fly(self, block: int, pulses: int, seed: bytes, patience: float) -> Flown:
        """Wait for a block that flies already, or let it fly now.  Raises :class:`LinkError`."""
        found = await self._taken(block, seed, patience) if self._next is not None else None
        if found is None:
            found = await self._hardware.fly(block, pulses, seed, patience), True
        if self._may():
            self._begin(block + 1, pulses)
        return found[0]

    async def _taken(self, block: int, seed: bytes, patience: float) -> tuple[Flown, bool] | None:
        """What flew ahead, where it is this block with this seed."""
        if self._next is None:
            return None
        (number, mine, task), self._next = self._next, None
        if (number, mine) != (block, seed):
            await _dropped(task)
            return None
        try:
            async with asyncio.timeout(patience):
                return await task, True
        except TimeoutError:
            raise LinkError(f"the fibre did not finish block {block} in {patience:.0f} s") from None
        finally:
            await _dropped(task)

    def _begin(self, block: int, pulses: int) -> None:
        seed = fresh_seed()
        self._next = block, seed, asyncio.create_task(self._hardware.fly(block, pulses, seed, None))

    async def aclose(self) -> None:
        """Forget what flies ahead, and its seed."""
        if self._next is not None:
            (_block, _seed, task), self._next = self._next, None
            await _dropped(task)


async def _dropped(task: asyncio.Task[Flown]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
