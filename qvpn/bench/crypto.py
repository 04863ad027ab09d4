"""What the cryptography alone costs: AEAD by size and cipher, handshakes by suite.  CPU time of one thread."""

from __future__ import annotations

import ipaddress
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from qvpn.config import identity
from qvpn.crypto.suites import SUITES
from qvpn.handshake import events, gate
from qvpn.handshake.machine import PeerHandshake
from qvpn.handshake.parameters import PeerParameters, Randomness
from qvpn.handshake.port import Port
from qvpn.netio.base import Address
from qvpn.wire.messages import Mode

SIZES = (64, 1_378, 8_900, 61_440)
"""A small packet, a segment at MTU 1500, one at MTU 9000, and a whole superpacket."""
_CIPHERS: dict[str, type[AESGCM | ChaCha20Poly1305]] = {"AES-256-GCM": AESGCM, "ChaCha20-Poly1305": ChaCha20Poly1305}
_TIMES = 2_000


@dataclass(frozen=True)
class AeadCost:
    """Medians, nanoseconds of CPU time a call."""

    cipher: str
    size: int
    seal_ns: float
    open_ns: float


@dataclass(frozen=True)
class HandshakeCost:
    """Medians, milliseconds of CPU time from the first message until both ends have the keys."""

    suite: int
    name: str
    initiator_ms: float
    responder_ms: float
    bytes: int
    """Of all datagrams in both directions (UDP payload)."""


def aead(rounds: int, say: Callable[[str], None]) -> list[AeadCost]:
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for number in range(rounds):
        say(f"crypto: AEAD, round {number + 1}/{rounds}")
        for name, make in _CIPHERS.items():
            for size in SIZES:
                found.setdefault((name, size), []).append(_aead(make(os.urandom(32)), size))
    return [
        AeadCost(name, size, *(statistics.median(column) for column in zip(*costs, strict=True)))
        for (name, size), costs in found.items()
    ]


def _aead(cipher: AESGCM | ChaCha20Poly1305, size: int) -> tuple[float, float]:
    """Into buffers that are there already, as the packet path does it."""
    nonce, plaintext = memoryview(bytes(12)), memoryview(bytearray(size))
    sealed, out = memoryview(bytearray(size + 16)), memoryview(bytearray(size))
    encrypt, decrypt = cipher.encrypt_into, cipher.decrypt_into
    times = max(50, _TIMES * 1_378 // max(size, 1_378))
    before = time.thread_time_ns()
    for _ in range(times):
        encrypt(nonce, plaintext, None, sealed)
    middle = time.thread_time_ns()
    for _ in range(times):
        decrypt(nonce, sealed, None, out)
    return (middle - before) / times, (time.thread_time_ns() - middle) / times


def handshakes(rounds: int, say: Callable[[str], None]) -> list[HandshakeCost]:
    found: list[HandshakeCost] = []
    for suite in SUITES.values():
        say(f"crypto: handshakes of suite {suite.code:02d}")
        identities = identity.generate(suite.level), identity.generate(suite.level)
        runs = [_handshake(suite.code, identities) for _ in range(rounds)]
        initiator, responder = (statistics.median(each[side] for each in runs) for side in (0, 1))
        found.append(HandshakeCost(suite.code, suite.name, initiator * 1e3, responder * 1e3, int(runs[0][2])))
    return found


class _End:
    """Gate and handshake machine of one end, and the CPU time that they took."""

    def __init__(self, place: int, suite: int, identities: Sequence[identity.Identity]) -> None:
        chance = random.SystemRandom()
        randomness = Randomness(os.urandom, chance.random)
        parameters = PeerParameters(
            name="peer",
            identity=identities[place],
            peers=(identities[1 - place].public,),
            suites=(suite,),
            mode=Mode.PQC_ONLY,
            has_endpoint=place == 0,
        )
        self.address = Address(ipaddress.ip_address(f"192.0.2.{place + 1}"), 51840)
        self.port = Port(randomness.token)
        self.gate = gate.Gate(self.port, randomness, 0.0)
        self.gate.add_peer(parameters)
        self.machine = PeerHandshake(parameters, self.port, randomness, 0.0)
        self.seconds = 0.0
        self.sent = 0
        self.installed = False

    def start(self) -> list[bytes]:
        return self._timed(self._start)

    def take(self, datagrams: Sequence[bytes], sender: Address) -> list[bytes]:
        """Hand datagrams in; returns what is to be sent."""
        return [out for each in datagrams for out in self._timed(partial(self._receive, each, sender))]

    def _start(self) -> list[bytes]:
        self.machine.start(0.0)
        return []

    def _receive(self, datagram: bytes, sender: Address) -> list[bytes]:
        """The gate's own answer (a cookie), if it has one; what gets through goes to the machine."""
        verdict = self.gate.receive(datagram, sender, 0.0)
        if isinstance(verdict, gate.Complete):
            self.machine.receive(verdict.message_type, verdict.message, verdict.carrier, 0.0)
        return [verdict.datagram] if isinstance(verdict, gate.Reply) else []

    def _timed(self, work: Callable[[], list[bytes]]) -> list[bytes]:
        before = time.thread_time()
        out = work()
        while (event := self.machine.next_event()) is not None:
            if isinstance(event, events.SendCold):
                out += event.datagrams
            self.installed = self.installed or isinstance(event, events.Install)
        self.seconds += time.thread_time() - before
        self.sent += sum(map(len, out))
        return out


def _handshake(suite: int, identities: Sequence[identity.Identity]) -> tuple[float, float, float]:
    """Seconds of both ends and bytes of one cold handshake without a key source."""
    initiator, responder = (_End(place, suite, identities) for place in (0, 1))
    under_way = initiator.start()
    receiver, sender = responder, initiator
    while under_way and not (initiator.installed and responder.installed):
        under_way = receiver.take(under_way, sender.address)
        receiver, sender = sender, receiver
    if not (initiator.installed and responder.installed):
        raise RuntimeError(f"a handshake of suite {suite:02d} in memory came to nothing")
    return initiator.seconds, responder.seconds, initiator.sent + responder.sent


def aead_table(costs: Sequence[AeadCost]) -> list[list[str]]:
    """The last column is the floor of any tunnel in Python with records of that size, both ends together."""
    head = ["cipher", "bytes", "seal, ns", "open, ns", "seal and open, CPU s/GB"]
    rows = [
        [
            cost.cipher,
            f"{cost.size:,}",
            f"{cost.seal_ns:.0f}",
            f"{cost.open_ns:.0f}",
            f"{(cost.seal_ns + cost.open_ns) / cost.size:.2f}",
        ]
        for cost in costs
    ]
    return [head, *rows]


def handshake_table(costs: Sequence[HandshakeCost]) -> list[list[str]]:
    head = ["suite", "", "initiator, ms", "responder, ms", "bytes"]
    rows = [
        [f"{cost.suite:02d}", cost.name, f"{cost.initiator_ms:.2f}", f"{cost.responder_ms:.2f}", f"{cost.bytes:,}"]
        for cost in costs
    ]
    return [head, *rows]


def plain(aeads: Sequence[AeadCost], shakes: Sequence[HandshakeCost]) -> dict[str, list[dict[str, object]]]:
    return {"aead": [asdict(cost) for cost in aeads], "handshake": [asdict(cost) for cost in shakes]}
