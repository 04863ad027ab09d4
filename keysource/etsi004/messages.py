"""The functions of ETSI GS QKD 004 V2.1.1 clause 6 as values: OPEN_CONNECT, GET_KEY, CLOSE.  Sans-IO.

The standard fixes these and no bytes on a wire (its annex C leaves those open): how they travel is a *wire profile*
(``wire``), which must always be named.
"""

from __future__ import annotations

import enum
import json
import uuid
from dataclasses import dataclass, field

from keysource.errors import BadAnswer

NO_STREAM = uuid.UUID(int=0)
"""Key_stream_ID in OPEN_CONNECT: assign one."""
MOST_INDEX = 2**32 - 1
JSON_METADATA = "application/json"


class Status(enum.IntEnum):
    """Table of clause 6."""

    SUCCESSFUL = 0
    PEER_NOT_CONNECTED = 1  # successful, the peer application is not there yet
    INSUFFICIENT_KEY = 2
    GET_KEY_PEER_NOT_CONNECTED = 3
    NO_QKD_CONNECTION = 4
    KSID_IN_USE = 5
    TIMEOUT = 6
    QOS_NOT_MET = 7  # a counter-proposal comes along
    METADATA_TOO_SMALL = 8  # no key was delivered and none is lost


WORDS = {
    Status.SUCCESSFUL: "successful",
    Status.PEER_NOT_CONNECTED: "successful, but the other site's application is not connected",
    Status.INSUFFICIENT_KEY: "there is not enough key",
    Status.GET_KEY_PEER_NOT_CONNECTED: "the other site's application is not connected, or the stream is not open",
    Status.NO_QKD_CONNECTION: "there is no QKD connection",
    Status.KSID_IN_USE: "the stream is in use",
    Status.TIMEOUT: "timeout",
    Status.QOS_NOT_MET: "the quality of service cannot be met",
    Status.METADATA_TOO_SMALL: "the room for metadata is too small",
}


@dataclass(frozen=True, slots=True)
class Qos:
    """Quality of service; every number is an unsigned 32-bit one."""

    key_chunk_size: int
    """**Bytes** (014 has bits)."""
    max_bps: int = 0
    min_bps: int = 0
    jitter: int = 0
    priority: int = 0
    timeout: int = 5000
    """Milliseconds."""
    ttl: int = 3600
    """Seconds that the key of a closed stream is kept."""
    metadata_mimetype: str = JSON_METADATA
    """Empty: no metadata."""

    def numbers(self) -> tuple[int, ...]:
        """The seven numbers in the order of the standard's table."""
        return (
            self.key_chunk_size,
            self.max_bps,
            self.min_bps,
            self.jitter,
            self.priority,
            self.timeout,
            self.ttl,
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer to OPEN_CONNECT; ``qos`` and ``stream`` are None where the wire carried none beside a failure."""

    status: Status
    qos: Qos | None = None
    stream: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class Delivered:
    """Answer to GET_KEY; whoever takes it wipes ``key``."""

    status: Status
    index: int = 0
    key: bytearray = field(default_factory=bytearray, repr=False)
    metadata: bytes = b""
    metadata_size: int = 0
    """With status 8: the room that the metadata need."""


def hops_of(metadata: bytes) -> int | None:
    """``hops`` of JSON metadata (0 is a direct link); None where they say nothing that can be read.

    Raises:
        BadAnswer: ``hops`` is no number from 0 to 255.
    """
    try:
        fields = json.loads(metadata.rstrip(b"\0") or b"{}")
    except (ValueError, RecursionError):
        return None  # ETSI's own example server sends no JSON under this media type
    hops = fields.get("hops") if isinstance(fields, dict) else None
    if hops is None:
        return None
    if not isinstance(hops, int) or isinstance(hops, bool) or not 0 <= hops <= 255:
        raise BadAnswer("the key's metadata name a number of hops that is none")
    return hops
