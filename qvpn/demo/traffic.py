"""Measured traffic as small programs: ``python -m qvpn.demo.traffic udp|tcp-sink|tcp-source|ping ...``.

Each prints JSON objects, one a line; the last is its result.  All counting is of packets really sent and received
by these programs; the two ends are compared by whoever started both.  Times are CLOCK_MONOTONIC in seconds, which
all namespaces of one machine share.  ``udp --hold`` sends nothing before SIGUSR1, so that both ends can be made to
listen first; SIGTERM ends the sending.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from types import FrameType
from typing import Any

from qvpn.demo import echo, flow, stream

_stopping = False
_released = False


def stopping() -> bool:
    return _stopping


def _stop(_signum: int, _frame: FrameType | None) -> None:
    global _stopping
    _stopping = True


def _release(_signum: int, _frame: FrameType | None) -> None:
    global _released
    _released = True


def emit(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def endpoint(text: str) -> tuple[str, int]:
    """``ADDRESS:PORT`` or ``[v6]:PORT``."""
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: not ADDRESS:PORT")
    return host.strip("[]"), int(port)


def _udp(chosen: argparse.Namespace) -> None:
    settings = flow.Settings(
        local=chosen.bind, remote=chosen.peer, rate=chosen.rate, size=chosen.size, marker=chosen.marker
    )
    with flow.Flow(settings) as running:
        emit({"ready": True, "at": time.monotonic()})
        while chosen.hold and not _released and not _stopping:
            running.receive(0.01)
        flow.drive(
            running, seconds=chosen.seconds, linger=chosen.linger, report=chosen.report, emit=emit, stop=stopping
        )
        emit(running.result())


def _tcp_sink(chosen: argparse.Namespace) -> None:
    emit(stream.sink(chosen.bind, timeout=chosen.timeout, ready=lambda: emit({"ready": True})))


def _tcp_source(chosen: argparse.Namespace) -> None:
    emit(stream.source(chosen.peer, total=chosen.bytes, marker=chosen.marker, timeout=chosen.timeout))


def _ping(chosen: argparse.Namespace) -> None:
    emit(echo.ping(chosen.peer, count=chosen.count, interval=chosen.interval, timeout=chosen.timeout))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qvpn.demo.traffic")
    commands = parser.add_subparsers(required=True)

    udp = commands.add_parser("udp", help="numbered packets, paced, both ways; SIGTERM ends it with its result")
    udp.add_argument("--bind", type=endpoint, required=True)
    udp.add_argument("--peer", type=endpoint, required=True)
    udp.add_argument("--rate", type=float, default=1000.0, help="packets a second, 0 only receives")
    udp.add_argument("--seconds", type=float, default=float("inf"))
    udp.add_argument("--linger", type=float, default=1.0, help="seconds of listening after the last packet")
    udp.add_argument("--hold", action="store_true", help="send nothing before SIGUSR1")
    udp.add_argument("--size", type=int, default=256, help="payload in bytes")
    udp.add_argument("--marker", type=bytes.fromhex, required=True)
    udp.add_argument("--report", type=float, default=0.0, help="print the counts every so many seconds")
    udp.set_defaults(run=_udp)

    sink = commands.add_parser("tcp-sink", help="take one connection and hash what it brings")
    sink.add_argument("--bind", type=endpoint, required=True)
    sink.add_argument("--timeout", type=float, default=60.0)
    sink.set_defaults(run=_tcp_sink)

    source = commands.add_parser("tcp-source", help="send bytes and hash them")
    source.add_argument("--peer", type=endpoint, required=True)
    source.add_argument("--bytes", type=int, required=True)
    source.add_argument("--marker", type=bytes.fromhex, required=True)
    source.add_argument("--timeout", type=float, default=60.0)
    source.set_defaults(run=_tcp_source)

    ping = commands.add_parser("ping", help="ICMP echo, IPv4 or IPv6")
    ping.add_argument("--peer", required=True)
    ping.add_argument("--count", type=int, default=5)
    ping.add_argument("--interval", type=float, default=0.2)
    ping.add_argument("--timeout", type=float, default=2.0, help="seconds to wait after the last request")
    ping.set_defaults(run=_ping)
    return parser


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGUSR1, _release)
    chosen = _parser().parse_args()
    try:
        chosen.run(chosen)
    except (OSError, stream.StreamFailed) as error:
        sys.exit(f"traffic: {error}")


if __name__ == "__main__":
    main()
