"""Uevents of the vmgenid driver: counted only from the kernel, and never missed silently."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qvpn.netio.vmclock import Generation
from qvpn.netio.vmgenid import VmGenId

COPIED = b"change@/devices/platform/VMGENCTR:00\0ACTION=change\0SUBSYSTEM=platform\0NEW_VMGENID=1\0SEQNUM=9\0"
OTHER = b"add@/devices/virtual/net/veth0\0ACTION=add\0INTERFACE=NEW_VMGENID=1\0SEQNUM=10\0"
SYNTHETIC = b"change@/devices/x\0ACTION=change\0SYNTH_ARG_NEW_VMGENID=1\0SEQNUM=11\0"
KERNEL, SOMEBODY = (0, 1), (4242, 1)


class Events:
    """A netlink socket with these messages and errors in it."""

    def __init__(self, *waiting: tuple[bytes, tuple[int, int]] | OSError) -> None:
        self.waiting = list(waiting)
        self.closed = 0

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[int, int]]:
        if not self.waiting:
            raise BlockingIOError
        first = self.waiting.pop(0)
        if isinstance(first, OSError):
            raise first
        return first

    def close(self) -> None:
        self.closed += 1


def copies(*waiting: Any) -> int:
    events: Any = Events(*waiting)
    seen = VmGenId(events)
    first = seen.generation()
    assert seen.generation() == first == Generation(first.copied, 0)
    return first.copied


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([], 0),
        ([(OTHER, KERNEL), (SYNTHETIC, KERNEL)], 0),
        ([(COPIED, SOMEBODY)], 0),
        ([(OTHER, KERNEL), (COPIED, KERNEL)], 1),
        ([(COPIED, KERNEL), (COPIED, KERNEL)], 2),
        ([OSError(errno.ENOBUFS, "lost"), (OTHER, KERNEL)], 1),
        ([OSError(errno.EBADF, "closed")], 0),
    ],
)
def test_only_the_kernel_tells_of_a_copy(waiting: list[Any], expected: int) -> None:
    assert copies(*waiting) == expected


def test_without_a_bound_device_nothing_is_listened_for(tmp_path: Path) -> None:
    (tmp_path / "bind").write_text("")
    assert VmGenId.open((tmp_path, tmp_path / "missing")) is None


@pytest.mark.netns
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_real_socket_hears_the_kernel(tmp_path: Path) -> None:
    """In a network namespace of its own: the uevents of a new interface come, and none is a copy."""
    (tmp_path / "VMGENCTR:00" / "driver").mkdir(parents=True)
    script = f"""
import pathlib, socket, subprocess, time
from qvpn.netio.vmgenid import VmGenId
seen = VmGenId.open((pathlib.Path({str(tmp_path)!r}),))
subprocess.run(["ip", "link", "add", "qt0", "type", "veth", "peer", "name", "qt1"], check=True)
deadline = time.monotonic() + 5
while time.monotonic() < deadline:
    try:
        heard = seen._events.recv(8192, socket.MSG_PEEK)
        break
    except BlockingIOError:
        time.sleep(0.01)
print(b"/net/qt" in heard, seen.generation().copied)
seen.close(); seen.close()
"""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-W", "error", "-c", script],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("True 0\n", "")
