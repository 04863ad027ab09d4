"""One end of a real tunnel with fixed test keys, for the tests in network namespaces; control is played by stdin.

Usage: ``python -m tests.unit.dataplane.netns_site alice|bob LISTEN ENDPOINT [KERNEL]``; prints ``ready MTU`` when up.
KERNEL imitates an older one: ``no-uso`` (TUN without UDP segmentation), ``no-offload`` (TUN without any), ``no-gso``
(sockets without UDP_SEGMENT), ``no-gro``; several are joined by commas.
Commands, one a line: ``epoch N`` installs epoch N, ``control`` sends one control record, ``stats`` prints JSON.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import socket
import sys
import time

from qvpn.dataplane.plane import Plane, tunnel_mtu
from qvpn.netio import netlink
from qvpn.netio.base import Address
from qvpn.netio.tun import OFFLOADS, TunDevice
from qvpn.netio.udp import UdpBind
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, Recorder, epoch_pair, networks


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(ipaddress.ip_address(host.strip("[]")), int(port))


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


_UDP_SEGMENT, _UDP_GRO = 103, 104


class OldSocket(socket.socket):
    """A UDP socket of a kernel without what ``lacks`` names."""

    lacks: frozenset[int] = frozenset()

    def setsockopt(self, level: int, option: int, *value: object) -> None:  # type: ignore[override]
        if level == socket.IPPROTO_UDP and option in self.lacks:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        super().setsockopt(level, option, *value)  # type: ignore[arg-type]


def _old_socket(family: int) -> socket.socket:
    return OldSocket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


class NetnsSite:
    """A plane on a real TUN and a real socket."""

    def __init__(self, role: str, listen: Address, endpoint: Address, kernel: str = "") -> None:
        self.initiator = role == "alice"
        self.peer = "bob" if self.initiator else "alice"
        ours, theirs = (FROM_ALICE, FROM_BOB) if self.initiator else (FROM_BOB, FROM_ALICE)
        missing = set(kernel.split(","))
        options = {"no-gso": _UDP_SEGMENT, "no-gro": _UDP_GRO}
        OldSocket.lacks = frozenset(options[each] for each in missing & options.keys())
        offloads = OFFLOADS[3 if "no-offload" in missing else 1 if "no-uso" in missing else 0 :]
        self.bind = UdpBind(listen, factory=_old_socket)
        self.mtu = tunnel_mtu(self.bind.max_payload(endpoint))
        self.tun = TunDevice.open("qvpntest0", offloads=offloads)
        netlink.configure(
            self.tun.name,
            addresses=[ipaddress.ip_interface(address) for address in ours.values()],
            mtu=self.mtu,
            routes=networks(theirs),
        )
        self.hooks = Recorder()
        self.plane = Plane(self.tun, self.bind, _clock, self.hooks)
        self.plane.add_peer(self.peer, networks(theirs), overlap=2.0)
        self.plane.set_endpoint(self.peer, endpoint)
        self.plane.start()

    def command(self, line: str) -> None:
        word, *rest = line.split()
        if word == "epoch":
            pair = epoch_pair(int(rest[0]), hard_end=_clock() + 300)
            self.plane.install(self.peer, pair[0 if self.initiator else 1])
        elif word == "control":
            self.plane.send_control(self.peer, b"\x04")
        elif word == "stats":
            self._print_stats()

    def _print_stats(self) -> None:
        traffic = self.plane.stats(self.peer)
        facts = {
            "drops": traffic.drops,
            "other_drops": self.plane.drops.nonzero(),
            "sent_packets": traffic.sent_packets,
            "received_packets": traffic.received_packets,
            "received_records": traffic.received_records,
            "sent_records": traffic.sent_records,
            "epochs": [[epoch.number, epoch.role, epoch.sealed, epoch.opened] for epoch in traffic.epochs],
            "bind_errors": self.bind.errors,
            "tun_errors": self.tun.errors,
            "mtu": self.tun.mtu,
            "descriptors": len(self.bind.filenos()),
            "offloads": self.tun.offloads,
        }
        print(json.dumps(facts), flush=True)


async def _main() -> None:
    site = NetnsSite(sys.argv[1], _address(sys.argv[2]), _address(sys.argv[3]), *sys.argv[4:])
    print(f"ready {site.mtu}", flush=True)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        site.command(line.decode())
    site.plane.close()
    site.bind.close()
    site.tun.close()


if __name__ == "__main__":
    asyncio.run(_main())
