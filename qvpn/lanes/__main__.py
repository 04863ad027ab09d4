"""``python -m qvpn.lanes PARENT CONTROL RELAY QUEUE PORT``: the process of one lane, started by the daemon alone.

The five numbers are the daemon's process id and descriptors that were handed down: the private socket pair, the way
to lane 0, a queue of the TUN, a UDP socket that listens.  Rights are given up before anything else is imported.
"""

from __future__ import annotations

import sys

from qvpn import privileged


def main() -> None:
    try:
        parent, control, relay, queue, port = (int(word) for word in sys.argv[1:])
    except ValueError:
        raise SystemExit("qvpn.lanes is a part of qvpn up and cannot be started by itself") from None
    try:
        privileged.die_with_parent(parent)
        privileged.no_core()
        privileged.drop_everything()
    except privileged.PrivilegedError as error:
        raise SystemExit(str(error)) from None
    from qvpn.lanes.worker import run

    run(control, relay, queue, port)


if __name__ == "__main__":
    main()
