"""Files that a running program reads again: when it is told to (SIGHUP), and when they have changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from keysource.kme.config import ConfigError
from keysource.kme.tlsfiles import Fingerprint

LOOK_EVERY = 2.0
log = structlog.get_logger("kme")


class FileFollower:
    """Calls ``reload`` with whether somebody asked for it; what it raises leaves all as it was."""

    def __init__(
        self, known: Fingerprint, now: Callable[[], Fingerprint], reload: Callable[[bool], Awaitable[None]]
    ) -> None:
        """``known`` was taken before the files were read, so that one that changes meanwhile is read again."""
        self.known = known
        self._now, self._reload = now, reload

    async def run(self, hangup: asyncio.Event) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await hangup.wait()
            ordered = hangup.is_set()
            hangup.clear()
            now = self._now()
            if not ordered and now == self.known:
                continue
            self.known = now
            try:
                await self._reload(ordered)
            except ConfigError as error:
                log.error("nothing was reloaded, all goes on as it was", reason=str(error))
            except OSError as error:  # no descriptor left, say
                self.known = ()  # serve on, but try again: the old files must not be believed for good
                log.error("the reload is not complete, it will be tried again", reason=error.strerror)
