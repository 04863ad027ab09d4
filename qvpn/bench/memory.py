"""The packet path without a kernel: what one superpacket and one small packet cost, and what does not change that.

Two planes of :mod:`qvpn.dataplane` with the twins of :mod:`qvpn.netio.memory` seal and open the same traffic while
the numbers of peers and of allowed prefixes grow.  Figures are CPU time of this thread, so a busy machine blurs them
less than a stopwatch.  The twins copy each packet once where a kernel would, and that is in the figures.
"""

from __future__ import annotations

import hashlib
import ipaddress
import statistics
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from qvpn.dataplane.plane import Plane
from qvpn.netio.base import Address, Received
from qvpn.netio.memory import MemoryBind, MemoryNetwork, MemoryTun
from qvpn.netio.udpreceive import HALF
from qvpn.tunnel.keys import Cipher, EpochKeys, EpochState

PEERS = (1, 10, 100)
PREFIXES = (1, 1_000, 10_000)
SEGMENT, SUPERPACKET = 1378, 47
"""Payload bytes of one segment with TCP timestamps at a tunnel MTU of 1430, and as many as 64 KiB hold."""
SMALL = 64
"""UDP payload of a small packet."""
BATCH = 60
"""Small packets that wait together, as at some hundred thousand a second."""
_BUFFERS = 16
_SEGMENTS, _SEND_BYTES = 64, 65_507
"""What one send with UDP_SEGMENT carries at most."""
_ROOMS = 128
"""Sends of one timing that the twin can keep; made beforehand, for new memory costs more than the copy."""
_TIMES = 40
"""Superpackets, or batches of small packets, of one timing."""


@dataclass(frozen=True)
class Cost:
    """Medians of the rounds, nanoseconds of CPU time for each superpacket or small packet."""

    traffic: str
    peers: int
    prefixes: int
    seal_ns: float
    open_ns: float


