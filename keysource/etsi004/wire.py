"""Bytes on the wire for ETSI GS QKD 004: two profiles, which do not understand each other.  Sans-IO.

Both put a frame into TLS: 3 bytes version, 1 byte service, 4 bytes length of the payload; all numbers big-endian.
Services: OPEN_CONNECT 2 and its answer 3, GET_KEY 4 and 5, CLOSE 8 and 9.

====================  ===========================================  ==============================================
in                    ``etsi-c`` (ETSI's C code)                   ``qubip`` (QUBIP's Python server)
====================  ===========================================  ==============================================
version               2.1.1                                        1.0.1
connection            one for each call                            one for several calls
QoS                   7 numbers, media type ending in NUL          7 numbers, media type in 256 bytes, NUL padded
OPEN_CONNECT          source NUL destination NUL QoS stream(16)    the same
its answer            status QoS stream, always                    status QoS stream; a failure: status alone
GET_KEY               stream index n and n bytes of room           stream index n
its answer            status index n key m metadata, always        the same; a failure: status alone; 8: status m
CLOSE                 stream                                       stream
its answer            status                                       status
====================  ===========================================  ==============================================
"""

from __future__ import annotations

import enum
import struct
import uuid
from dataclasses import dataclass

from keysource.base import wipe
from keysource.errors import BadAnswer
from keysource.etsi004.messages import Delivered, Opened, Qos, Status

HEADER_BYTES = 8
MOST_PAYLOAD = 1024 * 1024
_HEADER = struct.Struct(">3sBI")
_U32 = struct.Struct(">I")
_QOS = struct.Struct(">7I")
_MIMETYPE_BYTES = 256


class Service(enum.IntEnum):
    """The answer's number is one more."""

    OPEN_CONNECT = 2
    GET_KEY = 4
    CLOSE = 8


@dataclass(frozen=True, slots=True)
class WireProfile:
    """What the two differ in."""

    name: str
    version: bytes
    fixed_mimetype: bool
    """The media type takes 256 bytes; otherwise it ends with a NUL."""
    room_is_sent: bool
    """GET_KEY carries as many zero bytes as metadata may have."""
    bare_failures: bool
    """A failure may be its status alone."""
    call_per_connection: bool

    def open_connect(self, source: str, destination: str, qos: Qos, stream: uuid.UUID) -> bytes:
        """``ValueError`` where a text holds a NUL, is not ASCII or too long."""
        payload = b"".join((_text(source), _text(destination), self._qos(qos), stream.bytes))
        return self._frame(Service.OPEN_CONNECT, payload)

    def get_key(self, stream: uuid.UUID, index: int, metadata_size: int) -> bytes:
        room = bytes(metadata_size) if self.room_is_sent else b""
        payload = stream.bytes + _U32.pack(index) + _U32.pack(metadata_size) + room
        return self._frame(Service.GET_KEY, payload)

    def close(self, stream: uuid.UUID) -> bytes:
        return self._frame(Service.CLOSE, stream.bytes)

    def payload_length_untrusted(self, header: bytes, service: Service) -> int:
        """How many bytes follow the header of an answer.  Raises :class:`BadAnswer`."""
        version, answered, length = _HEADER.unpack(header)
        if version != self.version:
            said = ".".join(str(part) for part in version)
            raise BadAnswer(f"an answer of version {said}: this is not wire profile {self.name!r}")
        if answered != service + 1:
            raise BadAnswer(f"an answer of service {answered} to service {service:d}")
        if length > MOST_PAYLOAD:
            raise BadAnswer(f"an answer of {length} bytes")
        return int(length)

    def opened_untrusted(self, payload: bytes) -> Opened:
        """Raises :class:`BadAnswer`."""
        reader = _Reader(payload)
        status = reader.status()
        if self._is_bare(status, reader):
            return Opened(status)
        answer = Opened(status, self._read_qos(reader), uuid.UUID(bytes=reader.take(16)))
        reader.end()
        return answer

    def delivered_untrusted(self, payload: bytearray) -> Delivered:
        """``payload`` is wiped.  Raises :class:`BadAnswer`."""
        try:
            return self._delivered(_Reader(payload))
        finally:
            wipe(payload)

    def closed_untrusted(self, payload: bytes) -> Status:
        """Raises :class:`BadAnswer`."""
        reader = _Reader(payload)
        status = reader.status()
        reader.end()
        return status

    def _delivered(self, reader: _Reader) -> Delivered:
        status = reader.status()
        if self._is_bare(status, reader):
            return Delivered(status)
        if self.bare_failures and status is Status.METADATA_TOO_SMALL:
            needed = reader.u32()
            reader.end()
            return Delivered(status, metadata_size=needed)
        index, key = reader.u32(), bytearray(reader.take(reader.u32()))
        try:
            size = reader.u32()
            if status is Status.METADATA_TOO_SMALL and reader.left == 0:
                return Delivered(status, index, key, b"", size)
            metadata = bytes(reader.take(size))
            reader.end()
        except BadAnswer:
            wipe(key)
            raise
        return Delivered(status, index, key, metadata, size)

    def _is_bare(self, status: Status, reader: _Reader) -> bool:
        return self.bare_failures and status is not Status.SUCCESSFUL and reader.left == 0

    def _frame(self, service: Service, payload: bytes) -> bytes:
        return _HEADER.pack(self.version, service, len(payload)) + payload

    def _qos(self, qos: Qos) -> bytes:
        mimetype = _text(qos.metadata_mimetype)
        return _QOS.pack(*qos.numbers()) + (
            mimetype.ljust(_MIMETYPE_BYTES, b"\0") if self.fixed_mimetype else mimetype
        )

    def _read_qos(self, reader: _Reader) -> Qos:
        numbers = _QOS.unpack(reader.take(_QOS.size))
        raw = reader.take(_MIMETYPE_BYTES) if self.fixed_mimetype else reader.until_nul(_MIMETYPE_BYTES)
        mimetype = raw.split(b"\0", 1)[0].decode("ascii", "replace")
        chunk, max_bps, min_bps, jitter, priority, timeout, ttl = numbers
        return Qos(chunk, max_bps, min_bps, jitter, priority, timeout, ttl, mimetype)


class _Reader:
    """Takes bytes from the front.  Every method raises :class:`BadAnswer` where there are too few."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise BadAnswer(f"an answer that ends {count - self.left} bytes too early")
        self._at += count
        return bytes(self._data[self._at - count : self._at])

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def status(self) -> Status:
        number = self.u32()
        try:
            return Status(number)
        except ValueError:
            raise BadAnswer(f"an answer with status {number}, which the standard does not have") from None

    def until_nul(self, most: int) -> bytes:
        end = self._data.find(b"\0", self._at, self._at + most)
        if end < 0:
            raise BadAnswer("an answer with a text that does not end")
        return self.take(end + 1 - self._at)[:-1]

    def end(self) -> None:
        if self.left:
            raise BadAnswer(f"an answer with {self.left} bytes too many")


def _text(value: str) -> bytes:
    raw = value.encode("ascii")
    if b"\0" in raw or len(raw) >= _MIMETYPE_BYTES:
        raise ValueError(f"a text of {len(raw)} bytes, or with a NUL")
    return raw + b"\0"


ETSI_C = WireProfile("etsi-c", b"\x02\x01\x01", False, True, False, True)
QUBIP = WireProfile("qubip", b"\x01\x00\x01", True, False, True, False)
PROFILES = {profile.name: profile for profile in (ETSI_C, QUBIP)}
