"""``qvpn bench floor``: what the packet path cannot cost less than, and what it costs, with real devices in step.

One TCP connection between two namespaces goes through two TUNs and one veth pair, and all of it is moved by one
thread that never waits: no daemon, no wake-up, no second core.  So CPU time is the whole cost.  It is taken in many
short pieces, of which the lowest tenth is told: what else the machine does can only make a piece dearer.

- **AEAD**: only the calls that seal and open the records, one a segment and one an acknowledgement of 64 KB.
- **kernel**: only the system calls of the packet path, with datagrams of the same number and size.  The kernel's own
  TCP, which runs inside reads and writes of the TUN, is in it as it is in any tunnel's cost.
- **packet path**: :class:`~qvpn.dataplane.plane.Plane` at both ends, with everything that it does.

What the last costs above the sum of the others is this program's own work.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from qvpn.bench import link, memory, output
from qvpn.bench.errors import BenchError
from qvpn.bench.run import say
from qvpn.dataplane import collector
from qvpn.dataplane.plane import Plane, tunnel_mtu
from qvpn.demo import kernel, sandbox
from qvpn.demo.lab import Lab
from qvpn.demo.process import module
from qvpn.netio import offload
from qvpn.netio.base import MAX_READ, Address
from qvpn.netio.tun import TunDevice
from qvpn.netio.udp import UdpBind
from qvpn.netio.udpsocket import open_socket
from qvpn.tunnel.keys import Cipher
from qvpn.tunnel.records import OVERHEAD, TAG

INNER = {"alice": "10.90.0.1", "bob": "10.90.0.2"}
PORT = 51840
PART = 1 << 18
"""Bytes that the sender's TCP gets at a time."""
WARM, PARTS, PIECES = 40, 4, 40
"""Parts before the first timing, for TCP's window to open, and in one; timings in a round."""
STALLED = 500
"""Looks, 10 ms apart, without a byte delivered after which the run is given up."""
AHEAD = 16
"""Packets under way that the bare relay holds."""
UNIT = 1 << 16
"""Bytes of TCP payload that costs are told for: about one superpacket."""
RECORD_TEXT = memory.SEGMENT + 62
"""Plaintext of a chunk: virtio, IPv4 and TCP header with timestamps, and one segment."""
ACK_TEXT = 62
DEVICE = "floor0"
NAMES = {Cipher.AES_256_GCM: "AES-256-GCM", Cipher.CHACHA20_POLY1305: "ChaCha20-Poly1305"}
_CIPHERS: dict[Cipher, type[AESGCM | ChaCha20Poly1305]] = {
    Cipher.AES_256_GCM: AESGCM,
    Cipher.CHACHA20_POLY1305: ChaCha20Poly1305,
}


@dataclass(frozen=True)
class Cost:
    """CPU time of both ends together, for data one way and acknowledgements back: the lowest tenth of all timings."""

    part: str
    cipher: str
    microseconds: float
    """For 64 KB of TCP payload."""

    @property
    def seconds_per_gb(self) -> float:
        return self.microseconds / UNIT * 1e3


class _Tun(TunDevice):
    """The real device, but it is the benchmark that says when packets wait."""

    wake: Callable[[], None] | None = None

    def fileno(self) -> int:
        return -1

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self.wake = callback

    @property
    def descriptor(self) -> int:
        return self._descriptor


class _Bind(UdpBind):
    """The real sockets, likewise."""

    wake: Callable[..., None] | None = None

    def filenos(self) -> list[int]:
        return []

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self.wake = callback

    @property
    def connected(self) -> socket.socket:
        (only,) = self._connected.values()
        return only.socket


