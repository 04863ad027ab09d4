"""Numbered UDP packets by the batch: ``python -m qvpn.bench.udpgen send|receive --fd N ...``.

iperf3 sends one packet a system call and counts losses by gaps; both are too slow and too coarse for what is measured
here.  This sender gives up to 64 packets to the kernel at once (sendmmsg(2), no UDP_SEGMENT: every packet is a packet
of its own to the kernel), at a set pace, and the receiver marks every number once in an array (recvmmsg(2)), so
duplicates do not count.  A packet begins with run and number, 8 little-endian bytes each.  Each program works on a
socket that its starter opened inside a namespace, takes commands on standard input and answers each with a JSON line.

    send:     RUN RATE SECONDS  ->  {"sent": packets, "seconds": time}
    receive:  expect RUN COUNT  ->  {}          forget everything, expect at most COUNT packets of this run
              report            ->  {"distinct": packets}
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import select
import sys
import time

import numpy as np
import numpy.typing as npt

BATCH = 64
TICK = 0.0002
"""Seconds that the sender sleeps when it is ahead: it must not take the processor that the tunnel needs."""
BURST = 128
"""Most packets that are made up for at once after the sender itself was held up."""
_MSG_DONTWAIT = 0x40

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Msghdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class _Mmsghdr(ctypes.Structure):
    _fields_ = [("header", _Msghdr), ("length", ctypes.c_uint)]


class Batch:
    """``count`` packets of ``size`` bytes side by side in one array, and what sendmmsg and recvmmsg need of them."""

    def __init__(self, count: int, size: int) -> None:
        self.bytes = np.zeros((count, size), np.uint8)
        self.runs: npt.NDArray[np.uint64] = np.ndarray((count,), "<u8", self.bytes, 0, (size,))
        self.numbers: npt.NDArray[np.uint64] = np.ndarray((count,), "<u8", self.bytes, 8, (size,))
        self._iovecs = (_Iovec * count)()
        self._headers = (_Mmsghdr * count)()
        for place in range(count):
            self._iovecs[place].base = self.bytes.ctypes.data + place * size
            self._iovecs[place].length = size
            self._headers[place].header.iov = ctypes.pointer(self._iovecs[place])
            self._headers[place].header.iovlen = 1

    def send(self, descriptor: int, count: int) -> int:
        """Packets that the kernel took; 0 where its queue is full for now.  Raises OSError."""
        done = _libc.sendmmsg(descriptor, self._headers, count, 0)
        return self._result(done, errno.ENOBUFS, errno.ECONNREFUSED)

    def receive(self, descriptor: int) -> int:
        """Packets that were there.  Raises OSError."""
        done = _libc.recvmmsg(descriptor, self._headers, len(self._headers), _MSG_DONTWAIT, None)
        return self._result(done, errno.EAGAIN, errno.ECONNREFUSED)

    @staticmethod
    def _result(done: int, *harmless: int) -> int:
        if done >= 0:
            return int(done)
        code = ctypes.get_errno()
        if code in (*harmless, errno.EINTR):
            return 0
        raise OSError(code, os.strerror(code))


def credit(now: float, start: float, rate: float, skipped: float) -> float:
    """Packets that should have left by ``now``, without those that a held up sender gave up."""
    return (now - start) * rate - skipped


class Sender:
    """Sends runs of numbered packets from a connected socket."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._batch = Batch(BATCH, size)
        self._places = np.arange(BATCH, dtype=np.uint64)

    def run(self, run: int, rate: float, seconds: float) -> dict[str, float]:
        """``rate`` packets a second for so long, less where the machine or the kernel does not keep up."""
        self._batch.runs[:] = run
        sent, skipped = 0, 0.0
        start = time.monotonic()
        while (now := time.monotonic()) - start < seconds:
            due = credit(now, start, rate, skipped) - sent
            if due > BURST:
                skipped += due - BURST
                due = BURST
            if due < 1:
                time.sleep(TICK)
                continue
            sent += self._some(sent, min(int(due), BATCH))
        return {"sent": sent, "seconds": time.monotonic() - start}

    def _some(self, first: int, count: int) -> int:
        np.add(self._places, np.uint64(first), out=self._batch.numbers)
        done = self._batch.send(self._descriptor, count)
        if not done:
            time.sleep(TICK)
        return done


class Receiver:
    """Marks the numbers of one run."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._batch = Batch(4 * BATCH, size)
        self._run = 0
        self._seen = np.zeros(0, np.bool_)

    def expect(self, run: int, count: int) -> None:
        while self._batch.receive(self._descriptor):
            pass
        self._run = run
        self._seen = np.zeros(count, np.bool_)

    def take(self) -> None:
        """Everything that is there."""
        while got := self._batch.receive(self._descriptor):
            numbers = self._batch.numbers[:got][self._batch.runs[:got] == self._run]
            self._seen[numbers[numbers < len(self._seen)]] = True

    def report(self) -> dict[str, int]:
        self.take()
        return {"distinct": int(self._seen.sum())}


def _answer(result: object) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def _send(descriptor: int, size: int) -> None:
    sender = Sender(descriptor, size)
    for line in sys.stdin:
        run, rate, seconds = line.split()
        _answer(sender.run(int(run), float(rate), float(seconds)))


def _receive(descriptor: int, size: int) -> None:
    receiver = Receiver(descriptor, size)
    while True:
        ready, _, _ = select.select([descriptor, sys.stdin], [], [])
        if descriptor in ready:
            receiver.take()
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            if line.startswith("expect"):
                _, run, count = line.split()
                receiver.expect(int(run), int(count))
                _answer({})
            else:
                _answer(receiver.report())


def main() -> None:
    parser = argparse.ArgumentParser(prog="qvpn.bench.udpgen")
    parser.add_argument("role", choices=("send", "receive"))
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    chosen = parser.parse_args()
    (_send if chosen.role == "send" else _receive)(chosen.fd, chosen.size)


if __name__ == "__main__":
    main()
