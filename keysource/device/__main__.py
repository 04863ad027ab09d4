"""``python -m keysource.device serve FILE | check FILE``: the reference hardware daemon (``daemon``)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import signal
import sys
from pathlib import Path

from keysource.device.daemon import DeviceDaemon
from keysource.errors import KeySourceError


def main() -> int:
    """Exit code 0, 1 (it failed, one sentence), 2 (wrong usage or configuration)."""
    parser = argparse.ArgumentParser(prog="python -m keysource.device", description=__doc__)
    parser.add_argument("command", choices=("serve", "check"))
    parser.add_argument("file", type=Path, metavar="FILE", help="TOML, see keysource/device/daemon.py")
    chosen = parser.parse_args()
    try:
        daemon = DeviceDaemon(chosen.file)
    except KeySourceError as error:
        print(error, file=sys.stderr)
        return 2
    if chosen.command == "check":
        facts = daemon.facts()
        print(f'{chosen.file}: fine; link "{facts["link"]}" end {facts["end"]}, origin {facts["origin"]}')
        return 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold keys
    try:
        asyncio.run(_serve(daemon))
    except KeySourceError as error:
        print(f"{chosen.file}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(daemon: DeviceDaemon) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    running = asyncio.create_task(daemon.run(lambda: print("ready", flush=True)))
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    for task in (running, waiting):
        task.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    with contextlib.suppress(asyncio.CancelledError):
        await running


if __name__ == "__main__":
    sys.exit(main())
