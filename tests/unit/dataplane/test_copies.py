"""How many bytes the packet path copies by itself: headers and one chunk, never a payload.

What the kernel reads and writes, and what AEAD calls write, must be; every other copy goes through a slice of one of
the packet path's buffers, which here count what is put into them and what is taken out of them.  The Python calls of
a superpacket are counted too.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import numpy as np
import pytest

from qvpn.dataplane.chunks import ChunkSealer
from tests.unit.dataplane.test_call_counts import CHUNKS, PAYLOAD, Side, Sites, sites, small, superpacket

__all__ = ["sites"]

COUNT = 4
HEADER = 62
"""Virtio, IPv4 and TCP header with 12 bytes of options."""


class CountedBuffer(np.ndarray):  # type: ignore[type-arg]
    """As a memoryview of bytes, for what the packet path does with one."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return found if isinstance(key, slice) else int(found)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, slice):
            CountedBuffer.copied += len(value)
            value = np.frombuffer(value, np.uint8)
        super().__setitem__(key, value)

    def __bytes__(self) -> bytes:
        CountedBuffer.copied += len(self)
        return self.tobytes()

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return self.tobytes() == other

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other

    __hash__ = None  # type: ignore[assignment]


def counted(size: int) -> Any:
    return np.zeros(size, np.uint8).view(CountedBuffer)


def count_copies(side: Side) -> None:
    """Give the packet path buffers that count."""
    outbound, inbound = side.plane._outbound, side.plane._inbound
    outbound._arena, outbound._out = counted(len(outbound._arena)), counted(len(outbound._out))
    outbound._chunks = ChunkSealer(outbound._arena, counted(len(outbound._out)))
    inbound._out, inbound._joiner._buffer = counted(len(inbound._out)), counted(len(inbound._joiner._buffer))
    for number in range(16):
        side.bind._buffers.append(counted(len(side.bind._buffer(number))))
    del side.bind._buffers[:16]


@pytest.fixture
def copying(sites: Sites) -> Sites:
    for side in (sites.alice, sites.bob):
        count_copies(side)
    assert sites.carry([superpacket(0), superpacket(1)]) == [superpacket(0), superpacket(1)]
    CountedBuffer.copied = 0
    return sites


def test_of_a_superpacket_headers_and_one_chunk_are_copied(copying: Sites) -> None:
    packets = [superpacket(n) for n in range(2, 2 + COUNT)]
    assert copying.carry(packets) == packets
    # out: a header to each chunk; in: the first chunk, and the header that lands on what is there, twice
    looks = 6 * 64  # at headers
    assert 0 < CountedBuffer.copied <= COUNT * (CHUNKS * HEADER + HEADER + PAYLOAD + 2 * HEADER + looks)
    assert CountedBuffer.copied / sum(map(len, packets)) < 0.08


def test_small_packets_are_copied_once(copying: Sites) -> None:
    packets = [small(n) for n in range(60)]
    copying.carry(packets)
    assert CountedBuffer.copied / sum(map(len, packets)) < 1.5  # headers are looked at


def test_a_copy_of_a_payload_would_be_seen(copying: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    outbound = copying.alice.plane._outbound
    send = outbound._send_superpacket

    def copies(length: int, now: float) -> None:
        outbound._out[:length] = outbound._arena[:length]
        send(length, now)

    monkeypatch.setattr(outbound, "_send_superpacket", copies)
    packets = [superpacket(n) for n in range(2, 2 + COUNT)]
    assert copying.carry(packets) == packets
    assert CountedBuffer.copied / sum(map(len, packets)) > 1


def test_a_superpacket_costs_few_calls(sites: Sites) -> None:
    """Python functions of this project called for a superpacket, from the TUN of one site to that of the other."""
    warm = [superpacket(n) for n in range(COUNT)]
    sites.carry(warm)
    calls: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "/qvpn/" in frame.f_code.co_filename:
            calls[frame.f_code.co_qualname] += 1

    packets = [superpacket(n) for n in range(COUNT)]
    for packet in packets:
        sites.alice.kernel.send(packet)
    own = sites.bob.bind.filenos()[-1]
    sys.setprofile(profile)
    try:
        sites.alice.plane._on_tun()
        sealed = calls.total()
        sites.bob.plane._on_network(own)
    finally:
        sys.setprofile(None)
    assert sites.bob.taken() == packets
    assert sealed / COUNT <= 19
    assert (calls.total() - sealed) / COUNT <= 27
