"""Who may open a QUIC connection to us, and what it costs: RFC 9000, 8.1 (Retry) and 6 (version negotiation).

A stranger's first datagram costs one look while few connections are half open; beyond that, he gets a Retry, which
is smaller than what asked for it and for which nothing is remembered, until he shows that he receives there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.packet import (
    QuicHeader,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from qvpn.netio.base import Address

CID = 8
"""Bytes of our connection IDs."""

LEAST_INITIAL = 1200
VERSIONS = [QuicProtocolVersion.VERSION_1, QuicProtocolVersion.VERSION_2]

FREE_PER_SECOND = 8
"""Connections a second that are opened without a Retry."""

OPENED_PER_SECOND = 50
"""Connections a second that are opened at all: each costs a key exchange and a signature."""

PER_SOURCE = 8
"""Of these, from one IPv4 address or IPv6 /64."""


def source_of(place: Address) -> Hashable:
    """What counts as one source: an IPv4 address or an IPv6 /64."""
    return place.ip if place.ip.version == 4 else place.ip.packed[:8]


@dataclass(frozen=True, slots=True)
class Open:
    """A connection may be made for this Initial."""

    original: bytes
    """Destination connection ID of the client's very first datagram."""
    retried: bytes | None
    """Source connection ID of our Retry, if there was one."""
    named: bytes
    """Destination connection ID of this datagram."""


class Acceptor:
    """Decides over datagrams of no known connection."""

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        self._random = random
        self._tokens = QuicRetryTokenHandler()
        self._second = 0
        self._opened = 0
        self._sources: Counter[Hashable] = Counter()

    def decide(self, data: bytes, place: Address, now: float, *, crowded: bool) -> Open | bytes | None:
        """Open a connection, send these bytes back, or nothing.  ``crowded``: many connections are half open."""
        if len(data) < LEAST_INITIAL:
            return None  # every first datagram of a client is longer (RFC 9000, 14.1)
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=CID)
        except ValueError:
            return None
        if header.version is None or header.packet_type is QuicPacketType.VERSION_NEGOTIATION:
            return None
        if header.version not in VERSIONS:
            return encode_quic_version_negotiation(
                source_cid=header.destination_cid,
                destination_cid=header.source_cid,
                supported_versions=[int(version) for version in VERSIONS],
            )
        if header.packet_type is not QuicPacketType.INITIAL:
            return None
        return self._initial(header, place, now, crowded)

    def _initial(self, header: QuicHeader, place: Address, now: float, crowded: bool) -> Open | bytes | None:
        if int(now) != self._second:
            self._second, self._opened = int(now), 0
            self._sources.clear()
        source = source_of(place)
        if self._opened >= OPENED_PER_SECOND or self._sources[source] >= PER_SOURCE:
            return None
        if header.token:
            return self._with_token(header, place, now, source)
        if crowded or self._opened >= FREE_PER_SECOND:
            return self._retry(header, place, now)
        self._count(source)
        return Open(header.destination_cid, None, header.destination_cid)

    def _count(self, source: Hashable) -> None:
        self._opened += 1
        self._sources[source] += 1

    def _with_token(self, header: QuicHeader, place: Address, now: float, source: Hashable) -> Open | None:
        try:
            original = self._tokens.validate_token(
                address=(str(place.ip), place.port),
                destination_cid=header.destination_cid,
                token=header.token,
                now=now,
            )
        except ValueError:
            return None
        self._count(source)
        return Open(original, header.destination_cid, header.destination_cid)

    def _retry(self, header: QuicHeader, place: Address, now: float) -> bytes:
        source = self._random(CID)
        token = self._tokens.create_token(
            address=(str(place.ip), place.port),
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source,
            now=now,
        )
        return encode_quic_retry(
            version=header.version or VERSIONS[0],
            source_cid=source,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=token,
        )
