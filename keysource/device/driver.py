"""What stands between a vendor's box and the device socket: a driver, run by the reference daemon (``daemon``).

A driver tells one thing after the other: a block of new keys, an alarm, a void, how the device is.  The daemon does
all else: the socket, who may connect, exactly once, what is remembered over a restart.  ``vendor`` is a skeleton to
start from; ``courier`` is a whole one.

A driver is found by name in the entry point group ``qvpn.device_drivers``, or named as ``MODULE:CLASS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

from keysource.base import End
from keysource.device.messages import AlarmEvent, BlockEvent, VoidEvent
from keysource.errors import BadSettings
from keysource.private import read_secret

GROUP = "qvpn.device_drivers"


@dataclass(frozen=True, slots=True)
class Condition:
    """How the device is; the fields of ``messages.DeviceStatus`` that only the driver knows."""

    state: str = "up"
    """One of ``messages.STATES``."""
    reason: str = ""
    qber: float | None = None
    """Quantum bit error ratio, 0..1."""
    key_rate: float | None = None
    """Keys per second."""


Report = BlockEvent | VoidEvent | AlarmEvent | Condition


class Driver(Protocol):
    """One end of one link.  Every method may raise :class:`~keysource.errors.KeySourceError`: the daemon then says
    ``down`` with that sentence, closes the driver, waits and starts it again."""

    async def start(self, first_block: int) -> None:
        """Open the device.  Blocks below ``first_block`` were handed over before; they may be told, and are
        dropped."""

    async def next_report(self) -> Report:
        """Wait for something to tell.  Block numbers ascend and are the same at both ends for the same keys; a block
        has at most :data:`MOST_KEYS` keys.  Called again only when the last block found room: so a device that is
        not read waits, it does not lose."""

    def erased(self, before: int) -> None:
        """Blocks below ``before`` are safe at the client: erase what is left of them.  Raises nothing."""

    async def aclose(self) -> None:
        """Give the device up.  May be called twice, and after a failed ``start``."""


MOST_KEYS = 16_384
"""Keys of one block: half a MiB, far below the largest frame."""


@dataclass(frozen=True, slots=True)
class DriverContext:
    """What the daemon gives a driver beside its own table ``[driver]``."""

    link: str
    end: End
    base: Path
    """Folder of the daemon's configuration; relative paths start here."""
    state: Path
    """The daemon's own folder, mode 0700."""
    read_secret: Callable[[Path], bytes] = field(default=read_secret, repr=False)

    def path(self, value: str) -> Path:
        return self.base / value


DriverFactory = Callable[[Mapping[str, object], DriverContext], Driver]
"""Called with the table ``[driver]`` without its ``type``.  Raises :class:`BadSettings`; opens nothing."""


def driver_factory(kind: str) -> DriverFactory:
    """The factory behind ``type``.  Raises :class:`BadSettings`: there is none, or it does not import."""
    try:
        if ":" in kind:
            module, _, name = kind.partition(":")
            return cast(DriverFactory, getattr(importlib.import_module(module), name))
        for point in entry_points(group=GROUP):
            if point.name == kind:
                return cast(DriverFactory, point.load())
    except (ImportError, AttributeError, ValueError) as error:
        raise BadSettings(f"driver {kind!r} does not load: {error}", key="type") from error
    known = ", ".join(sorted({point.name for point in entry_points(group=GROUP)})) or "none"
    raise BadSettings(f"unknown driver {kind!r}; installed are: {known}; or write MODULE:CLASS", key="type")
