"""What a hypervisor tells its guest when it copies it: the generation counter of the VMClock device.

Linux shows the device as ``/dev/vmclock0``; its page (``struct vmclock_abi`` in ``linux/vmclock-abi.h``) is
little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

PATH = "/dev/vmclock0"
MAGIC = 0x4B4C4356
_VERSION = 1
_FLAG_GENERATION = 1 << 8
_HEAD = struct.Struct("<IIHBBIQQ")
"""magic, size of the region, version, counter id, time type, sequence count, disruption marker, flags"""
_GENERATION = struct.Struct("<Q")
_GENERATION_AT = 104
PAGE_BYTES = _GENERATION_AT + _GENERATION.size


@dataclass(frozen=True, slots=True)
class Generation:
    """Two values that mean nothing but "changed": ``copied`` for a copy of the machine, ``moved`` for a migration."""

    copied: int
    moved: int


def parse(page: bytes) -> Generation | None:
    """The values in the device's page; None: it is no VMClock of this version, or is being written.

    Where the hypervisor keeps no generation counter, every disruption counts as a copy: a counter that would go
    back must never be sent on.
    """
    if len(page) < _HEAD.size:
        return None
    magic, size, version, _counter, _kind, sequence, disruption, flags = _HEAD.unpack_from(page)
    if magic != MAGIC or version != _VERSION or sequence & 1:
        return None
    if not flags & _FLAG_GENERATION or min(size, len(page)) < PAGE_BYTES:
        return Generation(disruption, disruption)
    return Generation(_GENERATION.unpack_from(page, _GENERATION_AT)[0], disruption)


class VmClock:
    """An open VMClock device."""

    def __init__(self, descriptor: int, read: Callable[[int, int, int], bytes] = os.pread) -> None:
        """Owns the descriptor from now on."""
        self._descriptor = descriptor
        self._read = read

    @classmethod
    def open(cls, path: str = PATH) -> VmClock | None:
        """None where there is no such device that we may read."""
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError:
            return None

    def generation(self) -> Generation | None:
        """The values now; None where they cannot be read at this moment."""
        try:
            return parse(self._read(self._descriptor, PAGE_BYTES, 0))
        except OSError:
            return None

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
