"""Strangers at a QUIC port; run inside a namespace by test_netns_quic.

Usage: ``quic_flood ADDRESS PORT SECONDS RATE``.  In turn: first packets of connections that nobody goes on with, the
same with a broken body and another connection ID, junk of every length in QUIC's and in our own dress.  The last line
says how many datagrams left and how many bytes came back.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import time

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

SOCKETS, CONNECTIONS = 64, 100


def first_packet(target: tuple[str, int]) -> bytes:
    quic = QuicConnection(configuration=QuicConfiguration(alpn_protocols=["h3"], server_name="x"))
    quic.connect(target, 0.0)
    return bytes(quic.datagrams_to_send(0.0)[0][0])


def junk(chance: random.Random, number: int, firsts: list[bytes]) -> bytes:
    kind, first = number % 4, firsts[number // 4 % len(firsts)]
    if kind == 0:
        return first
    if kind == 1:
        return first[:6] + chance.randbytes(8) + first[14:]
    head = chance.choice([0x40, 0xC0, 0xE0] if kind == 2 else [0x01, 0x10, 0x20])
    return bytes([head]) + chance.randbytes(chance.choice([0, 20, 200, 1200]))


def main(address: str, port: int, seconds: float, rate: float) -> None:
    target, chance = (address, port), random.Random(5)
    firsts = [first_packet(target) for _ in range(CONNECTIONS)]
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(SOCKETS)]
    for each in sockets:
        each.setblocking(False)
    print(json.dumps({"ready": True}), flush=True)
    start, sent, back = time.monotonic(), 0, 0
    while (spent := time.monotonic() - start) < seconds:
        while sent < spent * rate:
            with contextlib.suppress(OSError):
                sockets[sent % SOCKETS].sendto(junk(chance, sent, firsts), target)
            sent += 1
        for each in sockets:
            with contextlib.suppress(OSError):
                while True:
                    back += len(each.recv(2048))
        time.sleep(0.005)
    print(json.dumps({"sent": sent, "bytes_back": back}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
