"""A kernel to throw frames at: a TUN, and behind it a router's far port without any offload.

Run in a network namespace of its own.  Reads ``u32 length + frame`` from stdin and answers each;
after the end of its input it prints as hex the last three IP packets to Bob that left the far port.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from qvpn.netio.tun import TunDevice
from tests.unit.dataplane.support import FROM_BOB

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
OFF = ("tx", "off", "rx", "off", "sg", "off", "tso", "off", "gso", "off", "gro", "off")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=20)


def _sysctl(name: str, value: str) -> None:
    Path("/proc/sys/net", *name.split(".")).write_text(value)


class FarPort:
    """Sees what leaves, and keeps the last three IPv4 packets to Bob."""

    def __init__(self, interface: str) -> None:
        self.kept: deque[bytes] = deque(maxlen=3)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        self._socket.bind((interface, ETH_P_ALL))
        self._socket.setblocking(False)

    def look(self) -> bool:
        """Take what is there; False if there was nothing."""
        seen = False
        while True:
            try:
                packet = self._socket.recv(1 << 16)
            except BlockingIOError:
                return seen
            seen = True
            if packet[0] >> 4 == 4 and packet[16:20] == socket.inet_aton(FROM_BOB[4]):
                self.kept.append(packet)

    def until_quiet(self) -> None:
        quiet = 0
        while quiet < 20:
            quiet = 0 if self.look() else quiet + 1
            time.sleep(0.01)


def make() -> tuple[TunDevice, FarPort]:
    tun = TunDevice.open("sink0")
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "lan", "type", "veth", "peer", "end")
    for port in ("lan", "end"):
        _run("ethtool", "-K", port, *OFF)
        _run("ip", "link", "set", port, "up")
    _run("ip", "link", "set", "sink0", "mtu", "1420", "up")
    for family in ("ipv4", "ipv6"):
        _sysctl(f"{family}.conf.all.forwarding", "1")
    for name in ("all", "sink0"):
        _sysctl(f"ipv4.conf.{name}.rp_filter", "0")
    for version, host in FROM_BOB.items():
        _run("ip", f"-{version}", "route", "add", host, "dev", "lan")
        _run(
            "ip", f"-{version}", "neigh", "add", host, "lladdr", "02:00:00:00:00:02", "dev", "lan", "nud", "permanent"
        )
    return tun, FarPort("end")


def main() -> None:
    tun, far = make()
    print("ready", flush=True)
    while head := sys.stdin.buffer.read(4):
        frame = sys.stdin.buffer.read(struct.unpack(">I", head)[0])
        try:
            os.write(tun.fileno(), frame)
            answer = "taken"
        except OSError as error:
            answer = errno.errorcode.get(error.errno or 0, "unknown")
        print(answer, flush=True)
        far.look()
    far.until_quiet()
    for packet in far.kept:
        print(packet.hex())


if __name__ == "__main__":
    main()
