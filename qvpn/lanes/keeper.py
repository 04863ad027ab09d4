"""Keeps the process of one lane running: spawned, not forked, and started again with back-off.

A process that has died took its keys with it.  No key that one process had is ever given to another: what the next
one gets is of epochs that are made after it has said that it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qvpn.errors import BadPacket
from qvpn.lanes.messages import MAX_MESSAGE, Message, Report, Setup, decode, encode
from qvpn.lanes.relay import RelayInlet, relay_pair
from qvpn.netio.tun import TunDevice

FIRST_WAIT, LONGEST_WAIT = 0.1, 30.0
STEADY = 30.0
"""Who ran so many seconds starts the back-off anew."""
SILENT = 10.0
"""Seconds without a report, which come every second, after which a process is taken to be stuck."""
STOP_PATIENCE = 3.0
_SO_SNDBUFFORCE = 32


@dataclass(frozen=True, slots=True)
class LaneKit:
    """What a lane's processes are given, one after the other; opened while the daemon had the right to."""

    number: int
    port: int
    queue: TunDevice
    """A queue of the TUN, detached."""
    listener: socket.socket

    def close(self) -> None:
        """The queue and the port.  May be called twice."""
        self.queue.close()
        self.listener.close()


class LaneKeeper:
    """One lane's process, again and again."""

    def __init__(
        self,
        kit: LaneKit,
        setup: Setup,
        log: Any,
        changed: Callable[[LaneKeeper], None],
        *,
        module: str = "qvpn.lanes",
        silent: float = SILENT,
    ) -> None:
        """``changed`` is called when it came up, when it reported, and when it is gone (:attr:`up` tells)."""
        self.kit = kit
        self.up = False
        """It has reported, so it takes keys."""
        self.report = Report({}, {}, {})
        """The newest, of the process that runs or ran."""
        self.inlet: RelayInlet | None = None
        """Frames that it cannot send, while it is up."""
        self.restarts = 0
        self.last_words = ""
        """How it ended the last time; empty while it never did."""
        self._setup = setup
        self._log = log
        self._changed = changed
        self._module = module
        self._silent = silent
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._heard = 0.0
        self._buffer = memoryview(bytearray(MAX_MESSAGE))

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._keep_running())

    async def aclose(self) -> None:
        """Close the socket pair, which ends the process; SIGKILL after some patience.  May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def tell(self, message: Message) -> None:
        """Say something to the process.  One that does not listen is killed: it must not go on with what it has."""
        if self._control is None:
            return
        data = encode(message)
        try:
            self._control.send(data)
        except OSError as error:
            self._kill(f"did not take a message ({type(error).__name__})")
        finally:
            data[:] = bytes(len(data))

    def _kill(self, why: str) -> None:
        self._log.error("lane is killed", lane=self.kit.number, reason=why)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._gone()

    # the process

    async def _keep_running(self) -> None:
        wait = FIRST_WAIT
        while True:
            began = asyncio.get_running_loop().time()
            try:
                self.last_words = await self._run_once()
            except OSError as error:
                self.last_words = f"cannot be started: {error.strerror}"
            except Exception as error:  # a mistake of ours must not leave the lane without a keeper
                self.last_words = f"internal error: {type(error).__name__}"
            self._log.error("lane ended", lane=self.kit.number, reason=self.last_words)
            if asyncio.get_running_loop().time() - began >= STEADY:
                wait = FIRST_WAIT
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
            self.restarts += 1

    async def _run_once(self) -> str:
        ours, theirs = _control_pair()
        inlet, outlet = relay_pair()
        try:
            handed = (theirs.fileno(), outlet.fileno(), self.kit.queue.fileno(), self.kit.listener.fileno())
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # the folder that the daemon was started in is no place for modules
                "-m",
                self._module,
                *map(str, (os.getpid(), *handed)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=handed,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        except BaseException:
            ours.close()
            inlet.close()
            raise
        finally:
            theirs.close()
            outlet.close()
        self._process, self._control = process, ours
        self.inlet = RelayInlet(inlet, f"lane {self.kit.number}")
        reading = asyncio.create_task(_last_line(process.stderr))
        try:
            self._listen()
            code = await self._watch(process)
        finally:
            self._gone()
            self._process = None
            await _end(process)
            reading.cancel()
        return _words(code, reading)

    def _listen(self) -> None:
        if self._control is not None:
            self._heard = asyncio.get_running_loop().time()
            self.tell(self._setup)
            asyncio.get_running_loop().add_reader(self._control, self._on_control)

    async def _watch(self, process: asyncio.subprocess.Process) -> int:
        """Wait for its end; a process that is stuck is killed."""
        loop = asyncio.get_running_loop()
        looked = loop.time()
        while True:
            try:
                async with asyncio.timeout(self._silent / 5):
                    return await process.wait()
            except TimeoutError:
                now = loop.time()
                punctual, looked = now - looked < self._silent / 2, now  # else it was we who were stopped
                if punctual and now - self._heard > self._silent:
                    self._kill(f"has not reported for {self._silent:g} seconds")

    def _on_control(self) -> None:
        while self._control is not None:
            try:
                length = self._control.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                length = 0
            if not length:
                self._gone()
                return
            try:
                message = decode(self._buffer[:length])
            except BadPacket as error:
                self._kill(str(error))
                return
            if isinstance(message, Report):
                self._heard = asyncio.get_running_loop().time()
                self.report, self.up = message, True
                self._changed(self)

    def _gone(self) -> None:
        """Its keys are void from this moment, whatever it still does: it is told nothing more."""
        control, self._control = self._control, None
        if control is None:
            return
        self.up = False
        self._changed(self)
        asyncio.get_running_loop().remove_reader(control)
        control.close()
        inlet, self.inlet = self.inlet, None
        if inlet is not None:
            inlet.close()


def _control_pair() -> tuple[socket.socket, socket.socket]:
    """(ours, the process's).  Each message must fit; ours never blocks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    for option, size in ((socket.SO_SNDBUF, MAX_MESSAGE), (_SO_SNDBUFFORCE, 2 * MAX_MESSAGE)):
        with contextlib.suppress(OSError):
            ours.setsockopt(socket.SOL_SOCKET, option, size)
    return ours, theirs


async def _end(process: asyncio.subprocess.Process) -> None:
    """The closed socket pair ends it; if not, a signal does."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_PATIENCE):
            await process.wait()
            return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _last_line(stream: asyncio.StreamReader | None) -> str:
    """Read to the end; gives the last line that is not empty, printable, at most 200 characters."""
    tail = b""
    while stream is not None and (data := await stream.read(4096)):
        tail = (tail + data)[-4096:]
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable())[:200] if lines else ""


def _words(code: int, reading: asyncio.Task[str]) -> str:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    line = reading.result() if reading.done() and not reading.cancelled() else ""
    return f"ended with {how}" + (f": {line}" if line else "")
