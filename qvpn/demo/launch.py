"""Start a program as one site's process: ``python -m qvpn.demo.launch OPTIONS -- PROGRAM ARGUMENTS``.

Runs between fork and exec of every process of the lab.  It enters the network namespace, makes a mount namespace
in which of all the lab's folders only this site's own is visible (as ``/run/site``), ties its life to its
parent's and becomes the program.  It stands alone so that a starter with threads never runs Python between fork
and exec.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from qvpn.demo import kernel

SITE = Path("/run/site")


def enter_folder(folder: Path, hidden: list[Path]) -> None:
    """Make ``folder`` visible as ``/run/site`` and hide the rest of ``/run`` and each folder in ``hidden``."""
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    # Opened after unshare, so that the descriptor belongs to this mount namespace, and before it is hidden.
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    for place in hidden:
        kernel.mount_tmpfs(place)
    kernel.mount_tmpfs("/run")
    SITE.mkdir()
    kernel.mount(f"/proc/self/fd/{descriptor}", SITE, flags=kernel.MS_BIND)
    os.close(descriptor)
    os.chdir(SITE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qvpn.demo.launch")
    parser.add_argument("--parent", type=int, required=True, help="process whose end is this one's end")
    parser.add_argument("--net", type=int, help="open descriptor of a network namespace")
    parser.add_argument("--folder", type=Path, help="the only folder of the lab that the program may see")
    parser.add_argument("--hide", type=Path, action="append", default=[], help="folder to hide")
    parser.add_argument("program", nargs="+")
    return parser.parse_args()


def main() -> None:
    chosen = _arguments()
    try:
        if chosen.net is not None:
            kernel.set_network_namespace(chosen.net)
            os.close(chosen.net)
        if chosen.folder is not None:
            enter_folder(chosen.folder, chosen.hide)
        kernel.die_with_parent(chosen.parent)
        os.execvp(chosen.program[0], chosen.program)
    except OSError as error:
        sys.exit(f"launch: cannot start {chosen.program[0]}: {error}")


if __name__ == "__main__":
    main()
