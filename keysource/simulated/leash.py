"""``python -m keysource.simulated.leash PARENT MODULE ARGUMENT...``: run a module that dies with its parent.

The child sets PR_SET_PDEATHSIG itself (prctl(2)), so that the parent, which has threads, need not run code between
fork and exec.  ``PARENT`` is the parent's process id: if it is gone already, the module is not run.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, module = int(sys.argv[1]), sys.argv[2]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise SystemExit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise SystemExit("the parent is gone")
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
