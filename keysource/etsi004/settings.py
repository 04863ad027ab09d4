"""The table ``[key_source.NAME]`` with ``type = "etsi004"``."""

from __future__ import annotations

import hashlib
import uuid
from typing import Literal

from pydantic import Field, field_validator

from keysource.base import KEY_BYTES, End, Owner
from keysource.etsi004.messages import JSON_METADATA, NO_STREAM, Qos
from keysource.remote import RemoteTable, check_url

_U32 = 2**32 - 1


class Etsi004Settings(RemoteTable):
    """What an operator writes; both sites have the same ``source``, ``destination``, ``stream``, ``chunk``, ``owner``
    and profile-independent meaning of an index, and different ``end``."""

    profile: Literal["etsi-c", "qubip"]
    """The wire (``wire``): the standard has none, so it must be named."""
    source: str
    destination: str
    end: End
    owner: Owner = Owner.ALTERNATE
    stream: uuid.UUID | None = None
    """Key_stream_ID that both sites ask for; without it each server assigns its own."""
    chunk: int = Field(default=KEY_BYTES, ge=KEY_BYTES, le=65_536)
    """Key_chunk_size in bytes; one key is taken from the front of each chunk."""
    max_bps: int = Field(default=0, ge=0, le=_U32)
    min_bps: int = Field(default=0, ge=0, le=_U32)
    jitter: int = Field(default=0, ge=0, le=_U32)
    priority: int = Field(default=0, ge=0, le=_U32)
    timeout: int = Field(default=5000, ge=0, le=60_000)
    """Milliseconds that OPEN_CONNECT waits for the other site's application."""
    ttl: int = Field(default=3600, ge=0, le=_U32)

    @field_validator("url")
    @classmethod
    def _tls(cls, value: str) -> str:
        return check_url(value, "tls", path=False, port=True)

    @field_validator("source", "destination")
    @classmethod
    def _uri(cls, value: str) -> str:
        scheme, found, rest = value.partition(":")
        if not (value.isascii() and value.isprintable() and " " not in value and len(value) <= 250):
            raise ValueError("a URI has at most 250 printable ASCII characters without spaces")
        if not (found and rest and scheme[:1].isalpha() and all(c.isalnum() or c in "+-." for c in scheme)):
            raise ValueError('a URI begins with its scheme, as "app://left-router"')
        return value

    @field_validator("stream")
    @classmethod
    def _not_zero(cls, value: uuid.UUID | None) -> uuid.UUID | None:
        if value == NO_STREAM:
            raise ValueError("the zero UUID means that the server assigns one: leave the key out")
        return value

    @property
    def qos(self) -> Qos:
        return Qos(
            self.chunk,
            self.max_bps,
            self.min_bps,
            self.jitter,
            self.priority,
            self.timeout,
            self.ttl,
            JSON_METADATA,
        )

    @property
    def name(self) -> str:
        """32 hexadecimal digits that stand for the stream at both sites: its ID, else a hash of both URIs."""
        if self.stream is not None:
            return self.stream.hex
        return hashlib.sha256(f"{self.source}\0{self.destination}".encode()).hexdigest()[:32]
