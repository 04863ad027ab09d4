"""Every packet that is not passed on has a reason, and every reason a counter.

The names are the labels in status, metrics, logs and tests.
"""

from __future__ import annotations

import enum


class DropReason(enum.StrEnum):
    """Why a packet or datagram went no further."""

    # outer datagrams
    TRUNCATED = "truncated"  # shorter than a header and a tag
    BAD_VERSION = "bad_version"  # byte 1 of a record is not our wire version
    BAD_HEADER = "bad_header"  # bytes 0, 2, 3 of a record are not what they must be
    UNKNOWN_INDEX = "unknown_index"  # no live epoch has this receive index
    REPLAY = "replay"  # counter seen before, or older than the window
    AUTHENTICATION = "authentication"  # the tag does not verify
    EXPIRED = "expired"  # the epoch is past its hard end
    LIMIT = "limit"  # the epoch's count of AEAD calls is used up
    # inner packets from the peer
    MALFORMED = "malformed"  # plaintext is not virtio header + IP packet, or lengths disagree
    WRONG_SOURCE = "wrong_source"  # inner source address is not in the peer's allowed IPs
    ECN_NOT_CAPABLE = "ecn_not_capable"  # marked CE outside, but its sender does not speak ECN (RFC 6040)
    TUN_FULL = "tun_full"  # the kernel did not take the packet
    RECEIVE_QUEUE = "receive_queue"  # waited too long before it was received, and its sender does not speak ECN
    # inner packets to a peer
    NO_ROUTE = "no_route"  # no peer has the destination in its allowed IPs
    NO_KEY = "no_key"  # policy: the peer has no acceptable epoch, so nothing leaves
    NO_ENDPOINT = "no_endpoint"  # the peer's address is not known yet
    TOO_BIG = "too_big"  # longer than the tunnel MTU
    SEND_QUEUE = "send_queue"  # waited too long before it was sealed, and its sender does not speak ECN
    QUEUE_FULL = "queue_full"  # too much waited to be sealed
    SEND_FAILED = "send_failed"  # the network refused the datagram
    CARRIER_QUEUE = "carrier_queue"  # its transport took the record, and dropped it before it was sent
    # handshake datagrams
    HANDSHAKE_UNKNOWN_PEER = "handshake_unknown_peer"  # mac1 fits no peer
    HANDSHAKE_MALFORMED = "handshake_malformed"
    HANDSHAKE_COOKIE = "handshake_cookie"  # mac2 wanted or wrong
    HANDSHAKE_BUDGET = "handshake_budget"  # more trials or half-open attempts than allowed
    HANDSHAKE_STATE = "handshake_state"  # well formed, but not wanted in this state
    HANDSHAKE_AUTHENTICATION = "handshake_authentication"  # AEAD or signature does not verify
    HANDSHAKE_CARRIER = "handshake_carrier"  # came by a transport that the configuration does not allow for the peer
    CONTROL_MALFORMED = "control_malformed"  # a control record that does not parse


class Drops:
    """Counters by reason.  ``total`` of a reason never falls."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[DropReason, int] = dict.fromkeys(DropReason, 0)

    def count(self, reason: DropReason, packets: int = 1) -> None:
        self._counts[reason] += packets

    def __getitem__(self, reason: DropReason) -> int:
        return self._counts[reason]

    def nonzero(self) -> dict[str, int]:
        """Reasons that occurred, by name."""
        return {reason.value: n for reason, n in self._counts.items() if n}
