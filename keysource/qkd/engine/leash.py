"""A child that dies with its parent: PR_SET_PDEATHSIG, prctl(2)."""

from __future__ import annotations

import ctypes
import os
import signal

from keysource.qkd.errors import LinkError

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """``parent``: its process id.  Raises :class:`LinkError` where it is gone already or the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise LinkError(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise LinkError("the parent is gone")
