"""Two planes in memory with directly installed epochs, and packets whose arrival can be told."""

from __future__ import annotations

import hashlib
import ipaddress
import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from qvpn.dataplane.plane import Plane
from qvpn.netio.base import Address, Received
from qvpn.netio.memory import Impairments, MemoryBind, MemoryNetwork, MemoryTun
from qvpn.tunnel.keys import Cipher, EpochKeys, EpochState
from qvpn.tunnel.records import LIMITS, Limits

PLAIN = bytes(10)
"""Virtio header of an ordinary packet."""

ALICE = Address(ipaddress.ip_address("192.0.2.1"), 51840)
BOB = Address(ipaddress.ip_address("192.0.2.2"), 51840)
EVE = Address(ipaddress.ip_address("203.0.113.66"), 666)

FROM_ALICE = {4: "10.90.0.1", 6: "fd90::1"}
FROM_BOB = {4: "10.90.0.2", 6: "fd90::2"}


def ip_packet(source: str, destination: str, payload: bytes, protocol: int = 253) -> bytes:
    """A well-formed IPv4 or IPv6 packet of an experimental protocol."""
    src, dst = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    if src.version == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0)
        return head + src.packed + dst.packed + payload
    head = struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64)
    return head + src.packed + dst.packed + payload


def numbered(number: int, source: str, destination: str, size: int = 40) -> bytes:
    """Virtio header and packet number ``number``; its payload repeats the number."""
    payload = (number.to_bytes(8, "big") * (size // 8 + 1))[:size]
    return PLAIN + ip_packet(source, destination, payload)


def dont_fragment(packet: bytes) -> bytes:
    """The IPv4 packet behind its virtio header with that flag."""
    return packet[:16] + b"\x40\0" + packet[18:]


def number_of(packet: bytes) -> int:
    """The number that :func:`numbered` put in."""
    header = 20 if packet[10] >> 4 == 4 else 40
    return int.from_bytes(packet[10 + header : 18 + header], "big")


def networks(addresses: dict[int, str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(address) for address in addresses.values()]


def _key(secret: bytes, lane: int) -> bytes:
    return hashlib.sha256(secret + bytes([lane])).digest()


def epoch_pair(
    number: int = 1, *, hard_end: float = 1e9, cipher: Cipher = Cipher.AES_256_GCM, seed: bytes = b""
) -> tuple[EpochKeys, EpochKeys]:
    """Keys of one epoch for the initiator and for the responder."""

    def secret(label: bytes) -> bytes:
        return hashlib.sha256(b"%d %s %s" % (number, label, seed)).digest()

    def index(label: bytes) -> int:
        return int.from_bytes(secret(label)[:4], "big") & ~15

    there, back = secret(b"there"), secret(b"back")
    common = {"number": number, "cipher": cipher, "state": EpochState.QKD, "hard_end": hard_end}
    initiator = EpochKeys(
        receive_index=index(b"i"),
        send_index=index(b"r"),
        initiator=True,
        send_key=lambda lane: _key(there, lane),
        receive_key=lambda lane: _key(back, lane),
        **common,
    )
    responder = EpochKeys(
        receive_index=index(b"r"),
        send_index=index(b"i"),
        initiator=False,
        send_key=lambda lane: _key(back, lane),
        receive_key=lambda lane: _key(there, lane),
        **common,
    )
    return initiator, responder


@dataclass
class Recorder:
    """Hooks that remember."""

    handshakes: list[tuple[bytes, Address]] = field(default_factory=list)
    controls: list[tuple[str, int, bytes, Address]] = field(default_factory=list)
    firsts: list[tuple[str, int, Address]] = field(default_factory=list)
    addresses: list[tuple[str, int, Address]] = field(default_factory=list)
    limits: list[tuple[str, int]] = field(default_factory=list)
    tun_gone: int = 0

    def on_handshake(self, datagram: bytes, address: Address) -> None:
        self.handshakes.append((datagram, address))

    def on_control(self, peer: str, receive_index: int, payload: bytes, address: Address) -> None:
        self.controls.append((peer, receive_index, payload, address))

    def on_first_record(self, peer: str, receive_index: int, address: Address) -> None:
        self.firsts.append((peer, receive_index, address))

    def on_new_address(self, peer: str, receive_index: int, address: Address) -> None:
        self.addresses.append((peer, receive_index, address))

    def on_limit(self, peer: str, receive_index: int) -> None:
        self.limits.append((peer, receive_index))

    def on_tun_gone(self) -> None:
        self.tun_gone += 1


class Site:
    """One end: a plane on twins."""

    def __init__(self, network: MemoryNetwork, address: Address, limits: Limits) -> None:
        self.tun = MemoryTun()
        self.bind: MemoryBind = network.bind(address)
        self.hooks = Recorder()
        self.plane = Plane(self.tun, self.bind, lambda: network.now, self.hooks, limits=limits)

    def taken_numbers(self) -> list[int]:
        return [number_of(packet) for packet in self.tun.taken]


class Pair:
    """Alice and Bob, peers of each other, without an epoch yet."""

    def __init__(
        self, *, seed: int = 0, impairments: Impairments | None = None, overlap: float = 10.0, limits: Limits = LIMITS
    ) -> None:
        self.network = MemoryNetwork(seed, impairments)
        self.alice = Site(self.network, ALICE, limits)
        self.bob = Site(self.network, BOB, limits)
        self.alice.plane.add_peer("bob", networks(FROM_BOB), overlap=overlap)
        self.bob.plane.add_peer("alice", networks(FROM_ALICE), overlap=overlap)
        self.alice.plane.set_endpoint("bob", BOB)
        self.bob.plane.set_endpoint("alice", ALICE)
        self.alice.plane.start()
        self.bob.plane.start()

    def install(self, number: int = 1, **settings: object) -> tuple[EpochKeys, EpochKeys]:
        """One epoch at both ends, Alice the initiator; returns (Alice's keys, Bob's keys)."""
        initiator, responder = epoch_pair(number, **settings)  # type: ignore[arg-type]
        self.bob.plane.install("alice", responder)
        self.alice.plane.install("bob", initiator)
        return initiator, responder

    def run(self, seconds: float = 1.0) -> None:
        self.network.advance(self.network.now + seconds)

    def established(self, number: int = 1, **settings: object) -> tuple[EpochKeys, EpochKeys]:
        """Install, and let one control record each way confirm it."""
        keys = self.install(number, **settings)
        assert self.alice.plane.send_control("bob", b"\x02")
        self.run()
        assert self.bob.plane.send_control("alice", b"\x03")
        self.run()
        return keys

    def alice_sends(self, numbers: range | list[int], version: int = 4, size: int = 40) -> None:
        self.alice.tun.inject([numbered(n, FROM_ALICE[version], FROM_BOB[version], size) for n in numbers])

    def bob_sends(self, numbers: range | list[int], version: int = 4, size: int = 40) -> None:
        self.bob.tun.inject([numbered(n, FROM_BOB[version], FROM_ALICE[version], size) for n in numbers])

    def drops(self) -> dict[str, int]:
        """All drops at both ends, summed."""
        total: dict[str, int] = {}
        for site, peer in ((self.alice, "bob"), (self.bob, "alice")):
            for source in (site.plane.stats(peer).drops, site.plane.drops.nonzero()):
                for reason, count in source.items():
                    total[reason] = total.get(reason, 0) + count
        return total


def two_in_one(receives: Iterable[Received], chance: random.Random) -> Iterator[Received]:
    """What a bind makes of receives that may be halves of a superpacket: some of them with the next one behind."""
    before: Received | None = None
    for each in receives:
        if before is not None and _fits_behind(before, each) and chance.random() < 0.6:
            whole = bytearray(before.buffer[: before.length]) + each.buffer[: each.length]
            count = before.length // before.segment
            yield Received(memoryview(whole), len(whole), before.segment, before.address, before.ecn, 0.0, count)
            before = None
            continue
        if before is not None:
            yield before
        before = each
    if before is not None:
        yield before


def _fits_behind(before: Received, each: Received) -> bool:
    full = before.length > before.segment > 0 and before.length % before.segment == 0
    alike = each.segment == before.segment or each.length == each.segment < before.segment
    return full and alike and each.length > 0 and (each.address, each.ecn) == (before.address, before.ecn)
