"""The reference hardware daemon: a driver on one side, the device socket (``framing``) on the other.

``python -m keysource.device serve FILE`` with::

    version = 1

    [device]
    name = "ACME QKD-7, serial 0042"
    link = "left-right"         # the same at both ends
    end = "a"                   # the other site has "b"
    origin = "qkd"              # qkd | relayed | couriered | external | simulated
    socket = "device.sock"
    state = "state"             # what was handed over; never restore it from a backup
    owner = "alternate"         # optional: alternate | a | b, the same at both ends
    hops = 0                    # optional: trusted nodes between the ends

    [driver]
    type = "courier"            # an entry point of qvpn.device_drivers, or MODULE:CLASS
    path = "incoming"           # all else belongs to the driver

At each site one; both drivers must tell the same blocks.
"""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keysource.base import KEY_BYTES, End, Origin, Owner, wipe
from keysource.device.driver import MOST_KEYS, Condition, Driver, DriverContext, Report, driver_factory
from keysource.device.marks import Marks
from keysource.device.messages import ALARM_KINDS, AlarmEvent, BlockEvent, DeviceInfo, VoidEvent
from keysource.device.server import DeviceServer
from keysource.errors import BadAnswer, BadSettings, KeySourceError
from keysource.settings import mistakes
from keysource.sockets import path_mistake

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a driver that failed is started again; doubled each time."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DeviceTable(_Table):
    """``[device]``."""

    name: str = Field(min_length=1, max_length=200)
    link: str = Field(min_length=1, max_length=200)
    end: End
    origin: Origin
    socket: str
    state: str = "state"
    owner: Owner = Owner.ALTERNATE
    hops: int = Field(default=0, ge=0, le=255)


class DriverTable(BaseModel):
    """``[driver]``: all but ``type`` is the driver's own."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    type: str = Field(min_length=1)


class DaemonConfig(_Table):
    """The whole file."""

    version: Literal[1]
    device: DeviceTable
    driver: DriverTable


def load(file: Path) -> DaemonConfig:
    """Raises :class:`BadSettings`: one sentence with file, table and key."""
    try:
        table = tomllib.loads(file.read_bytes().decode())
        return DaemonConfig.model_validate(table)
    except OSError as error:
        raise BadSettings(f"{file}: {error.strerror}") from None
    except ValidationError as error:
        place, text = mistakes(error)[0]
        table_name = f"[{place[0]}] " if len(place) > 1 or place[:1] in (("device",), ("driver",)) else ""
        key = ".".join(str(part) for part in (place[1:] if table_name else place))
        raise BadSettings(f"{file}: {table_name}{key}{': ' if key else ''}{text}", key=key) from None
    except UnicodeDecodeError:  # its text quotes a byte, of a secret file perhaps
        raise BadSettings(f"{file}: not UTF-8 text") from None
    except ValueError as error:
        raise BadSettings(f"{file}: not TOML: {error}") from None


class DeviceDaemon:
    """One end of one link.  ``sleep`` is for tests."""

    def __init__(self, file: Path, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Reads the file, makes the driver.  Raises :class:`BadSettings`; opens nothing."""
        config = load(file)
        base, table, self._sleep = file.resolve().parent, config.device, sleep
        state = base / table.state
        if mistake := path_mistake(base / table.socket):
            raise BadSettings(f"{file}: [device] socket: {mistake}", key="socket")
        context = DriverContext(table.link, table.end, base, state)
        try:
            make = driver_factory(config.driver.type)
            self.driver: Driver = make(dict(config.driver.model_extra or {}), context)
        except BadSettings as error:
            said = str(error) if not error.key or str(error).startswith(error.key) else f"{error.key}: {error}"
            raise BadSettings(f"{file}: [driver] {said}", key=error.key) from None
        self._socket = base / table.socket
        self._info = DeviceInfo(table.name, table.link, table.end, table.owner, table.origin, table.hops)
        self._marks = Marks(state, table.link, table.end, self.driver.erased)
        self.server: DeviceServer | None = None

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until cancelled.  Raises :class:`KeySourceError` where it cannot begin."""
        self._marks.open()
        try:
            server = DeviceServer(self._socket, self._info, next_block=self._marks.next_block, ledger=self._marks)
            self.server = server
            await server.start()
            ready()
            try:
                await self._drive_for_ever(server)
            finally:
                await self.driver.aclose()
                await server.aclose()
        finally:
            self._marks.close()

    async def _drive_for_ever(self, server: DeviceServer) -> None:
        wait = FIRST_WAIT
        while True:
            try:
                await self.driver.start(self._marks.next_block)
                while True:
                    await self._pass_on(server, await self.driver.next_report())
                    wait = FIRST_WAIT
            except KeySourceError as error:
                server.set_status("down", _printable(str(error)))
            except OSError as error:
                server.set_status("down", _printable(f"the driver says: {error.strerror or type(error).__name__}"))
            except Exception as error:  # a vendor's library may raise anything; no traceback, no secret
                server.set_status("down", f"the driver broke ({type(error).__name__})")
            await self.driver.aclose()
            await self._sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _pass_on(self, server: DeviceServer, report: Report) -> None:
        match report:
            case BlockEvent(block, keys):
                await self._publish(server, block, keys)
            case AlarmEvent(active, kind, detail):
                if kind not in ALARM_KINDS:  # a driver's mistake must not cost the alarm
                    kind, detail = "device", f"{kind}: {detail}"
                server.alarm(active, kind, _printable(detail))
            case VoidEvent(before):
                server.void(before)
            case Condition(state, reason, qber, key_rate):
                server.set_status(state, _printable(reason), qber=qber, key_rate=key_rate)

    async def _publish(self, server: DeviceServer, block: int, keys: bytearray) -> None:
        """Raises :class:`BadAnswer` where the driver's block is none."""
        if self._marks.is_spent(block):
            wipe(keys)
            self.driver.erased(self._marks.next_block)
            return
        if not keys or len(keys) % KEY_BYTES or len(keys) > MOST_KEYS * KEY_BYTES:
            wipe(keys)
            raise BadAnswer(f"the driver gave a block of {len(keys)} bytes")
        await server.wait_for_room(len(keys) // KEY_BYTES)
        if server.holds(block):  # told again by a driver that was started again
            wipe(keys)
            return
        try:
            server.publish(block, keys)
        except ValueError:
            wipe(keys)
            raise BadAnswer(f"the driver gave block {block} after a later one") from None

    def facts(self) -> dict[str, Any]:
        """For people: what ``check`` prints."""
        return self._info.header() | {"socket": str(self._socket)}


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:300])
