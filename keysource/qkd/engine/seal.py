"""What a site's hardware tells the fibre: frames over TCP, sealed by AES-256-GCM under a key of the link.

The fibre stands for glass and detectors; whoever reads these connections has every key.  Sealing keeps a stranger on
the network from that, it is no part of the security of QKD, and nothing here claims it were.

Handshake: the client sends magic, its end (``a`` or ``b``) and 16 random bytes, the fibre answers 16 random bytes;
one key per direction from both.  Frame: u32 length, AES-GCM of kind u8 and payload, nonce = counter.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keysource.base import End
from keysource.qkd.engine.channel import no_delay
from keysource.qkd.errors import BadFrame, PeerLost

MAGIC = b"qvpnqf2"
_NONCE = 16
MAX_FRAME = 64 * 1024 * 1024
PREPARE, FLOWN, REFUSED, WELCOME = 1, 2, 3, 4
PREPARE_FORM = struct.Struct(">Q8sQ32s32sB")
"""Block, run (made by the two ends' greeting: only orders of one session fly together), pulses, digest of the plan,
seed of the settings; 1 where Bob's attenuator tests the efficiency, else 0."""


class Sealed:
    """One connection, after the handshake."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, outgoing: bytes, incoming: bytes
    ) -> None:
        self._reader, self._writer = reader, writer
        self._seal, self._open = AESGCM(outgoing), AESGCM(incoming)
        self._sent = self._received = 0
        no_delay(writer)

    async def send(self, kind: int, payload: bytes) -> None:
        """Raises :class:`PeerLost`."""
        text = self._seal.encrypt(self._sent.to_bytes(12, "big"), bytes([kind]) + payload, None)
        self._sent += 1
        try:
            self._writer.write(len(text).to_bytes(4, "big") + text)
            await self._writer.drain()
        except OSError as error:
            raise PeerLost(f"the connection to the fibre broke: {error.strerror or error}") from None

    async def receive(self) -> tuple[int, bytes]:
        """(kind, payload).  Raises :class:`PeerLost` or :class:`BadFrame`."""
        try:
            length = int.from_bytes(await self._reader.readexactly(4), "big")
            if not 17 <= length <= MAX_FRAME:
                raise BadFrame(f"a fibre frame of {length} bytes")
            text = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError):
            raise PeerLost("the connection to the fibre was closed") from None
        try:
            clear = self._open.decrypt(self._received.to_bytes(12, "big"), text, None)
        except InvalidTag:
            raise BadFrame("a fibre frame that is not sealed under this link's key") from None
        self._received += 1
        return clear[0], clear[1:]

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def dial(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, end: End) -> Sealed:
    """The client's side.  Raises :class:`PeerLost`."""
    mine = os.urandom(_NONCE)
    try:
        writer.write(MAGIC + end.value.encode() + mine)
        theirs = await reader.readexactly(_NONCE)
    except (asyncio.IncompleteReadError, OSError):
        raise PeerLost("the fibre closed the connection") from None
    to_fibre, to_site = _keys(key, end, mine, theirs)
    return Sealed(reader, writer, to_fibre, to_site)


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> tuple[End, Sealed]:
    """The fibre's side.  Raises :class:`PeerLost` or :class:`BadFrame`; who the client says it is, its first frame
    proves."""
    try:
        start = await reader.readexactly(len(MAGIC) + 1 + _NONCE)
    except (asyncio.IncompleteReadError, OSError):
        raise PeerLost("a stranger went away") from None
    name, theirs = start[len(MAGIC) : len(MAGIC) + 1], start[-_NONCE:]
    if not start.startswith(MAGIC) or name not in (b"a", b"b"):
        raise BadFrame("a stranger at the fibre")
    end, mine = End(name.decode()), os.urandom(_NONCE)
    writer.write(mine)
    to_fibre, to_site = _keys(key, end, theirs, mine)
    return end, Sealed(reader, writer, to_site, to_fibre)


def _keys(key: bytes, end: End, client: bytes, fibre: bytes) -> tuple[bytes, bytes]:
    """(client to fibre, fibre to client)."""
    both = HKDF(hashes.SHA256(), 64, client + fibre, b"qvpn-qkd fibre v1 " + end.value.encode()).derive(key)
    return both[:32], both[32:]
