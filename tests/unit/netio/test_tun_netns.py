"""A real TUN and real netlink, each test in a network namespace of its own (``unshare --net``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="/dev/net/tun is missing"),
]

PRELUDE = """
import asyncio, ipaddress, json, os, struct, subprocess, time
from qvpn.netio import netlink
from qvpn.netio.errors import LinkError, TunError
from qvpn.netio.tun import OFFLOADS, PLAIN, TunDevice
ADDRESSES = [ipaddress.ip_interface("10.90.0.1/24"), ipaddress.ip_interface("fd90::1/64")]
ROUTES = [ipaddress.ip_network(n) for n in ("10.90.0.2/32", "10.20.0.0/16", "fd20::/48", "10.90.0.0/24")]
def ip(*words):
    return json.loads(subprocess.run(["ip", "-j", *words], check=True, capture_output=True).stdout or "[]")
def configure(tun, mtu=1430):
    netlink.configure(tun.name, addresses=ADDRESSES, mtu=mtu, routes=ROUTES)
def sentence(error, call):
    try:
        call()
    except error as caught:
        return str(caught)
    raise SystemExit("nothing was raised")
"""


def run(script: str) -> str:
    command = ["unshare", "--net", sys.executable, "-W", "error", "-c", PRELUDE + script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("inside_asyncio", [False, True])
def test_addresses_mtu_and_routes_are_set_and_setting_them_again_is_no_error(inside_asyncio: bool) -> None:
    facts = run(f"""
tun = TunDevice.open("qt%d")
async def main():
    configure(tun)
    configure(tun)
asyncio.run(main()) if {inside_asyncio} else (configure(tun), configure(tun))
link = ip("addr", "show", "dev", "qt0")[0]
print(tun.name, tun.mtu, link["mtu"], link["txqlen"], "UP" in link["flags"])
print(sorted(f"{{a['local']}}/{{a['prefixlen']}}" for a in link["addr_info"] if a["scope"] == "global"))
print(sorted(r["dst"] for f in ("-4", "-6") for r in ip(f, "route", "show", "dev", "qt0") if r["dst"] != "fe80::/64"))
netlink.set_mtu("qt0", 1300)
print(tun.mtu)
subprocess.run(["ip", "link", "del", "qt0"], check=True)
print(tun.mtu)
""").splitlines()
    assert facts == [
        "qt0 1430 1430 5000 True",
        "['10.90.0.1/24', 'fd90::1/64']",
        "['10.20.0.0/16', '10.90.0.0/24', '10.90.0.2', 'fd20::/48', 'fd90::/64']",
        "1300",
        "0",
    ]


def test_what_the_kernel_refuses_is_one_sentence() -> None:
    assert run("""
print(sentence(LinkError, lambda: netlink.set_mtu("nosuch", 1400)))
first = TunDevice.open("qt0")
print(sentence(TunError, lambda: TunDevice.open("qt0")))
print(sentence(TunError, lambda: TunDevice.open("x" * 16)))
print(sentence(TunError, lambda: TunDevice.open("a/b")))
print(sentence(LinkError, lambda: configure(first, mtu=1000)))
print(sentence(LinkError, lambda: netlink.set_mtu("qt0", 70000)))
print(sentence(TunError, lambda: TunDevice.open("qt1", opener=lambda path, flags: os.open("/nowhere/tun", flags))))
print(sentence(TunError, lambda: TunDevice(os.open("/dev/null", os.O_RDWR))))
device = os.open("/dev/net/tun", os.O_RDWR)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(sentence(TunError, lambda: TunDevice.open("qt2", opener=lambda path, flags: device)))
print(sentence(LinkError, lambda: netlink.set_mtu("qt0", 1400)))
""").splitlines() == [
        "there is no interface named nosuch",
        "interface qt0 cannot be made: another process has it open",
        "interface name 'xxxxxxxxxxxxxxxx' must have 1 to 15 bytes",
        "interface a/b cannot be made: invalid argument",
        "interface qt0 with IPv6 addresses needs an MTU of 1280, not 1000",
        "MTU 70000 for interface qt0: invalid argument",
        "/dev/net/tun cannot be opened: no such file or directory",
        "the TUN device cannot be set up: inappropriate ioctl for device",
        "interface qt2 cannot be made: operation not permitted (CAP_NET_ADMIN is needed)",
        "MTU 1400 for interface qt0: operation not permitted (CAP_NET_ADMIN is needed)",
    ]


def test_packets_go_in_and_out_and_errors_are_counted() -> None:
    assert run("""