class _Bind(MemoryBind):
    """A twin that keeps the datagrams of one send together, as UDP_SEGMENT and UDP GRO do on an open road."""

    def __init__(self, network: MemoryNetwork, address: Address, sender: Address) -> None:
        super().__init__(network, address)
        self.sent: list[tuple[memoryview, int]] = []
        self.arrived: deque[tuple[memoryview, int]] = deque()
        self._rooms = [memoryview(bytearray(1 << 16)) for _ in range(_ROOMS)]
        self._from = sender
        self._buffers = [memoryview(bytearray(1 << 17)) for _ in range(_BUFFERS)]
        self._wake: Callable[[], None] | None = None

    def send_segments(self, buffer: memoryview, segment: int, address: Address, ecn: int = 0) -> int:
        count = -(-len(buffer) // segment)
        sends = -(-count // min(_SEGMENTS, _SEND_BYTES // segment))
        step = -(-count // sends) * segment  # as even as the real bind's
        for cut in range(0, len(buffer), step):
            part = buffer[cut : cut + step]
            room = self._rooms[len(self.sent)][: len(part)]
            room[:] = part
            self.sent.append((room, segment))
        return count

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self._wake = callback

    def receive_batch(self, limit: int, descriptor: int = -1) -> list[Received]:
        return [self._receive(buffer) for buffer in self._buffers[:limit] if self.arrived]

    def deliver(self, batches: Sequence[tuple[memoryview, int]]) -> None:
        """All of it, one callback after another."""
        self.arrived.extend(batches)
        while self.arrived and self._wake is not None:
            self._wake()

    def _receive(self, buffer: memoryview) -> Received:
        data, segment = self.arrived.popleft()
        size = len(data)
        buffer[:size] = data
        received = Received(buffer, size, segment, self._from)
        if self.arrived and size >= HALF and not size % segment and self.arrived[0][1] == segment:
            more, _ = self.arrived.popleft()  # as the real bind receives the other half of a superpacket
            buffer[size : size + len(more)] = more
            received.length, received.joined = size + len(more), size // segment
        return received


class _Tun(MemoryTun):
    """A twin that only counts what is written."""

    written = 0

    def write_batch(self, packets: Sequence[memoryview]) -> int:
        self.written += len(packets)
        return len(packets)


class Hooks:
    """A control plane that has nothing to do."""

    def on_handshake(self, datagram: bytes, address: Address) -> None: ...
    def on_control(self, peer: str, receive_index: int, payload: bytes, address: Address) -> None: ...
    def on_first_record(self, peer: str, receive_index: int, address: Address) -> None: ...
    def on_new_address(self, peer: str, receive_index: int, address: Address) -> None: ...
    def on_limit(self, peer: str, receive_index: int) -> None: ...
    def on_tun_gone(self) -> None: ...


class Bench:
    """A sender with ``peers`` peers, each with one epoch, and a receiver that knows as many."""

    def __init__(self, peers: int, prefixes: int, cipher: Cipher = Cipher.AES_256_GCM) -> None:
        self.peers = peers
        network = MemoryNetwork()
        ends = [Address(ipaddress.ip_address(ip), 51840) for ip in ("192.0.2.1", "192.0.2.2")]
        self.binds = [_Bind(network, end, other) for end, other in zip(ends, reversed(ends), strict=True)]
        self.tuns = [_Tun(), _Tun()]
        self.planes = [
            Plane(tun, bind, lambda: 0.0, Hooks()) for tun, bind in zip(self.tuns, self.binds, strict=True)
        ]
        for side, plane in enumerate(self.planes):
            for number in range(peers):
                plane.add_peer(str(number), _networks(1 - side, number, prefixes if number == 0 else 1), overlap=10)
                plane.install(str(number), keys(number, side, cipher))
                plane.set_endpoint(str(number), ends[1 - side])
            plane.start()

    def cost(self, packets: Callable[[int], list[bytes]], each: int) -> tuple[float, float]:
        """CPU nanoseconds to seal and to open, per unit of which ``packets(peer)`` has ``each``."""
        sender, receiver = self.tuns[0], self.binds[1]
        loads = [packets(number % self.peers) for number in range(_TIMES)]
        before = time.thread_time_ns()
        for load in loads:
            sender.inject(load)
        sealed = time.thread_time_ns() - before
        batches, self.binds[0].sent = self.binds[0].sent, []
        written = self.tuns[1].written
        before = time.thread_time_ns()
        receiver.deliver(batches)
        opened = time.thread_time_ns() - before
        if self.tuns[1].written - written < len(loads):
            raise RuntimeError("the packet path in memory lost packets")
        return sealed / _TIMES / each, opened / _TIMES / each


def run(rounds: int, say: Callable[[str], None]) -> list[Cost]:
    """All combinations of traffic, peers and prefixes, interleaved."""
    grid = [(peers, 1) for peers in PEERS] + [(1, prefixes) for prefixes in PREFIXES[1:]]
    benches = {(peers, prefixes): Bench(peers, prefixes) for peers, prefixes in grid}
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for number in range(rounds):
        say(f"memory: round {number + 1}/{rounds}")
        for (peers, prefixes), bench in benches.items():
            for traffic, packets, each in TRAFFIC:
                found.setdefault((traffic, peers, prefixes), []).append(bench.cost(packets, each))
    return [
        Cost(traffic, peers, prefixes, *(statistics.median(column) for column in zip(*costs, strict=True)))
        for (traffic, peers, prefixes), costs in found.items()
    ]


def superpacket(peer: int) -> list[bytes]:
    """One TCP superpacket of 47 segments to a peer, with its virtio header."""
    payload = SEGMENT * SUPERPACKET
    tcp = struct.pack(">HHIIBBHHH", 5201, 40000, 1, 1, 8 << 4, 0x10, 512, 0, 0) + b"\x01\x01\x08\x0a" + bytes(8)
    virtio = struct.pack("<BBHHHH", 1, 1, 52, SEGMENT, 20, 16)
    return [virtio + _ipv4(peer, 6, len(tcp) + payload) + tcp + bytes(payload)]


def lone_packet(peer: int) -> list[bytes]:
    """What a ping is to the packet path: one read, one record, one write."""
    return small_packets(peer)[:1]


def small_packets(peer: int) -> list[bytes]:
    """A batch of small UDP packets of one flow to a peer."""
    udp = struct.pack(">HHHH", 4000, 4001, 8 + SMALL, 0)
    virtio = struct.pack("<BBHHHH", 1, 0, 28, 0, 20, 6)
    return [virtio + _ipv4(peer, 17, 8 + SMALL) + udp + bytes(SMALL)] * BATCH


TRAFFIC: tuple[tuple[str, Callable[[int], list[bytes]], int], ...] = (
    ("superpacket of 47 segments", superpacket, 1),
    (f"64-byte UDP packet, {BATCH} at once", small_packets, BATCH),
    ("64-byte UDP packet, alone", lone_packet, 1),
)


def _ipv4(peer: int, protocol: int, length: int) -> bytes:
    source, destination = (_host(side, peer) for side in (0, 1))
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 1, 0x4000, 64, protocol, 0)
    total = sum(struct.unpack(">10H", head + source + destination))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack(">H", ~total & 0xFFFF) + source + destination


def _host(side: int, peer: int) -> bytes:
    """10.x for the sender's side, 11.x for the receiver's; a /24 for each peer."""
    return bytes((10 + side, 0, peer, 1))


def _networks(side: int, peer: int, count: int) -> list[ipaddress.IPv4Network]:
    own = ipaddress.IPv4Network((int.from_bytes(_host(side, peer)[:3]) << 8, 24))
    return [own, *_more(side, count - 1)]


def _more(side: int, count: int) -> Iterator[ipaddress.IPv4Network]:
    """Further prefixes of several lengths, none of which holds a packet of the benchmark."""
    base = (20 + side) << 24
    return (ipaddress.IPv4Network((base + (number << 10), 22 + number % 3)) for number in range(count))


def keys(number: int, side: int, cipher: Cipher) -> EpochKeys:
    """Side 0 seals what side 1 opens; random enough for a benchmark, and never outside one."""

    def secret(label: str) -> bytes:
        return hashlib.sha256(f"{label} {number}".encode()).digest()

    def index(owner: int) -> int:
        return (number << 8 | owner << 7 | 0x10000000) & ~15

    return EpochKeys(
        number=1,
        receive_index=index(side),
        send_index=index(1 - side),
        cipher=cipher,
        state=EpochState.PQC,
        hard_end=1e9,
        initiator=side == 0,
        send_key=lambda lane: secret(f"{side} to {1 - side} lane {lane}"),
        receive_key=lambda lane: secret(f"{1 - side} to {side} lane {lane}"),
    )


def table(costs: Sequence[Cost]) -> list[list[str]]:
    head = ["traffic", "peers", "prefixes", "seal, µs", "open, µs"]
    rows = [
        [
            cost.traffic,
            f"{cost.peers:,}",
            f"{cost.prefixes:,}",
            f"{cost.seal_ns / 1000:.2f}",
            f"{cost.open_ns / 1000:.2f}",
        ]
        for cost in costs
    ]
    return [head, *rows]


def plain(costs: Sequence[Cost]) -> list[dict[str, object]]:
    return [asdict(cost) for cost in costs]
