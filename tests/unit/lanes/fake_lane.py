"""A process in the place of a lane's that behaves badly, each lane in its own way."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from qvpn.lanes.messages import Report, Setup, decode, encode

GOOD, SILENT, NONSENSE, DYING, DEAF, STOPPED, MUTE = range(1, 8)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[2]))
    setup = decode(control.recv(1 << 20))
    assert isinstance(setup, Setup)
    lane = setup.lane
    if lane == DYING:
        raise SystemExit("the fuse has blown")
    if lane == NONSENSE:
        control.send(b"\xff\xff")
        time.sleep(60)
    report = encode(Report({}, {"no_route": 1}, {}))
    control.send(report)
    if lane == STOPPED:
        os.kill(os.getpid(), signal.SIGSTOP)
    if lane == MUTE:
        control.close()
        time.sleep(60)
    if lane in (SILENT, DEAF):
        time.sleep(60)
    control.settimeout(0.05)
    while True:
        try:
            if not control.recv(1 << 20):
                return
        except TimeoutError:
            control.send(report)


if __name__ == "__main__":
    main()
