"""Driver ``courier``: keys that somebody carries to both sites as plain files become the keys of a device.

Many systems hand over key that way: a folder, in it files of raw bytes, taken in the order of their numbers and
erased when used.  ::

    [driver]
    type = "courier"
    path = "incoming"       # 17.key, 000018.key, monday-19.cor ...
    pattern = "*.key"       # optional

The last number in a file's name orders it; both sites get the same file under the same number.  A file has a mode of
0600, a multiple of 32 bytes and no key of zeros.  Write it under another name and rename it: what the pattern finds
counts as complete.  A file is erased (overwritten with zeros, removed) when the client of the device socket has its
keys; a file system may keep old bytes elsewhere.

Key ``i`` of file ``n`` is key ``i mod 1024`` of block ``(n << 24) + i // 1024``.  A file whose number has passed is
refused and named in the status: the other site may have used it already.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from keysource.base import KEY_BYTES, wipe
from keysource.device.driver import Condition, DriverContext, Report
from keysource.device.messages import BlockEvent
from keysource.errors import BadSettings, Unavailable
from keysource.settings import parse_settings

KEYS_PER_BLOCK = 1024
_SHIFT = 24
_MOST_FILE_BYTES = 64 * 1024 * 1024
_LOOK_AGAIN = 1.0
_NUMBER = re.compile(r"(\d{1,12})\D*$", re.ASCII)


class CourierSettings(BaseModel):
    """The table ``[driver]`` without ``type``."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    path: str
    pattern: str = Field(default="*.key", min_length=1)


class CourierDriver:
    """See the module.  A :class:`~keysource.device.driver.Driver`."""

    def __init__(
        self,
        settings: Mapping[str, object],
        context: DriverContext,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = parse_settings(CourierSettings, settings)
        if "/" in self._settings.pattern:
            raise BadSettings("pattern: it is for names in one folder, without a slash", key="pattern")
        self._folder = context.path(self._settings.path)
        self._read_secret, self._sleep = context.read_secret, sleep
        self._next_file = 0
        self._last_block: dict[Path, int] = {}
        self._blocks: deque[BlockEvent] = deque()
        self._said = Condition("starting")
        self._not_erased = ""

    async def start(self, first_block: int) -> None:
        self._next_file = first_block >> _SHIFT
        self.erased(first_block)
        self._list()

    async def next_report(self) -> Report:
        while True:
            if self._blocks:
                return self._blocks.popleft()
            condition = self._look()
            if condition != self._said:
                self._said = condition
                return condition
            if not self._blocks:
                await self._sleep(_LOOK_AGAIN)

    def erased(self, before: int) -> None:
        """Erase the files that are used up."""
        for file, last in list(self._last_block.items()):
            if last < before:
                del self._last_block[file]
                self._not_erased = _erase(file) or self._not_erased

    async def aclose(self) -> None:
        while self._blocks:
            wipe(self._blocks.popleft().keys)
        self._last_block.clear()

    def _look(self) -> Condition:
        """Read the next file, if there is one; what to say of the folder."""
        trouble = ""
        for number, file in self._list():
            if number < self._next_file:
                if file not in self._last_block:
                    trouble = f"{file.name}: its number has passed, it is not used; remove it at both sites"
                continue
            if problem := self._take(number, file):
                return Condition("down", problem)
            break
        return Condition("up", self._not_erased or trouble)

    def _take(self, number: int, file: Path) -> str:
        try:
            if file.stat().st_size > _MOST_FILE_BYTES:
                return f"{file.name}: more than {_MOST_FILE_BYTES} bytes"
            keys = bytearray(self._read_secret(file))
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{file.name}: {error.strerror}"
        except ValueError as error:
            return str(error)
        try:
            if problem := _problem(keys):
                return f"{file.name}: {problem}"
            size = KEYS_PER_BLOCK * KEY_BYTES
            for chunk, first in enumerate(range(0, len(keys), size)):
                self._blocks.append(BlockEvent((number << _SHIFT) + chunk, keys[first : first + size]))
        finally:
            wipe(keys)
        self._next_file = number + 1
        self._last_block[file] = self._blocks[-1].block
        return ""

    def _list(self) -> list[tuple[int, Path]]:
        """The files with a number, lowest first.  Raises :class:`Unavailable` where the folder cannot be read."""
        try:
            names = [entry for entry in self._folder.iterdir() if entry.match(self._settings.pattern)]
        except OSError as error:
            raise Unavailable(f"{self._folder}: {error.strerror}", answered=True) from None
        numbered = [(int(found[1]), file) for file in names if (found := _NUMBER.search(file.name))]
        return sorted(numbered)


def _problem(keys: bytearray) -> str:
    if not keys or len(keys) % KEY_BYTES:
        return f"{len(keys)} bytes are not a number of keys of {KEY_BYTES} bytes"
    zero = bytes(KEY_BYTES)
    if any(keys[first : first + KEY_BYTES] == zero for first in range(0, len(keys), KEY_BYTES)):
        return "a key of zeros: was this file used before?"
    return ""


def _erase(file: Path) -> str:
    """One sentence where that did not work, else empty."""
    try:
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
            stream.flush()
            os.fsync(stream.fileno())
        file.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{file.name}: its keys are used, but it cannot be erased ({error.strerror}); erase it by hand"
    return ""
