"""Starts KMEs quickly: everything is imported once, and each KME is a fork of that, a process of its own.

One JSON object a line on standard input, one on standard output::

    {"serve": FILE, "log": FILE, "environment": {...}}   {"pid": 123}   also "command" before, "options" after
    {"ended": PID}                                       {"signal": 9}, or {"signal": null} while it runs

At the end of the input it kills what it started.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from keysource.kme import cli
from keysource.kme import server as _server  # noqa: F401  (imported for the forks)


def serve(order: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.environ.update(order["environment"])
    sys.argv = ["qvpn-kme", *order.get("command", ()), "serve", order["serve"], *order.get("options", ())]
    try:
        cli.main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    os._exit(0)


def main() -> None:
    running: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "serve" in order:
            pid = serve(order)
            running.add(pid)
            answer = {"pid": pid}
        else:
            pid, status = os.waitpid(order["ended"], os.WNOHANG)
            running.discard(pid)
            answer = {"signal": os.WTERMSIG(status) if pid and os.WIFSIGNALED(status) else 0 if pid else None}
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
