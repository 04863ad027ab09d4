"""Keeps a site's key sources open: a failed start is tried again with back-off, and shown in status.

A source is shared by all peers that name it.  What no retry can heal (wrong settings, state older than what the
peer has seen) ends the daemon's start instead.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

from qvpn.control.keyfeed import BadSettings, KeySource, KeySourceError, RolledBack, SourceStatus

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
CLOSE_LIMIT = 5.0


class SourceRefused(Exception):
    """A key source that no waiting mends; ``error`` is what it said."""

    def __init__(self, name: str, error: KeySourceError) -> None:
        super().__init__(f"{name}: {error}")
        self.name = name
        self.error = error


class SourceKeeper:
    """Starts, restarts and closes one source."""

    def __init__(self, name: str, kind: str, source: KeySource, log: Any) -> None:
        self.name = name
        self.kind = kind
        self.source = source
        self.last = SourceStatus(False, "not asked yet")
        """What the source last said to any of its peers."""
        self.restarts = 0
        self.problem: str | None = None
        """Why it is not open; None while it is."""
        self._log = log
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the source, or go on trying in the background.

        Raises:
            SourceRefused: an operator must do something first.
        """
        try:
            if not await self._try():
                self._task = asyncio.get_running_loop().create_task(self._retry())
        except (BadSettings, RolledBack) as error:
            self.problem = str(error)
            raise SourceRefused(self.name, error) from None

    async def aclose(self) -> None:
        """Stop trying, close the source.  May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSE_LIMIT):
                await self.source.aclose()
        except Exception as error:
            self._log.error("key source did not close", source=self.name, error=type(error).__name__)

    async def _try(self) -> bool:
        try:
            await self.source.start()
        except (BadSettings, RolledBack):
            raise
        except Exception as error:
            known = isinstance(error, KeySourceError)
            self.problem = str(error) if known else f"the key source broke ({type(error).__name__})"
            self._log.warning("key source does not start", source=self.name, reason=self.problem)
            return False
        if self.problem is not None:
            self._log.info("key source started", source=self.name)
        self.problem = None
        return True

    async def _retry(self) -> None:
        pause = FIRST_PAUSE
        while True:
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))
            self.restarts += 1
            try:
                if await self._try():
                    return
            except (BadSettings, RolledBack) as error:
                self.problem = str(error)
                self._log.error("key source refuses to start", source=self.name, reason=self.problem)
                return
            pause = min(2 * pause, LONGEST_PAUSE)


async def start_all(keepers: Mapping[str, SourceKeeper]) -> None:
    """Start every source, at the same time.

    Raises:
        SourceRefused: the first that cannot be mended by waiting; the others are closed again.
    """
    results = await asyncio.gather(*(keeper.start() for keeper in keepers.values()), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            await close_all(keepers)
            raise result


async def close_all(keepers: Mapping[str, SourceKeeper]) -> None:
    """Close every source; one that hangs does not hold up the others."""
    await asyncio.gather(*(keeper.aclose() for keeper in keepers.values()))
