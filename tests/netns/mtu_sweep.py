"""Sends one UDP packet of each size and waits for its echo; run inside a namespace by test_netns_mtu.

Usage: ``mtu_sweep echo ADDRESS``, or ``mtu_sweep sweep FROM TO df|cut STEP`` whose last line is the JSON result.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

PORT = 7777
FIRST, LAST = 20, 9000
_DISCOVER, _MTU = {4: (10, 14), 6: (23, 24)}, None
_DO, _DONT = 2, 0


def family(address: str) -> tuple[int, int, int, int]:
    """(socket family, option level, header bytes, IP version)."""
    six = ":" in address
    return (socket.AF_INET6, socket.IPPROTO_IPV6, 48, 6) if six else (socket.AF_INET, socket.IPPROTO_IP, 28, 4)


def echo(address: str) -> None:
    sock = socket.socket(family(address)[0], socket.SOCK_DGRAM)
    sock.bind((address, PORT))
    print(json.dumps({"ready": True}), flush=True)
    while True:
        data, sender = sock.recvfrom(65_536)
        sock.sendto(data[:4] + len(data).to_bytes(4, "big"), sender)


def sweep(source: str, target: str, mode: str, step: int) -> None:
    kind, level, headers, version = family(target)
    sock = socket.socket(kind, socket.SOCK_DGRAM)
    sock.bind((source, 0))
    sock.connect((target, PORT))
    discover, known = _DISCOVER[version]
    sock.setsockopt(level, discover, _DO if mode == "df" else _DONT)
    passed, told, lost = [], [], []
    for size in range(max(FIRST, headers + 8), LAST + 1, step):
        outcome = one(sock, size, headers, lambda: sock.getsockopt(level, known))
        {"passed": passed, "told": told, "lost": lost}[outcome].append(size)
    mtu = sock.getsockopt(level, known)
    print(
        json.dumps({"passed": len(passed), "told": len(told), "lost": lost[:20], "largest": max(passed), "mtu": mtu})
    )


def one(sock: socket.socket, size: int, headers: int, mtu: object) -> str:
    """A packet of this size: echoed, or its sender told (at once, or by an ICMP message)."""
    assert callable(mtu)
    payload = size.to_bytes(4, "big").ljust(size - headers, b"\0")
    for _ in range(3):
        try:
            sock.send(payload)
        except OSError:
            return "told"
        deadline = time.monotonic() + 0.5
        while (left := deadline - time.monotonic()) > 0:
            try:
                if not select.select([sock], [], [], left)[0]:
                    break
                answer = sock.recv(64)
            except OSError:  # what ICMP said
                break
            if answer[:4] == payload[:4] and int.from_bytes(answer[4:], "big") == len(payload):
                return "passed"
        if mtu() < size:
            return "told"
    return "lost"


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        echo(sys.argv[2])
    else:
        sweep(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
