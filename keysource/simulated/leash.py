"""``python -m keysource.simulated.leash PARENT MODULE ARGUMENT...``: run a module that dies with its parent.

The child sets PR_SET_PDEATHSIG itself (prctl(2)), so that the parent, which has threads, need not run code between
fork and exec.  ``PARENT`` is the parent's process id: if it is gone already, the module is not run.
"""

from __future__ import annotations

import runpy
import sys

from keysource.leash import die_with_parent


def main() -> None:
    parent, module = int(sys.argv[1]), sys.argv[2]
    try:
        die_with_parent(parent)
    except OSError as error:
        raise SystemExit(error.strerror or str(error)) from None
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
