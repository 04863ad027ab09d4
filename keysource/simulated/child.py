"""Keep a program of ours running as a child: spawned, in its own session, dead when we are, started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence

STEADY = 30.0
"""Who ran so many seconds starts the back-off anew."""
_STOP_PATIENCE = 3.0
_LAST_WORDS = 0.5
"""Seconds to read what a dead child said: a grandchild may hold the pipe open for longer."""


class Child:
    """``python -m MODULE ARGUMENTS``, again and again until :meth:`aclose`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        first_wait: float = 0.5,
        longest_wait: float = 30.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._command = [sys.executable, "-m", "keysource.simulated.leash", str(os.getpid()), module, *arguments]
        self._first_wait, self._longest_wait, self._sleep = first_wait, longest_wait, sleep
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self.last_words = ""
        """How it ended the last time, for people; empty while it never ended."""
        self.restarts = 0
        """How often it was started again, or at least tried to."""

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_running())

    async def aclose(self) -> None:
        """SIGTERM, a few seconds of patience, SIGKILL.  May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep_running(self) -> None:
        wait = self._first_wait
        while True:
            began = asyncio.get_running_loop().time()
            try:
                self.last_words = await self._run_once()
            except OSError as error:
                self.last_words = f"cannot be started: {error.strerror}"
            if asyncio.get_running_loop().time() - began >= STEADY:
                wait = self._first_wait
            await self._sleep(wait)
            wait = min(2 * wait, self._longest_wait)
            self.restarts += 1

    async def _run_once(self) -> str:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._process = process
        reading = asyncio.create_task(_last_line(process.stderr))
        try:
            code = await process.wait()
            await asyncio.wait([reading], timeout=_LAST_WORDS)
        finally:
            self._process = None
            await _stop(process)
            reading.cancel()
        last_line = reading.result() if reading.done() and not reading.cancelled() else ""
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"ended with {how}" + (f": {last_line}" if last_line else "")


async def _last_line(stream: asyncio.StreamReader | None) -> str:
    """Read to the end; gives the last line that is not empty, printable, at most 200 characters."""
    tail = b""
    while stream is not None and (data := await stream.read(4096)):
        tail = (tail + data)[-4096:]
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable())[:200] if lines else ""


async def _stop(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_PATIENCE):
                await process.wait()
