"""Frozen snapshots of what the packet path did, for status, metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass

from qvpn.netio.base import Address
from qvpn.tunnel.epoch import EpochRole
from qvpn.tunnel.keys import EpochState


@dataclass(frozen=True, slots=True)
class EpochStatus:
    """One live epoch.  ``age`` is in seconds at the time of the snapshot."""

    number: int
    receive_index: int
    send_index: int
    state: EpochState
    role: EpochRole
    initiator: bool
    confirmed: bool
    held: bool
    age: float
    hard_end: float
    """On the daemon's clock."""
    last_received: float | None
    """When the newest record verified under it, on the daemon's clock."""
    sealed: int
    """AEAD calls with the sending key."""
    opened: int
    """AEAD calls with the receiving key that succeeded."""
    failed: int
    """Those that failed: forged or damaged records."""
    marked: int
    """Counters marked in its replay windows: records that verified."""


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Packets that came faster than they could be handled.  Times in seconds, since the start."""

    packets: int
    """From the TUN, waiting to be sealed now: superpackets count once."""
    bytes: int
    flows: int
    longest: float
    """That any of them ever waited."""
    marked: int
    """Marked CE for having waited; drops are counted as ``send_queue`` and ``queue_full``."""
    received_longest: float
    """That datagrams waited in a socket, where that was watched."""
    received_marked: int
    """Receives of many datagrams whose packets were marked CE, or dropped as ``receive_queue``."""


@dataclass(frozen=True, slots=True)
class PeerTraffic:
    """One peer's traffic.  Bytes and packets are inner IP packets."""

    peer: str
    endpoint: Address | None
    sent_bytes: int
    sent_packets: int
    sent_records: int
    received_bytes: int
    received_packets: int
    received_records: int
    opened: int
    """Records opened since the start, under all epochs."""
    marked: int
    """Counters marked in their replay windows; equals ``opened``."""
    source_checks: int
    """Inner packets and superpackets whose source address was looked up and is this peer's."""
    tun_writes: int
    """Those of them that the TUN took."""
    tun_refused: int
    """Those that it did not take: ``source_checks`` is always ``tun_writes`` and these."""
    drops: dict[str, int]
    """Packets or datagrams not passed on, by reason."""
    last_received: float | None
    """When the last record verified, on the daemon's clock."""
    last_sent: float | None
    """When the last record (data or control) was given to the network, on the daemon's clock."""
    epochs: tuple[EpochStatus, ...]
