"""A driver to start from when your QKD device comes with a library instead of a device socket.

Copy this file into a package of your own, fill in :class:`VendorSdk` (four calls; the comments say what each must
keep), and name it in the daemon's file: ``[driver] type = "your_package.driver:VendorDriver"``, ``address = "..."``.
As it stands it is complete but for the library: the tests run it with a stand-in.

The library's calls may block: they run in one thread of their own, one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from keysource.base import wipe
from keysource.device.driver import Condition, DriverContext, Report
from keysource.device.messages import AlarmEvent, BlockEvent
from keysource.errors import BadSettings, Unavailable
from keysource.settings import parse_settings

_T = TypeVar("_T")
_NOT_TOLD = "\0"
POLL = 1.0
"""Seconds that one call of ``read_block`` may wait for a block."""


@dataclass(frozen=True, slots=True)
class VendorBlock:
    """What one call gives."""

    sequence: int
    """The device's own number of the block: it must be the same at both ends for the same bytes, must ascend, and
    must not start again after a power cut.  If yours does, add an epoch in the upper bits that both ends know."""
    keys: bytearray = field(repr=False)
    """Whole keys of 32 bytes, at most ``driver.MOST_KEYS`` of them; wiped by whoever takes it."""
    qber: float | None = None


class VendorSdk(Protocol):
    """The calls of the library, each blocking.  They raise ``OSError`` (also ``TimeoutError``) when the device is
    not there."""

    def open(self, address: str, first_block: int) -> None:
        """Connect, authenticate, and ask for blocks with number >= ``first_block``."""

    def read_block(self, timeout: float) -> VendorBlock | None:
        """The next block, None after ``timeout`` s without one.  The device must hold what is not read yet: a key
        that only one end has is lost."""

    def alarm(self) -> str | None:
        """What the device complains of (QBER over its limit, a monitor, authentication); None when all is well."""

    def close(self) -> None:
        """Disconnect."""


class VendorSettings(BaseModel):
    """The table ``[driver]`` without ``type``."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    address: str = Field(min_length=1)


def open_sdk() -> VendorSdk:
    """FILL IN: import the vendor's library and adapt it to :class:`VendorSdk`."""
    raise BadSettings(
        "this is the skeleton: copy keysource/device/vendor.py and fill in open_sdk() with your library", key="type"
    )


class VendorDriver:
    """A :class:`~keysource.device.driver.Driver` over a blocking library."""

    def __init__(
        self,
        settings: Mapping[str, object],
        context: DriverContext,
        *,
        sdk: Callable[[], VendorSdk] = open_sdk,
    ) -> None:
        self._settings = parse_settings(VendorSettings, settings)
        self._sdk = sdk()
        self._thread = ThreadPoolExecutor(1, f"driver-{context.link}"[:40])
        self._reports: deque[Report] = deque()
        self._alarm: str | None = _NOT_TOLD

    async def start(self, first_block: int) -> None:
        self._forget()
        await self._call(partial(self._sdk.open, self._settings.address, first_block))
        self._reports.append(Condition("up"))

    async def next_report(self) -> Report:
        while not self._reports:
            block = await self._call(partial(self._sdk.read_block, POLL))
            if block is not None:
                if block.qber is not None:
                    self._reports.append(Condition("up", qber=block.qber))
                self._reports.append(BlockEvent(block.sequence, block.keys))
            self._compare_alarm(await self._call(self._sdk.alarm))  # before the block is told, not after it
        return self._reports.popleft()

    def erased(self, before: int) -> None:
        """If your device keeps what was read until it is told, tell it here (do not block: queue it)."""

    async def aclose(self) -> None:
        self._forget()
        with contextlib.suppress(Unavailable):  # it is not there: nothing to close
            await self._call(self._sdk.close)

    def _compare_alarm(self, alarm: str | None) -> None:
        if alarm != self._alarm:
            self._alarm = alarm
            self._reports.appendleft(AlarmEvent(alarm is not None, "device", alarm or ""))

    def _forget(self) -> None:
        """What was not told yet is asked for again; whether the alarm was, nobody knows: so it is told anew."""
        while self._reports:
            report = self._reports.popleft()
            if isinstance(report, BlockEvent):
                wipe(report.keys)
        self._alarm = _NOT_TOLD

    async def _call(self, call: Callable[[], _T]) -> _T:
        """One call of the library at a time.  Raises :class:`Unavailable`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except OSError as error:
            raise Unavailable(f"{self._settings.address}: {error.strerror or type(error).__name__}") from None
