"""Two servers of ETSI GS QKD 004, one for each wire profile, written from the description of the bytes alone: nothing
of ``keysource.etsi004`` is imported.  Both sites' servers derive the chunk at an index from one secret, as if a QKD
link had filled both.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import ssl
import struct
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field


@dataclass
class Link:
    """What both servers of a link share."""

    secret: bytes = field(default_factory=lambda: uuid.uuid4().bytes)
    chunks: int = 1_000_000
    """Chunks that there are by now."""

    def chunk(self, index: int, size: int) -> bytes:
        blocks = [hmac.digest(self.secret, struct.pack(">II", index, n), "sha256") for n in range(-(-size // 32))]
        return b"".join(blocks)[:size]


class Server(ABC):
    """Common to both: TLS, frames, streams.  ``orders`` maps a service to a status to answer instead."""

    version = b""
    several_calls = True

    def __init__(self, link: Link, chunk: int | None = None) -> None:
        self.link, self.chunk = link, chunk
        self.streams: dict[bytes, int] = {}
        self.orders: dict[int, int] = {}
        self.calls: list[tuple[int, bytes]] = []
        self.connections = 0
        self.hops: object = 0
        self.silent = False
        self.writers: set[asyncio.StreamWriter] = set()

    async def start(self, context: ssl.SSLContext, port: int = 0) -> int:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", port, ssl=context, backlog=512)
        return int(self.server.sockets[0].getsockname()[1])

    async def aclose(self) -> None:
        self.server.close()
        for writer in list(self.writers):
            writer.close()
        await asyncio.sleep(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.add(writer)
        try:
            while True:
                head = await reader.readexactly(8)
                body = await reader.readexactly(int.from_bytes(head[4:], "big"))
                assert head[:3] == self.version
                if self.silent:
                    await asyncio.sleep(60)
                answer = self.answer(head[3], body)
                writer.write(self.version + bytes([head[3] + 1]) + len(answer).to_bytes(4, "big") + answer)
                await writer.drain()
                if not self.several_calls:
                    break
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        finally:
            self.writers.discard(writer)
            writer.close()

    def answer(self, service: int, body: bytes) -> bytes:
        self.calls.append((service, body))
        return {2: self.open_connect, 4: self.get_key, 8: self.close}[service](body)

    @abstractmethod
    def open_connect(self, body: bytes) -> bytes:
        """The answer to OPEN_CONNECT."""

    @abstractmethod
    def get_key(self, body: bytes) -> bytes:
        """The answer to GET_KEY."""

    def close(self, body: bytes) -> bytes:
        assert len(body) == 16
        return struct.pack(">I", 0 if self.streams.pop(body, None) else 3)

    def metadata(self) -> bytes:
        return json.dumps({"age": 12, "hops": self.hops, "filler": "x" * 40}).encode()


class EtsiC(Server):
    """As ETSI's C code: 2.1.1, a connection for each call, every field always there."""

    version = bytes((2, 1, 1))
    several_calls = False

    def open_connect(self, body: bytes) -> bytes:
        source, destination, rest = body.split(b"\0", 2)
        assert b":" in source
        assert b":" in destination
        numbers = list(struct.unpack(">7I", rest[:28]))
        mimetype, stream = rest[28:].split(b"\0", 1)
        assert mimetype == b"application/json"
        assert len(stream) == 16
        status = self.orders.get(2, 0)
        if self.chunk is not None and numbers[0] != self.chunk:
            numbers[0], status = self.chunk, 7
        if status == 0 and not any(stream):
            stream = uuid.uuid5(uuid.NAMESPACE_URL, (source + destination).hex()).bytes
        if status in (0, 1):
            self.streams[stream] = numbers[0]
        return struct.pack(">I7I", status, *numbers) + mimetype + b"\0" + stream

    def get_key(self, body: bytes) -> bytes:
        stream, (index, room) = body[:16], struct.unpack(">II", body[16:24])
        assert len(body) == 24 + room
        said = self.metadata()
        status = self.orders.get(4, 0)
        if stream not in self.streams:
            status = 3
        elif index >= self.link.chunks:
            status = 2
        elif room and room < len(said):
            return struct.pack(">IIII", 8, index, 0, len(said)) + bytes(len(said))
        if status:
            return struct.pack(">IIII", status, index, 0, 0)
        key = self.link.chunk(index, self.streams[stream])
        said = said if room else b""
        return struct.pack(">III", 0, index, len(key)) + key + struct.pack(">I", len(said)) + said


class Qubip(Server):
    """As QUBIP's Python server: 1.0.1, a connection for several calls, failures are a status alone, a stream that is
    open is "in use", a QoS beyond the server's comes with status 7 and opens the stream all the same."""

    version = bytes((1, 0, 1))

    def open_connect(self, body: bytes) -> bytes:
        first = body.index(0)
        second = body.index(0, first + 1)
        qos, stream = body[second + 1 : second + 285], body[second + 285 :]
        assert len(stream) == 16
        assert qos[28:].rstrip(b"\0") == b"application/json"
        if self.orders.get(2):
            return struct.pack(">I", self.orders[2])
        if stream in self.streams:
            return struct.pack(">I", 5)
        if not any(stream):
            stream = uuid.uuid4().bytes
        numbers = list(struct.unpack(">7I", qos[:28]))
        status = 7 if self.chunk is not None and numbers[0] != self.chunk else 0
        numbers[0] = self.chunk or numbers[0]
        numbers[4] += 1
        self.streams[stream] = numbers[0]
        return struct.pack(">I7I", status, *numbers) + qos[28:] + stream

    def get_key(self, body: bytes) -> bytes:
        assert len(body) == 24
        stream, (index, room) = body[:16], struct.unpack(">II", body[16:])
        said = self.metadata()
        if self.orders.get(4):
            return struct.pack(">I", self.orders[4])
        if stream not in self.streams:
            return struct.pack(">I", 3)
        if index >= self.link.chunks:
            return struct.pack(">I", 2)
        if room < len(said):
            return struct.pack(">II", 8, len(said))
        key = self.link.chunk(index, self.streams[stream])
        return struct.pack(">III", 0, index, len(key)) + key + struct.pack(">I", len(said)) + said


SERVERS: dict[str, type[Server]] = {"etsi-c": EtsiC, "qubip": Qubip}