tun = TunDevice.open("qt0", offloads=PLAIN)
arena = memoryview(bytearray(1 << 18))
echo = b"\\x08\\x00\\xf7\\xfd\\x00\\x01\\x00\\x01"
def head(total):
    words = struct.pack(">BBHHHBBH4s4s", 0x45, 0, total, 0, 0, 64, 1, 0, bytes([10, 90, 0, 2]), bytes([10, 90, 0, 1]))
    check = sum(struct.unpack(">10H", words)); check = ~((check & 0xffff) + (check >> 16)) & 0xffff
    return words[:10] + struct.pack(">H", check) + words[12:]
packet = memoryview(bytes(10) + head(28) + echo)
print(tun.write_batch([packet]), tun.errors)
configure(tun)
while tun.read_batch(arena, 64): pass
print(tun.write_batch([packet, packet[:5], packet]))
answers = []
deadline = time.monotonic() + 5
while len(answers) < 2 and time.monotonic() < deadline:
    answers += [bytes(arena[s + 30 : s + 32]) for s, n in tun.read_batch(arena, 64) if arena[s + 19] == 1]
print(answers)
subprocess.run(["ip", "link", "del", "qt0"], check=True)
print(tun.fileno() >= 0, tun.read_batch(arena, 64), tun.gone, tun.fileno(), tun.write_batch([packet]))
tun.close(); tun.close()
""").splitlines() == [
        "0 {'EIO': 1}",
        "2",
        "[b'\\x00\\x00', b'\\x00\\x00']",
        "True [] True -1 0",
    ]


def test_offloads_fall_back_to_what_the_kernel_has() -> None:
    """USO4 alone is refused by every kernel; then the next of the list is taken."""
    assert run("""
tun = TunDevice.open("qt0", offloads=(0x01 | 0x20, 0x02, 0x01, 0))
print(tun.offloads)
best = TunDevice.open("qt1", offloads=OFFLOADS)
print(best.offloads in OFFLOADS)
print(sentence(TunError, lambda: TunDevice.open("qt2", offloads=(0x02,))))
""").splitlines() == ["1", "True", "the kernel accepts none of the TUN offload settings that this program knows"]


def test_a_device_of_one_queue_is_not_taken_for_several() -> None:
    said = run("""
subprocess.run(["ip", "tuntap", "add", "dev", "qt0", "mode", "tun", "vnet_hdr"], check=True)
print(sentence(TunError, lambda: TunDevice.open("qt0", queues=True)))
""")
    assert said.startswith("interface qt0 cannot be made: it exists with other settings (one queue or several")


def test_a_detached_queue_gets_no_packets_and_still_takes_them() -> None:
    facts = run("""
import socket
first = TunDevice.open("qt0", queues=True)
second = TunDevice.open("qt0", queues=True)
configure(first)
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
arena = memoryview(bytearray(1 << 18))
def spread():
    for port in range(1000, 1064):
        sender.sendto(b"x", ("10.90.0.2", port))
    counts = [len(queue.read_batch(arena, 256)) for queue in (first, second)]
    return [min(count, 1) for count in counts], sum(counts) >= 64
print(*spread())
second.detach()
print(*spread())
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.bind(("10.90.0.1", 0))
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF
udp = struct.pack("!4H", 9, listener.getsockname()[1], 10, 0) + b"hi"
head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 30, 0, 0, 64, 17, 0, bytes([10, 90, 0, 2]), bytes([10, 90, 0, 1]))
head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
print(second.write_batch([memoryview(bytes(10) + head + udp)]), listener.recv(99))
second.attach()
print(*spread())
print(sentence(TunError, second.attach))
sender.close(), listener.close()
""").splitlines()
    assert facts == [
        "[1, 1] True",
        "[1, 0] True",
        "1 b'hi'",
        "[1, 1] True",
        "a queue of interface qt0 cannot be switched: invalid argument",
    ]
