"""ICMP echo without a ``ping`` binary (RFC 792, RFC 4443): a raw socket, numbered requests, times of the answers."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from typing import Any

_HEADER = struct.Struct(">BBHHH")
_REQUEST4, _REPLY4 = 8, 0
_REQUEST6, _REPLY6 = 128, 129
_FILLING = b"qvpn echo request " * 3


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of ``data``."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def request(identifier: int, sequence: int, *, v6: bool) -> bytes:
    """An echo request; over IPv6 the kernel fills the checksum in."""
    kind = _REQUEST6 if v6 else _REQUEST4
    bare = _HEADER.pack(kind, 0, 0, identifier, sequence) + _FILLING
    return bare if v6 else _HEADER.pack(kind, 0, checksum(bare), identifier, sequence) + _FILLING


def reply_untrusted(packet: bytes, identifier: int, *, v6: bool) -> int | None:
    """The sequence number if ``packet`` (with its IPv4 header, without one over IPv6) answers us, else None."""
    if not v6:
        if len(packet) < 20:
            return None
        packet = packet[(packet[0] & 0x0F) * 4 :]
    if len(packet) < _HEADER.size or packet[_HEADER.size :] != _FILLING:
        return None
    kind, _code, _sum, whose, sequence = _HEADER.unpack_from(packet)
    answers: bool = kind == (_REPLY6 if v6 else _REPLY4) and whose == identifier
    return int(sequence) if answers else None


def ping(peer: str, *, count: int, interval: float, timeout: float) -> dict[str, Any]:
    """Send ``count`` requests ``interval`` seconds apart; returns sent, received and the round trips in ms.

    Needs CAP_NET_RAW.  A request that the host itself refuses (no route) counts as sent and unanswered, and the
    last refusal's reason is in ``error``.
    """
    v6 = ":" in peer
    identifier = os.getpid() & 0xFFFF
    sent_at: dict[int, float] = {}
    trips: dict[int, float] = {}
    error = None
    with _raw_socket(v6) as raw:
        for sequence in range(count):
            sent_at[sequence] = time.monotonic()
            try:
                raw.sendto(request(identifier, sequence, v6=v6), (peer, 0))
            except OSError as refused:
                error = refused.strerror
            last = sequence == count - 1
            _collect(raw, identifier, sent_at, trips, wait=timeout if last else interval, v6=v6, all_of=count)
    times = [round(trip * 1000, 3) for trip in trips.values()]
    return {
        "sent": count,
        "received": len(trips),
        "min_ms": min(times, default=None),
        "mean_ms": round(sum(times) / len(times), 3) if times else None,
        "max_ms": max(times, default=None),
        "error": error,
    }


def _raw_socket(v6: bool) -> socket.socket:
    if v6:
        return socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)


def _collect(
    raw: socket.socket,
    identifier: int,
    sent_at: dict[int, float],
    trips: dict[int, float],
    *,
    wait: float,
    v6: bool,
    all_of: int,
) -> None:
    """Note answers for ``wait`` seconds, or until every one of ``all_of`` requests has its answer."""
    end = time.monotonic() + wait
    while (left := end - time.monotonic()) > 0 and len(trips) < all_of:
        if not select.select([raw], [], [], left)[0]:
            return
        sequence = reply_untrusted(raw.recv(65536), identifier, v6=v6)
        if sequence is not None and sequence in sent_at and sequence not in trips:
            trips[sequence] = time.monotonic() - sent_at[sequence]
