"""The few Linux calls that Python 3.11 does not offer: namespaces, mounts, and a child's death with its parent.

Sources: unshare(2), setns(2), mount(2), prctl(2).  ``os.unshare`` and ``os.setns`` exist from
Python 3.12 on only.  Every function raises OSError with the kernel's reason.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Give the calling thread namespaces of its own (``CLONE_NEW...``)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def set_network_namespace(descriptor: int) -> None:
    """Move the calling thread into the network namespace behind an open ``/proc/.../ns/net`` descriptor."""
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(CLONE_NEWNET)), "setns")


def mount(source: str, target: str | Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2); ``kind`` is the filesystem type, empty for bind mounts and changes of propagation."""
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _check(result, f"mount on {target}")


def mount_tmpfs(target: str | Path) -> None:
    """Hide ``target`` under an empty filesystem in memory that ends with the mount namespace."""
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL when the process ``parent`` ends; kills at once where that has already happened."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def new_network_namespace() -> int:
    """Make a nameless network namespace and return the descriptor that keeps it alive.

    Nothing is written to a filesystem: when the last descriptor and the last process inside are gone, however
    they ended, the kernel removes the namespace with its links.
    """
    with _restored_network_namespace():
        unshare(CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def inside(descriptor: int) -> Iterator[None]:
    """Run the block with the calling thread inside a network namespace."""
    with _restored_network_namespace():
        set_network_namespace(descriptor)
        yield


@contextmanager
def _restored_network_namespace() -> Iterator[None]:
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        set_network_namespace(home)
        os.close(home)
