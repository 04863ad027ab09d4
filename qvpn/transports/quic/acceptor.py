"""Who may open a QUIC connection to us, and what it costs: RFC 9000, 8.1 (Retry) and 6 (version negotiation).

A stranger's first datagram costs one look while few connections are half open; beyond that, he gets a Retry, which
is smaller than what asked for it and for which nothing is remembered, until he shows that he receives there.  Only
then does he use up the share of his source: a forged address takes nothing from whoever has it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
from qvpn.transports.quic.shares import Bucket, Rates, Shares, Sources

CID = 8
"""Bytes of our connection IDs."""

LEAST_INITIAL = 1200
VERSIONS = [QuicProtocolVersion.VERSION_1, QuicProtocolVersion.VERSION_2]

FREE_PER_SECOND = 8
"""Connections a second that are opened without a Retry, from whatever address it says."""

OPENINGS = Rates(each=2.0, burst=16.0, together=50.0, together_burst=50.0, newcomers=25.0)
"""Connections from addresses that a Retry proved."""


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

    def __init__(self, random: Callable[[int], bytes] = os.urandom, sources: Sources | None = None) -> None:
        self._random = random
        self._sources = sources or Sources()
        self._tokens = QuicRetryTokenHandler()
        self._free = Bucket(FREE_PER_SECOND, 0.0)
        self._shares = Shares(OPENINGS)

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
        if header.token:
            return self._with_token(header, place, now)
        if crowded or self._free.fill(FREE_PER_SECOND, FREE_PER_SECOND, now) < 1:
            return self._retry(header, place, now)
        self._free.level -= 1
        return Open(header.destination_cid, None, header.destination_cid)

    def _with_token(self, header: QuicHeader, place: Address, now: float) -> Open | None:
        try:
            original = self._tokens.validate_token(
                address=(str(place.ip), place.port),
                destination_cid=header.destination_cid,
                token=header.token,
                now=now,
            )
        except ValueError:
            return None
        if not self._shares.take(self._sources.of(place), now, expected=self._sources.expects(place)):
            return None
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
