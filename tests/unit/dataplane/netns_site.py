"""One end of a real tunnel with fixed test keys, for the tests in network namespaces; control is played by stdin.

Usage: ``python -m tests.unit.dataplane.netns_site alice|bob LISTEN ENDPOINT``.  Prints ``ready MTU`` when up.
Commands, one a line: ``epoch N`` installs epoch N, ``control`` sends one control record, ``stats`` prints JSON.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import sys
import time

from qvpn.dataplane.plane import Plane, tunnel_mtu
from qvpn.netio import netlink
from qvpn.netio.base import Address
from qvpn.netio.tun import TunDevice
from qvpn.netio.udp import UdpBind
from tests.unit.dataplane.support import FROM_ALICE, FROM_BOB, Recorder, epoch_pair, networks


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(ipaddress.ip_address(host.strip("[]")), int(port))


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class NetnsSite:
    """A plane on a real TUN and a real socket."""

    def __init__(self, role: str, listen: Address, endpoint: Address) -> None:
        self.initiator = role == "alice"
        self.peer = "bob" if self.initiator else "alice"
        ours, theirs = (FROM_ALICE, FROM_BOB) if self.initiator else (FROM_BOB, FROM_ALICE)
        self.bind = UdpBind(listen)
        self.mtu = tunnel_mtu(self.bind.max_payload(endpoint))
        self.tun = TunDevice.open("qvpntest0")
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
    site = NetnsSite(sys.argv[1], _address(sys.argv[2]), _address(sys.argv[3]))
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
