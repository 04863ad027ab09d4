"""An application's side of ETSI GS QKD 004 over TLS, in one named wire profile.

Every call is bounded in time and size; after a timeout, a cancelled call or a broken answer its connection is closed,
so no answer is ever taken for another call's.  Nothing is sent twice behind the caller's back, but GET_KEY after
status 8: by the standard no key was delivered then, and none is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import uuid

from keysource.base import wipe
from keysource.errors import BadAnswer, Unavailable
from keysource.etsi004.messages import Delivered, Opened, Qos, Status
from keysource.etsi004.wire import HEADER_BYTES, Service, WireProfile

TIMEOUT = 2.0
METADATA_ROOM = 1024
MOST_METADATA = 64 * 1024
_AT_ONCE = 8


class Etsi004Client:
    """Speaks to one server.  ``timeout`` bounds GET_KEY and CLOSE in seconds."""

    def __init__(
        self, host: str, port: int, tls: ssl.SSLContext, profile: WireProfile, *, timeout: float = TIMEOUT
    ) -> None:
        self._host, self._port, self._tls, self._profile, self._timeout = host, port, tls, profile, timeout
        self.name = f"tls://{host}:{port}"
        self._turn = asyncio.Semaphore(_AT_ONCE if profile.call_per_connection else 1)
        self._kept: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open_connect(self, source: str, destination: str, qos: Qos, stream: uuid.UUID) -> Opened:
        """May last as long as ``qos.timeout``, in which the server waits for the other application.

        Raises:
            Unavailable: no whole answer.
            BadAnswer: an answer that is none.
        """
        request = self._profile.open_connect(source, destination, qos, stream)
        payload = await self._call(Service.OPEN_CONNECT, request, self._timeout + qos.timeout / 1000)
        return self._profile.opened_untrusted(bytes(payload))

    async def get_key(self, stream: uuid.UUID, index: int) -> Delivered:
        """The chunk at ``index``.  Raises as :meth:`open_connect`; other statuses are in the result."""
        answer = await self._get_key(stream, index, METADATA_ROOM)
        if answer.status is Status.METADATA_TOO_SMALL:
            room = answer.metadata_size if METADATA_ROOM < answer.metadata_size <= MOST_METADATA else 0
            answer = await self._get_key(stream, index, room)
        return answer

    async def close(self, stream: uuid.UUID) -> Status:
        payload = await self._call(Service.CLOSE, self._profile.close(stream), self._timeout)
        return self._profile.closed_untrusted(bytes(payload))

    async def aclose(self) -> None:
        """Close the connection.  May be called twice."""
        self._drop()

    async def _get_key(self, stream: uuid.UUID, index: int, room: int) -> Delivered:
        request = self._profile.get_key(stream, index, room)
        payload = await self._call(Service.GET_KEY, request, self._timeout)
        answer = self._profile.delivered_untrusted(payload)
        if answer.status is not Status.SUCCESSFUL:
            wipe(answer.key)
        elif answer.index != index:
            wipe(answer.key)
            raise BadAnswer(f"{self.name}: the key at index {answer.index} came where {index} was asked for")
        return answer

    async def _call(self, service: Service, request: bytes, limit: float) -> bytearray:
        """One request, one payload."""
        try:
            async with self._turn, asyncio.timeout(limit):
                return await self._exchange(service, request)
        except TimeoutError:
            raise Unavailable(f"{self.name}: no answer to {service.name} within {limit:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise Unavailable(f"{self.name}: the server's certificate is refused: {error.verify_message}") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Unavailable(f"{self.name}: {_reason(error)}") from None
        except BadAnswer as error:
            raise BadAnswer(f"{self.name}: {error}") from None

    async def _exchange(self, service: Service, request: bytes) -> bytearray:
        connection, self._kept = self._kept, None
        if connection is None:
            connection = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        reader, writer = connection
        whole = False
        try:
            writer.write(request)
            await writer.drain()
            header = await reader.readexactly(HEADER_BYTES)
            length = self._profile.payload_length_untrusted(header, service)
            payload = bytearray(await reader.readexactly(length))
            whole = True
        finally:
            if whole and not self._profile.call_per_connection:
                self._kept = connection
            else:
                writer.close()
        if self._profile.call_per_connection:
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        return payload

    def _drop(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[1].close()


def _reason(error: OSError | asyncio.IncompleteReadError) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "the server closed the connection within an answer"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails ({(error.reason or type(error).__name__).lower().replace('_', ' ')})"
    return f"the server does not answer ({error.strerror or type(error).__name__})"