class End:
    """One namespace: its device, its UDP socket to the other end, and the application's TCP socket."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.name, self._namespace = name, lab[name].descriptor
        self.other = next(end for end in link.ENDS if end != name)
        self.target = _address(link.OUTER[self.other])
        with kernel.inside(self._namespace):
            self.tun = _Tun.open(DEVICE)
            self.tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, link.CONGESTION.encode())
        self.bind = _Bind(_address(link.OUTER[name]), factory=self._socket)
        self.bind.connect(self.target)
        mtu = tunnel_mtu(self.bind.max_payload(self.target))
        link.configure_device(lab, name, DEVICE, INNER[name], mtu)

    def _socket(self, family: int) -> socket.socket:
        with kernel.inside(self._namespace):
            return open_socket(family)

    def close(self) -> None:
        self.tcp.close()
        self.bind.close()
        self.tun.close()


Handlers = Mapping[int, Callable[[], object]]
"""What to call when a descriptor is readable."""


class Bare:
    """One direction: the system calls of the packet path and nothing else.  What is sent is not looked at."""

    def __init__(self, end: End, other: End) -> None:
        self._end, self._other = end, other
        self._read, self._write = end.tun.descriptor, other.tun.descriptor
        self._socket = other.bind.connected
        self._arenas = [memoryview(bytearray(MAX_READ)) for _ in range(AHEAD)]
        self._sent, self._got = memoryview(bytearray(2 * MAX_READ)), memoryview(bytearray(2 * MAX_READ))
        self._under_way: deque[tuple[memoryview, int]] = deque()
        """Packets sent, and how many bytes of them have to arrive."""
        self._number = 0
        self.handlers: Handlers = {self._read: self._out, self._socket.fileno(): self._in}

    def _out(self) -> None:
        while len(self._under_way) < AHEAD:
            arena = self._arenas[self._number % AHEAD]
            try:
                length = os.readv(self._read, [arena])
            except BlockingIOError:
                return
            self._number += 1
            wire, record = on_the_wire(arena, length)
            self._end.bind.send_segments(self._sent[:wire], record, self._end.target)
            self._under_way.append((arena[:length], wire))

    def _in(self) -> None:
        while self._under_way:
            try:
                arrived = self._socket.recvmsg_into([self._got], 64)[0]
            except BlockingIOError:
                return
            packet, left = self._under_way.popleft()
            if left > arrived:
                self._under_way.appendleft((packet, left - arrived))
            else:
                os.write(self._write, packet)


def on_the_wire(data: memoryview, length: int) -> tuple[int, int]:
    """(bytes of all records, bytes of each but the last) of a packet or superpacket from the TUN."""
    packet = offload.parse_superpacket(data, 0, length)
    if packet is None:
        return length + OVERHEAD, length + OVERHEAD
    return packet.payload + packet.chunks * (OVERHEAD + packet.header), OVERHEAD + packet.header + packet.segment


def bare(ends: Sequence[End]) -> Handlers:
    one, other = ends
    return {**Bare(one, other).handlers, **Bare(other, one).handlers}


def planes(ends: Sequence[End], cipher: Cipher) -> Handlers:
    """The packet path itself."""
    handlers: dict[int, Callable[[], object]] = {}
    for side, end in enumerate(ends):
        plane = Plane(end.tun, end.bind, time.monotonic, memory.Hooks())
        plane.add_peer(end.other, [ipaddress.ip_network(INNER[end.other])], overlap=10)
        plane.install(end.other, memory.keys(0, side, cipher))
        plane.set_endpoint(end.other, end.target)
        plane.start()
        descriptor = end.bind.connected.fileno()
        if end.tun.wake is not None and end.bind.wake is not None:
            handlers[end.tun.descriptor] = end.tun.wake
            handlers[descriptor] = partial(end.bind.wake, descriptor)
    return handlers


class Transfer:
    """A TCP connection through the tunnel, and the loop that moves its packets."""

    def __init__(self, ends: Sequence[End], handlers: Handlers) -> None:
        self._handlers = handlers
        self._poll = select.epoll()
        for descriptor in handlers:
            self._poll.register(descriptor, select.EPOLLIN)
        sender, receiver = ends
        self.nanoseconds = 0
        """CPU time in which packets were moved."""
        self._listener = receiver.tcp
        self._listener.bind((INNER[receiver.name], 5201))
        self._listener.listen()
        self._sender = sender.tcp
        self._sender.setblocking(False)
        self._sender.connect_ex((INNER[receiver.name], 5201))
        self._until(lambda: len(select.select([self._listener], [], [], 0)[0]))
        self._receiver, _ = self._listener.accept()
        self._receiver.setblocking(False)
        self._text, self._room = memoryview(bytes(PART)), memoryview(bytearray(4 * PART))

    def run(self, parts: int) -> float:
        """Move so much; returns the CPU microseconds of the packet path for 64 KB."""
        before, total = self.nanoseconds, 0
        for _ in range(parts):
            total += self._send()
        return (self.nanoseconds - before) / 1e3 / total * UNIT

    def _send(self) -> int:
        sent = done = 0

        def progress() -> int:
            nonlocal sent, done
            given, taken = self._give(self._text[sent:]), self._take()
            sent, done = sent + given, done + taken
            return given + taken

        while done < PART:
            self._until(progress)
        return done

    def _until(self, moved: Callable[[], int]) -> None:
        """Move packets until this gives something."""
        for _ in range(STALLED):
            self._move()
            if moved():
                return
            self._poll.poll(0.01)
        raise BenchError("no packet passed for five seconds")

    def _give(self, text: memoryview) -> int:
        with contextlib.suppress(BlockingIOError):
            return self._sender.send(text)
        return 0

    def _take(self) -> int:
        with contextlib.suppress(BlockingIOError):
            return self._receiver.recv_into(self._room)
        return 0

    def _move(self) -> None:
        before, poll, handlers = time.thread_time_ns(), self._poll.poll, self._handlers
        while events := poll(0):
            for descriptor, _ in events:
                handlers[descriptor]()
        self.nanoseconds += time.thread_time_ns() - before

    def close(self) -> None:
        self._receiver.close()
        self._poll.close()


def aead(cipher: Cipher) -> float:
    """CPU microseconds of the AEAD calls for 64 KB of TCP payload and an acknowledgement, sealed and opened."""
    key = _CIPHERS[cipher](bytes(32))
    count = UNIT // memory.SEGMENT
    texts, sealed, opened = (_cut(count, RECORD_TEXT + extra) for extra in (0, TAG, 0))
    nonces = [memoryview(number.to_bytes(12, "little")) for number in range(count)]
    ack, ack_sealed = memoryview(bytes(ACK_TEXT)), memoryview(bytearray(ACK_TEXT + TAG))
    ack_opened = memoryview(bytearray(ACK_TEXT))
    before = time.thread_time_ns()
    for _ in range(PARTS):
        sum(map(key.encrypt_into, nonces, texts, repeat(None), sealed))
        sum(map(key.decrypt_into, nonces, sealed, repeat(None), opened))
        key.encrypt_into(nonces[0], ack, None, ack_sealed)
        key.decrypt_into(nonces[0], ack_sealed, None, ack_opened)
    return (time.thread_time_ns() - before) / 1e3 / PARTS / (count * memory.SEGMENT) * UNIT


def _cut(count: int, size: int) -> list[memoryview]:
    """Neighbours in one buffer, as on the real path."""
    whole = memoryview(bytearray(count * size))
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _address(ip: str) -> Address:
    return Address(ipaddress.ip_address(ip), PORT)


def _through(folder: Path, handlers: Callable[[Sequence[End]], Handlers]) -> list[float]:
    """CPU microseconds for 64 KB through a fresh pair of namespaces, again and again."""
    with link.make(folder, link.LINKS["default"]) as lab:
        ends = [End(lab, name) for name in link.ENDS]
        transfer = Transfer(ends, handlers(ends))
        collector.settle()  # as the daemon does
        try:
            transfer.run(WARM)
            return [transfer.run(PARTS) for _ in range(PIECES)]
        finally:
            transfer.close()
            for end in ends:
                end.close()


def measure(rounds: int, folder: Path, say: Callable[[str], None]) -> list[Cost]:
    """All parts, interleaved.  Inside a sandbox.  Raises BenchError."""
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        say(f"floor: round {number + 1}/{rounds}")
        fresh = folder / str(number)
        for cipher, name in NAMES.items():
            found.setdefault(("AEAD calls alone", name), []).extend(aead(cipher) for _ in range(PIECES))
        found.setdefault(("system calls alone", "none"), []).extend(_through(fresh / "bare", bare))
        for cipher, name in NAMES.items():
            through = _through(fresh / name, partial(planes, cipher=cipher))
            found.setdefault(("packet path", name), []).extend(through)
    return [Cost(part, cipher, sorted(each)[len(each) // 10]) for (part, cipher), each in found.items()]


def table(costs: Sequence[Cost]) -> list[list[str]]:
    head = ["part", "cipher", "µs a 64 KB", "CPU s/GB", "Gbit/s of one core"]
    rows = [
        [
            cost.part,
            cost.cipher,
            f"{cost.microseconds:.0f}",
            f"{cost.seconds_per_gb:.2f}",
            f"{8 / cost.seconds_per_gb:.2f}",
        ]
        for cost in [*costs, *sums(costs)]
    ]
    return [head, *rows]


def sums(costs: Sequence[Cost]) -> list[Cost]:
    """For each cipher AEAD and system calls together: the floor."""
    (calls,) = (cost.microseconds for cost in costs if cost.part == "system calls alone")
    alone = [cost for cost in costs if cost.part == "AEAD calls alone"]
    return [Cost("floor: both", cost.cipher, cost.microseconds + calls) for cost in alone]


def plain(costs: Sequence[Cost]) -> dict[str, object]:
    return {"floor": [asdict(cost) | {"seconds_per_gb": cost.seconds_per_gb} for cost in [*costs, *sums(costs)]]}


def main(rounds: int, *, as_json: bool) -> int:
    """Run in a sandbox; 0 if every figure could be taken."""
    try:
        return sandbox.run(module("qvpn.bench.floor", json.dumps([rounds, as_json])), name="qvpn bench")
    except sandbox.SandboxError as error:
        print(f"qvpn bench: {error}", file=sys.stderr)
        return 1


def _work() -> int:
    rounds, as_json = json.loads(sys.argv[1])
    try:
        costs = measure(rounds, Path("/run/qvpn-bench"), say)
    except BenchError as error:
        say(f"qvpn bench: {error}")
        return 1
    output.show(as_json, plain(costs), table(costs))
    return 0


if __name__ == "__main__":
    sys.exit(sandbox.body(_work))
