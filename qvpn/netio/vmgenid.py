"""The kernel's word that this virtual machine was copied: the uevent of its ``vmgenid`` driver.

The driver keeps the generation id to itself, but sends ``NEW_VMGENID=1`` to everybody who listens for uevents
(NETLINK_KOBJECT_UEVENT, group 1) in a network namespace of the first user namespace.  Kernels before that change
have the driver and say nothing.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path

from qvpn.netio.vmclock import Generation

DRIVERS = (Path("/sys/bus/platform/drivers/vmgenid"), Path("/sys/bus/acpi/drivers/vmgenid"))
_NETLINK_KOBJECT_UEVENT = 15
_GROUP = 1
_BUFFER = 4 << 20
_LONGEST = 8192
_MARK = b"NEW_VMGENID=1"


class VmGenId:
    """Counts the copies that the kernel has told of."""

    def __init__(self, events: socket.socket) -> None:
        """``events``: a non-blocking netlink socket; belongs to this object from now on."""
        self._events = events
        self._copies = 0

    @classmethod
    def open(cls, drivers: tuple[Path, ...] = DRIVERS) -> VmGenId | None:
        """None where no device is bound to the driver, or the kernel lets us not listen."""
        if not any((device / "driver").exists() for folder in drivers for device in folder.glob("*")):
            return None
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        try:
            events = socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
        except OSError:
            return None
        try:
            with contextlib.suppress(OSError):  # a burst of other events must not push ours out
                events.setsockopt(socket.SOL_SOCKET, 33, _BUFFER)  # SO_RCVBUFFORCE
            events.bind((0, _GROUP))
        except OSError:
            events.close()
            return None
        return cls(events)

    def generation(self) -> Generation:
        """How often the machine was copied since the start, as far as the kernel told."""
        while True:
            try:
                message, sender = self._events.recvfrom(_LONGEST)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    break
                self._copies += 1  # events were lost, and ours may be among them: a counter used twice is worse
                continue
            if sender[0] == 0 and _MARK in message.split(b"\0"):
                self._copies += 1
        return Generation(self._copies, 0)

    def close(self) -> None:
        """May be called twice."""
        self._events.close()
