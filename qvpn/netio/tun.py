"""The Linux TUN device with virtio-net headers (kernel: Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

from qvpn.netio.base import MAX_READ
from qvpn.netio.errors import TunError, reason

TUN_PATH = "/dev/net/tun"
NAME_BYTES = 15

_IFREQ = struct.Struct("16sH22x")
_IFREQ_MTU = struct.Struct("16si20x")
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNGETIFF = 0x800454D2
_TUNSETVNETLE = 0x400454DC
_SIOCGIFMTU = 0x8921
_TUNSETQUEUE = 0x400454D9
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0001, 0x1000, 0x4000, 0x0100
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x0200, 0x0400

_F_CSUM, _F_TSO4, _F_TSO6, _F_TSO_ECN, _F_USO4, _F_USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40
_TCP_OFFLOADS = _F_CSUM | _F_TSO4 | _F_TSO6 | _F_TSO_ECN
OFFLOADS = (_TCP_OFFLOADS | _F_USO4 | _F_USO6, _TCP_OFFLOADS, _F_CSUM, 0)
"""What to ask for, best first: UDP segmentation came with Linux 6.2, and some kernels allow none at all."""

PLAIN = (0,)
"""Only single packets with finished checksums."""

Opener = Callable[[str, int], int]
"""``open(path, flags) -> descriptor``, as :func:`os.open`."""


class TunDevice:
    """One TUN.  After it is open, no error of the kernel is raised: reads end, writes are counted."""

    def __init__(self, descriptor: int, *, offloads: Sequence[int] = OFFLOADS) -> None:
        """Take over an open ``/dev/net/tun`` that already has its name.  Raises :class:`TunError`."""
        self._descriptor = descriptor
        self._errors: Counter[str] = Counter()
        self.gone = False
        """Somebody deleted the interface: there is nothing to read or write any more."""
        try:
            flags, self._name = _flags_and_name(descriptor)
            if not flags & _IFF_VNET_HDR or not flags & _IFF_TUN:
                raise TunError(f"interface {self._name} was not made with IFF_TUN and IFF_VNET_HDR")
            os.set_blocking(descriptor, False)
            if sys.byteorder == "big":
                fcntl.ioctl(descriptor, _TUNSETVNETLE, struct.pack("i", 1))
            self.offloads = _set_offloads(descriptor, offloads)
        except OSError as error:
            raise TunError(f"the TUN device cannot be set up: {reason(error)}") from None

    @classmethod
    def open(
        cls, name: str, *, opener: Opener = os.open, offloads: Sequence[int] = OFFLOADS, queues: bool = False
    ) -> Self:
        """Make (or attach to) the interface ``name``, which may end in ``%d``.  Raises :class:`TunError`.

        ``queues``: the interface may have several; each further call with its name opens one more.
        """
        if not 0 < len(name.encode()) <= NAME_BYTES:
            raise TunError(f"interface name {name!r} must have 1 to {NAME_BYTES} bytes")
        try:
            descriptor = opener(TUN_PATH, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TunError(f"{TUN_PATH} cannot be opened: {reason(error)}") from None
        try:
            flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues else 0)
            fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
            return cls(descriptor, offloads=offloads)
        except OSError as error:
            os.close(descriptor)
            raise TunError(f"interface {name} cannot be made: {_explain(error, name)}") from None
        except TunError:
            os.close(descriptor)
            raise

    @property
    def name(self) -> str:
        return self._name

    @property
    def mtu(self) -> int:
        """The interface's MTU now; 0 if it is gone."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            try:
                answer = fcntl.ioctl(asker, _SIOCGIFMTU, _IFREQ_MTU.pack(self._name.encode(), 0))
            except OSError:
                return 0
        return int(_IFREQ_MTU.unpack(answer)[1])

    @property
    def merges_udp(self) -> bool:
        """The kernel takes superpackets of UDP since it makes them."""
        return bool(self.offloads & _F_USO4)

    @property
    def errors(self) -> dict[str, int]:
        """Errno names of failed reads and writes, counted."""
        return dict(self._errors)

    def read_batch(self, arena: memoryview, limit: int) -> list[tuple[int, int]]:
        last, descriptor, readv = len(arena) - MAX_READ, self._descriptor, os.readv
        if last < 0 or limit < 1:
            return []
        batch: list[tuple[int, int]] = []
        position, room = 0, arena
        try:
            while True:
                length = readv(descriptor, (room,))
                batch.append((position, length))
                if arena[position + 1]:
                    break
                position += length
                if position > last or len(batch) >= limit:
                    break
                room = arena[position:]
        except BlockingIOError:
            pass
        except OSError as error:
            self._count(error)
        return batch

    def write_batch(self, packets: Sequence[memoryview]) -> int:
        taken, descriptor, write = 0, self._descriptor, os.write
        for packet in packets:
            try:
                write(descriptor, packet)
                taken += 1
            except OSError as error:
                self._count(error)
        return taken

    def fileno(self) -> int:
        return -1 if self.gone else self._descriptor

    def attach(self) -> None:
        """Let the kernel give packets to this queue again.  Raises :class:`TunError`."""
        self._set_queue(_IFF_ATTACH_QUEUE)

    def detach(self) -> None:
        """The kernel spreads packets over the other queues; writing goes on.  Raises :class:`TunError`."""
        self._set_queue(_IFF_DETACH_QUEUE)

    def _set_queue(self, flag: int) -> None:
        try:
            fcntl.ioctl(self._descriptor, _TUNSETQUEUE, _IFREQ.pack(b"", flag))
        except OSError as error:
            raise TunError(f"a queue of interface {self._name} cannot be switched: {reason(error)}") from None

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        """The event loop watches :meth:`fileno` instead."""

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _count(self, error: OSError) -> None:
        self.gone = self.gone or error.errno in (errno.EBADFD, errno.EBADF, errno.ENODEV)
        self._errors[errno.errorcode.get(error.errno or 0, "unknown")] += 1


def _flags_and_name(descriptor: int) -> tuple[int, str]:
    name, flags = _IFREQ.unpack(fcntl.ioctl(descriptor, _TUNGETIFF, bytes(_IFREQ.size)))
    return flags, name.rstrip(b"\0").decode()


def _set_offloads(descriptor: int, wanted: Sequence[int]) -> int:
    """Ask for each set in turn until the kernel accepts one; returns it."""
    for offloads in wanted:
        try:
            fcntl.ioctl(descriptor, _TUNSETOFFLOAD, offloads)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return offloads
    raise TunError("the kernel accepts none of the TUN offload settings that this program knows")


def _explain(error: OSError, name: str) -> str:
    if error.errno == errno.EPERM:
        return "operation not permitted (CAP_NET_ADMIN is needed)"
    if error.errno == errno.EBUSY:
        return "another process has it open"
    if error.errno == errno.EINVAL and name in (known for _, known in socket.if_nameindex()):
        return "it exists with other settings (one queue or several: is it made for another number of lanes?)"
    return reason(error)
