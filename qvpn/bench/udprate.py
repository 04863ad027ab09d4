"""The highest rate of small UDP packets that a tunnel carries without loss (at most 0.2 %)."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from qvpn.bench.errors import BenchError
from qvpn.bench.link import ENDS
from qvpn.demo import kernel
from qvpn.demo.lab import Lab
from qvpn.demo.process import environment, launcher, module

SIZE = 64
"""UDP payload in bytes."""
ALLOWED_LOSS = 0.002
FIRST, CEILING = 40_000.0, 2_000_000.0
STEPS = 5
STEP_SECONDS = 0.6
_SETTLE = 0.15
"""Seconds for the last packets to arrive."""
_PORT = 9400
_BUFFER = 16 << 20
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32


@dataclass(frozen=True)
class Step:
    """One try: what was sent and arrived, in packets a second."""

    wanted: float
    sent: float
    received: float

    @property
    def clean(self) -> bool:
        return self.received >= self.sent * (1 - ALLOWED_LOSS) and self.received > 0

    @property
    def kept_up(self) -> bool:
        """The sender reached the rate it was asked for, so a higher one may be worth a try."""
        return self.sent >= self.wanted * 0.9


def search(attempt: Callable[[float], Step]) -> float:
    """The best clean rate: doubled until packets are lost twice in a row, then the interval is halved.

    0 where no rate was clean.
    """
    best, rate = 0.0, FIRST
    lossy = None
    while lossy is None and rate <= CEILING:
        step = attempt(rate)
        if not step.clean:
            step = attempt(rate)  # one hiccup of the machine shall not end the search
        if step.clean:
            gained, best = step.received > best * 1.1, max(best, step.received)
            if not step.kept_up and not gained:
                return best  # the sender itself is the limit
            rate *= 2
        else:
            lossy = rate
    low, high = rate / 2, lossy or CEILING
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        step = attempt(middle)
        if step.clean:
            best, low = max(best, step.received), middle
        else:
            high = middle
    return best


class Generator:
    """A sender at the first end and a receiver at the second, for any number of tries; a context manager."""

    def __init__(self, lab: Lab, addresses: dict[str, str]) -> None:
        self._run = 0
        left, right = ENDS
        with kernel.inside(lab[right].descriptor):
            receiver = _socket(addresses[right], _PORT)
        with kernel.inside(lab[left].descriptor):
            sender = _socket(addresses[left], 0)
            sender.connect((addresses[right], _PORT))
        self._receiver = _start("receive", receiver)
        self._sender = _start("send", sender)

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (self._sender, self._receiver):
            process.kill()
            process.communicate()

    def attempt(self, rate: float) -> Step:
        """Send at ``rate`` and count.  Raises BenchError where a program does not answer."""
        self._run += 1
        _ask(self._receiver, f"expect {self._run} {int(rate * STEP_SECONDS * 1.2) + 1024}")
        sent = _ask(self._sender, f"{self._run} {rate} {STEP_SECONDS}")
        time.sleep(_SETTLE)
        got = _ask(self._receiver, "report")
        return Step(rate, sent["sent"] / sent["seconds"], got["distinct"] / sent["seconds"])


def _socket(address: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for plain, forced in ((socket.SO_RCVBUF, _SO_RCVBUFFORCE), (socket.SO_SNDBUF, _SO_SNDBUFFORCE)):
        try:
            made.setsockopt(socket.SOL_SOCKET, forced, _BUFFER)
        except PermissionError:
            made.setsockopt(socket.SOL_SOCKET, plain, _BUFFER)
    made.bind((address, port))
    return made


def _start(role: str, own: socket.socket) -> subprocess.Popen[str]:
    command = module("qvpn.bench.udpgen", role, "--fd", str(own.fileno()), "--size", str(SIZE))
    with own:
        return subprocess.Popen(
            [*launcher(net=None), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            pass_fds=(own.fileno(),),
            env={**environment(), "OPENBLAS_NUM_THREADS": "1"},
        )


def _ask(process: subprocess.Popen[str], line: str, within: float = 20.0) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise BenchError("the UDP generator ended") from None
    if not select.select([process.stdout], [], [], within)[0]:
        raise BenchError(f"the UDP generator did not answer within {within:g} s")
    answer = process.stdout.readline()
    if not answer:
        raise BenchError(f"the UDP generator ended with code {process.wait()}")
    found: dict[str, Any] = json.loads(answer)
    return found
