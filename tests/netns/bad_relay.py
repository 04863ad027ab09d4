"""A path that carries UDP between two addresses badly: late, twice, and not at all.

Usage: ``bad_relay.py LEFT_LOCAL LEFT RIGHT_LOCAL RIGHT`` (each HOST:PORT): what comes to LEFT_LOCAL goes out of
RIGHT_LOCAL to RIGHT, and back.  Prints JSON when it is ready, and on SIGTERM what it did with each direction.
"""

from __future__ import annotations

import json
import random
import select
import signal
import socket
import sys
from collections import Counter

LATE, TWICE, LOST = 0.02, 0.005, 0.001
MOST_BEHIND = 40
"""A late datagram is overtaken by up to so many."""


class Way:
    """One direction."""

    def __init__(self, receiver: socket.socket, sender: socket.socket, target: tuple[str, int]) -> None:
        self.receiver, self.sender, self.target = receiver, sender, target
        self.counts: Counter[str] = Counter()
        self._held: list[tuple[int, bytes]] = []
        self._chance = random.Random(7)
        self._passed = 0

    def carry(self) -> None:
        for _ in range(256):
            try:
                datagram = self.receiver.recv(1 << 16)
            except BlockingIOError:
                break
            self._one(datagram)

    def settle(self) -> None:
        """Nothing is on its way: what is held goes now."""
        for _, datagram in self._held:
            self._send(datagram)
        self._held.clear()

    def _one(self, datagram: bytes) -> None:
        self._passed += 1
        luck = self._chance.random()
        if luck < LOST:
            self.counts["lost"] += 1
        elif luck < LOST + LATE:
            self.counts["late"] += 1
            self._held.append((self._passed + self._chance.randrange(1, MOST_BEHIND), datagram))
        else:
            self._send(datagram)
            if luck > 1 - TWICE:
                self.counts["twice"] += 1
                self._send(datagram)
        for due, held in [each for each in self._held if each[0] <= self._passed]:
            self._held.remove((due, held))
            self._send(held)

    def _send(self, datagram: bytes) -> None:
        self.counts["carried"] += 1
        try:
            self.sender.sendto(datagram, self.target)
        except OSError:
            self.counts["refused"] += 1


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _open(text: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    opened.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    opened.bind(_address(text))
    return opened


def main() -> None:
    left, right = _open(sys.argv[1]), _open(sys.argv[3])
    ways = [Way(left, right, _address(sys.argv[4])), Way(right, left, _address(sys.argv[2]))]
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    print("{}", flush=True)
    while not ended:
        ready, _, _ = select.select([left, right], [], [], 0.02)
        for way in ways:
            if way.receiver in ready:
                way.carry()
            else:
                way.settle()
    print(json.dumps({"out": ways[0].counts, "back": ways[1].counts}), flush=True)


if __name__ == "__main__":
    main()
