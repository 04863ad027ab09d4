"""Where a site's settings and detections come from: the simulated fibre, recorded files, or a device at a socket.

The post-processing knows only :class:`FrontEnd`.  Files and device speak the records of ``keysource.qkd.records``:
Alice's end gets settings records, Bob's end detection records with bases; with a source of pairs both ends get those.

*Recorded*: a folder with ``BLOCK.settings`` at Alice's, ``BLOCK.detections`` at Bob's, named by the link's own block
number.  A record is renamed to ``.used`` before it is read: the same photons never make two keys.  Its mode is 0600:
who has Alice's settings has the key; a used one is for the operator to erase.

*Live*: a device that listens at a Unix socket, as our user or root (a stranger there would choose the key).  Per
block the end sends ``QDL1``, block u64, pulses u64; the device sends those pulses, or measures them, and answers u32
length and the record.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from pathlib import Path
from typing import Protocol

from keysource.base import End
from keysource.device.server import peer_is_trusted
from keysource.private import sync
from keysource.qkd.errors import BadFrame, LinkError, LinkSettings, PeerLost
from keysource.qkd.files import read_private
from keysource.qkd.optics.sampler import Detections
from keysource.qkd.records import RecordedSettings, detections_untrusted, settings_untrusted

_ASK = struct.Struct(">4sQQ")
Flown = Detections | RecordedSettings | None


class FrontEnd(Protocol):
    """One site's hardware.  ``trouble`` says why it is not ``ready``; ``run`` names the session to it, where it
    cares; ``looks_ahead`` says whether a block that was flown and not used can be forgotten."""

    pace: str | None
    trouble: str
    run: bytes

    @property
    def looks_ahead(self) -> bool: ...

    @property
    def ready(self) -> bool: ...
    def start(self) -> None: ...
    async def aclose(self) -> None: ...

    async def fly(self, block: int, pulses: int, seed: bytes, patience: float | None) -> Flown:
        """Send or measure a block.  Raises :class:`LinkError`."""
        ...


def measures(end: End, pairs: bool) -> bool:
    """Has this site's device detectors?  With a source of ``pairs`` both have."""
    return pairs or end is End.B


def most_bytes(detects: bool, pulses: int) -> int:
    """Of a record of that many pulses."""
    return 64 + (5 * pulses if detects else 4 * (pulses // 8 + 1))


def record_untrusted(detects: bool, record: bytes, pulses: int) -> Detections | RecordedSettings:
    """What a site's device has recorded.  Raises :class:`BadFrame`."""
    if not detects:
        return settings_untrusted(record, pulses)
    seen = detections_untrusted(record, pulses)
    if seen.bases is None:
        raise BadFrame("a device's detection record without its bases")
    return seen


class Recorded:
    """Plays files, each once."""

    pace: str | None = "recorded"
    run = b""
    looks_ahead = False

    def __init__(self, end: End, folder: Path, *, pairs: bool = False) -> None:
        self._detects, self._folder, self._next = measures(end, pairs), folder, 0
        self._suffix = ".detections" if self._detects else ".settings"
        self.trouble = f"{folder}: no record (BLOCK{self._suffix}) is left"

    @property
    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            numbers = [path.stem for path in self._folder.iterdir() if path.suffix == self._suffix]
            return any(number.isdecimal() and int(number) >= self._next for number in numbers)
        return False

    def start(self) -> None:
        """Nothing to do: files are looked for when a block is."""

    async def aclose(self) -> None:
        """Nothing is open."""

    async def fly(self, block: int, pulses: int, seed: bytes, patience: float | None) -> Flown:
        self._next = block + 1
        return await asyncio.to_thread(self._take, block, pulses)

    def _take(self, block: int, pulses: int) -> Flown:
        path = self._folder / f"{block}{self._suffix}"
        used = path.with_name(path.name + ".used")
        try:
            if used.exists():
                raise LinkError(f"{path}: this block was used before")
            path.rename(used)
            sync(self._folder)  # first out of reach, then read
            record = read_private(used, "the record")
        except OSError as error:
            raise LinkError(f"{path}: {error.strerror}") from None
        except LinkSettings as error:
            raise LinkError(str(error)) from None
        try:
            return record_untrusted(self._detects, record, pulses)
        except BadFrame as error:
            raise LinkError(f"{path}: {error}") from None


class Live:
    """Asks a device at a socket, block by block."""

    pace: str | None = "live"
    run = b""
    looks_ahead = False

    def __init__(self, end: End, path: Path, *, pairs: bool = False) -> None:
        self._detects, self._path = measures(end, pairs), path
        self.trouble = f"{path}: no device listens there"

    @property
    def ready(self) -> bool:
        return self._path.is_socket()

    def start(self) -> None:
        """Connected per block: a device may come and go."""

    async def aclose(self) -> None:
        """Nothing stays open."""

    async def fly(self, block: int, pulses: int, seed: bytes, patience: float | None) -> Flown:
        try:
            async with asyncio.timeout(patience):
                record = await self._ask(block, pulses)
            return record_untrusted(self._detects, record, pulses)
        except TimeoutError:
            raise PeerLost(f"{self._path}: the device did not finish block {block} in {patience} s") from None
        except (OSError, asyncio.IncompleteReadError):
            raise PeerLost(f"{self._path}: the device went away in block {block}") from None
        except BadFrame as error:
            raise LinkError(f"{self._path}: {error}") from None

    async def _ask(self, block: int, pulses: int) -> bytes:
        reader, writer = await asyncio.open_unix_connection(os.fspath(self._path))
        try:
            if not peer_is_trusted(writer.get_extra_info("socket")):
                raise BadFrame("the device there runs as another user")
            writer.write(_ASK.pack(b"QDL1", block, pulses))
            length = int.from_bytes(await reader.readexactly(4), "big")
            if length > most_bytes(self._detects, pulses):
                raise BadFrame(f"a record of {length} bytes")
            return await reader.readexactly(length)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
