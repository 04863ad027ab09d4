"""A packet that comes alone goes a short way in both directions: it must end where the long one does."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qvpn.dataplane.plane import Plane
from qvpn.tunnel.records import Limits, Refused
from tests.unit.dataplane.segments import TCP, UDP, Big
from tests.unit.dataplane.support import ALICE, BOB, EVE, FROM_ALICE, FROM_BOB, Pair, numbered

SYN = 0x02
LONG = os.environ.get("QVPN_TEST_LONG") == "1"

SIZES = st.sampled_from([0, 1, 8, 40, 600, 1390, 1500])
SOURCES = st.sampled_from([*[FROM_ALICE] * 5, {4: "10.90.0.77", 6: "fd90::77"}])
TARGETS = st.sampled_from([*[FROM_BOB] * 5, {4: "192.0.2.200", 6: "2001:db8::9"}])
CHANGES = st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=2)


@st.composite
def inner(draw: st.DrawFn) -> bytes:
    """One packet with its virtio header, whole and right or not; also superpackets of a few chunks."""
    version, size = draw(st.sampled_from([4, 6])), draw(SIZES)
    source, target = draw(SOURCES)[version], draw(TARGETS)[version]
    kind = draw(st.sampled_from(["plain", "plain", "tcp", "syn", "big"]))
    if kind == "plain":
        packet = bytearray(numbered(1, source, target, size))
    else:
        options = b"\2\4\x05\xb4" if kind == "syn" else bytes(12)
        protocol = draw(st.sampled_from([TCP, UDP])) if kind == "big" else TCP
        options = options if protocol == TCP else b""
        big = Big(source, target, bytes(size * 3 or 1), 500, protocol=protocol, tcp_options=options)
        packet = bytearray(big.virtio())
        if kind != "big":
            packet[0:10] = bytes(10)
            del packet[1500:]
        if kind == "syn":
            packet[43 if version == 4 else 63] |= SYN
    packet[11] |= draw(st.sampled_from([0, 0, 1, 2, 3])) << (0 if version == 4 else 4)
    harm = draw(st.sampled_from(["none", "none", "none", "bytes", "length"]))
    for place, value in draw(CHANGES) if harm == "bytes" else []:
        if place < len(packet):
            packet[place] = value
    cut = draw(st.integers(1, 20)) if harm == "length" else 0
    return bytes(packet[: max(10, len(packet) - cut)])


SEND = st.tuples(st.just("send"), inner())
ACTIONS = st.one_of(
    SEND,
    SEND,
    SEND,
    st.tuples(st.just("seal"), inner()),
    st.tuples(st.just("seal"), st.lists(inner(), min_size=2, max_size=2).map(b"".join)),
    st.tuples(st.just("seal"), st.binary(max_size=60)),
    st.tuples(st.just("replay"), st.just(())),
    st.tuples(st.just("forge"), st.tuples(st.integers(0, 40), st.integers(1, 255))),
    st.tuples(st.just("cut"), st.integers(0, 40)),
    st.tuples(st.just("raw"), st.binary(max_size=60)),
    st.tuples(st.just("control"), st.binary(max_size=9)),
    st.tuples(st.just("erase"), st.just(())),
)


class Ends:
    """Alice and Bob, and what the network saw last."""

    def __init__(self, limits: Limits, *, merges_udp: bool) -> None:
        self.pair = Pair(limits=limits)
        self.pair.established()
        self.pair.bob.tun.merges_udp = merges_udp
        self.last = b""
        self.pair.network.tap = self._saw

    def _saw(self, source: object, target: object, datagram: bytes) -> None:
        self.last = datagram

    def act(self, what: str, how: Any, ecn: int) -> None:
        pair, last = self.pair, self.last
        inject = pair.network.inject
        if what == "send":
            pair.alice.tun.inject([how])
        elif what == "seal":
            for _, epoch in pair.alice.plane._table.by_index.values():
                out = memoryview(bytearray(1 << 17))
                with contextlib.suppress(Refused):  # the key is used up
                    inject(ALICE, BOB, bytes(out[: epoch.sealer.seal_batch([memoryview(how)], out)[0]]), ecn)
        elif what == "replay":
            inject(EVE, BOB, last, ecn)
        elif what == "forge" and len(last) > how[0]:
            inject(ALICE, BOB, last[: how[0]] + bytes([last[how[0]] ^ how[1]]) + last[how[0] + 1 :], ecn)
        elif what == "cut":
            inject(ALICE, BOB, last[: len(last) - how], ecn)
        elif what == "raw":
            inject(EVE, BOB, how, ecn)
        elif what == "control":
            pair.alice.plane.send_control("bob", how)
        elif what == "erase":
            pair.bob.plane.erase_all("alice")
        pair.run()

    def books(self) -> list[object]:
        """All that is left of what happened."""
        pair = self.pair
        kept: list[object] = [pair.bob.tun.taken, pair.alice.tun.taken, self.last, pair.network.counts]
        for site, peer in ((pair.alice, "bob"), (pair.bob, "alice")):
            kept += [site.plane.stats(peer), site.plane.drops.nonzero(), site.hooks]
        return kept


def the_long_way(plane: Plane) -> None:
    """Lone packets as all others."""
    inbound, outbound = plane._inbound, plane._outbound

    def send(length: int, now: float) -> None:
        loads: dict[Any, Any] = {}
        outbound._route_batch(loads, [(0, length)])
        for load in loads.values():
            outbound._send(load, now)

    inbound._lone = lambda received, now: False  # type: ignore[method-assign]
    outbound._send_lone = send  # type: ignore[method-assign]


@settings(max_examples=2000 if LONG else 200)
@given(
    st.lists(st.tuples(ACTIONS, st.sampled_from([0, 0, 1, 2, 3])), min_size=1, max_size=16),
    st.booleans(),
    st.sampled_from([Limits(), Limits(rekey=4, stop=9, failed_rekey=1, failed_stop=3)]),
)
def test_the_short_way_does_what_the_long_way_does(
    actions: list[tuple[tuple[str, Any], int]], merges_udp: bool, limits: Limits
) -> None:
    short, long = (Ends(limits, merges_udp=merges_udp) for _ in range(2))
    for site in (long.pair.alice, long.pair.bob):
        the_long_way(site.plane)
    for (what, how), ecn in actions:
        for ends in (short, long):
            ends.act(what, how, ecn)
        assert short.books() == long.books(), (what, how)
