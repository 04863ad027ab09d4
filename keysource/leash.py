"""A process that dies with its parent: PR_SET_PDEATHSIG, prctl(2)."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """SIGKILL for the calling process as soon as its parent is gone.  ``parent`` is the parent's process id.

    Raises:
        OSError: the kernel refuses, or the parent is gone already (``ProcessLookupError``).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise ProcessLookupError("the parent is gone")
