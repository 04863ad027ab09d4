"""``type = "etsi004"``: a key stream of ETSI GS QKD 004 V2.1.1, in one of two named wire profiles.

::

    url = "tls://192.0.2.9:25575"
    profile = "etsi-c"                  # or "qubip": the standard has no wire format, see keysource/etsi004/wire.py
    source = "app://left"               # URIs of the two applications; write the same two lines at both sites
    destination = "app://right"
    end = "a"                           # the other site has "b"
    stream = "0f8b2f0e-9a3c-4c57-8f0e-2f6a1d3c4b5a"   # the Key_stream_ID that both ask for; optional
    ca = "ca.crt"
    certificate = "left.crt"
    private_key = "left.key"
    origin = "qkd"                      # what you know; nothing said: external
    hop = "zone"                        # local | zone | pq-tls | classical-tls (default)
    owner = "alternate"                 # optional: alternate | a | b, the same at both sites
    chunk = 32                          # optional QoS: chunk (bytes), max_bps, min_bps, jitter, priority,
    timeout = 5000                      #   timeout (ms), ttl (s)

The key at index ``i`` has the key_ID ``NAME:i``, NAME being the stream's 32 digits; one key is the first 32 bytes of
a chunk.  Each end draws the indexes that it owns and fetches the other's by index, so the server must let a client
read at an index, as both servers known for these profiles do.  ``age`` of the metadata is ignored, ``hops`` travels
with the key.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from keysource.base import KEY_BYTES, Key, Origin, SaePair, SourceContext, SourceStatus, wipe
from keysource.errors import BadAnswer, Exhausted, KeySourceError, Unavailable, UnknownKeyID
from keysource.etsi004.client import Etsi004Client
from keysource.etsi004.messages import MOST_INDEX, NO_STREAM, WORDS, Delivered, Opened, Qos, Status, hops_of
from keysource.etsi004.settings import Etsi004Settings
from keysource.etsi004.stream import StreamPosition
from keysource.etsi004.wire import PROFILES
from keysource.remote import load_files, tls_context
from keysource.seen import SeenKeys
from keysource.settings import parse_settings

FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0
"""Seconds between attempts to open the stream."""
_KEY_ID = re.compile(r"([0-9a-f]{32}):(0|[1-9][0-9]{0,9})", re.ASCII)


class Etsi004Source:
    """One end of one key stream."""

    def __init__(
        self,
        settings: Mapping[str, object],
        context: SourceContext,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.settings = parse_settings(Etsi004Settings, settings)
        self._context, self._sleep = context, sleep
        self._name = self.settings.name
        self._position = StreamPosition(context.state, self._name, self.settings.end, self.settings.owner)
        self._client: Etsi004Client | None = None
        self._stream: uuid.UUID | None = None
        self._proposed: uuid.UUID | None = None
        self._trouble = f"{self.settings.url}: the stream is not open yet"
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._seen = SeenKeys()

    async def start(self) -> None:
        """Load the certificates, lock the position, begin to open the stream.

        Raises:
            BadSettings: a file is missing or wrong, another process has the stream, ``hop`` claims too much.
        """
        if self._task is not None:
            return
        table = self.settings
        tls = await tls_context(table, self._context)
        await self._position.open()
        self._client = Etsi004Client(table.host, table.port, tls, PROFILES[table.profile])
        self._task = asyncio.create_task(self._keep_open(self._client))

    def check_files(self) -> None:
        """See :class:`keysource.base.Checkable`."""
        load_files(self.settings, self._context)

    async def aclose(self) -> None:
        """CLOSE, if the server answers at once.  May be called twice."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        client, self._client = self._client, None
        stream, self._stream = self._stream, None
        self._trouble = f"{self.settings.url}: the key source is closed"
        if client is not None:
            if stream is not None:
                with contextlib.suppress(KeySourceError):
                    await client.close(stream)
            await client.aclose()
        await self._position.aclose()

    def sae_pair(self, peer_sae: str) -> SaePair:
        """Named after the stream: the same at both sites, whatever the configurations say."""
        end = self.settings.end
        return SaePair(f"{self._name}/{end}", f"{self._name}/{end.other}")

    async def status(self, peer_sae: str) -> SourceStatus:
        """004 tells no stock: the source is ready while its stream is open."""
        refused = self._position.refused
        reason = str(refused) if refused else "" if self._stream else self._trouble
        return SourceStatus(
            ready=not reason,
            reason=reason,
            origin=self.settings.origin or Origin.EXTERNAL,
            hop=self.settings.hop,
            survives_harvest=not self.settings.harvestable,
        )

    async def get_key(self, peer_sae: str) -> Key:
        self._opened()
        index = self._position.take_own()
        try:
            delivered = await self._deliver(index)
        except Unavailable as error:
            if error.answered:
                self._position.give_back(index)
            raise
        key = self._key(index, delivered)
        await self._on_disk(key, self._position.drawn(index))
        return key

    async def get_key_with_id(self, peer_sae: str, key_id: str) -> Key:
        self._opened()
        found = _KEY_ID.fullmatch(key_id.lower())
        if not found or found[1] != self._name or int(found[2]) > MOST_INDEX:
            raise UnknownKeyID(f"{self.settings.url}: the key_ID is none of stream {self._name}")
        index = int(found[2])
        async with self._position.fetching(index):
            try:
                delivered = await self._deliver(index)
            except Exhausted as error:  # not there yet, or no more: the other end has it, this end not
                raise UnknownKeyID(str(error)) from None
            key = self._key(index, delivered)
            await self._on_disk(key, self._position.fetched(index))
            return key

    def claim(self) -> bytes:
        return self._position.claim()

    def check_claim(self, claim: bytes) -> None:
        """See :class:`keysource.base.Claiming`."""
        self._position.check_claim(claim)

    async def _deliver(self, index: int) -> Delivered:
        """GET_KEY.  Raises what its status means."""
        client, stream = self._opened()
        try:
            answer = await client.get_key(stream, index)
        except KeySourceError as error:
            self._lose(stream, str(error))
            raise
        said = f"{self.settings.url}: GET_KEY: {WORDS[answer.status]}"
        match answer.status:
            case Status.SUCCESSFUL:
                return answer
            case Status.INSUFFICIENT_KEY:
                raise Exhausted(said)
            case Status.GET_KEY_PEER_NOT_CONNECTED | Status.NO_QKD_CONNECTION | Status.PEER_NOT_CONNECTED:
                self._lose(stream, said)
                raise Unavailable(said, answered=True)
            case Status.METADATA_TOO_SMALL:
                raise Unavailable(said, answered=True)
            case Status.TIMEOUT:
                raise Unavailable(said)
        raise BadAnswer(said)

    def _key(self, index: int, delivered: Delivered) -> Key:
        """Raises :class:`BadAnswer`; then the bytes are wiped."""
        key_id = f"{self._name}:{index}"
        material = delivered.key[:KEY_BYTES]
        try:
            if len(delivered.key) != self.settings.chunk or not any(material):
                raise BadAnswer(f"a chunk of {len(delivered.key)} bytes or of zeros, not of {self.settings.chunk}")
            hops = hops_of(delivered.metadata) or 0
            if hops and self.settings.origin is Origin.QKD:
                raise BadAnswer(f'a key over {hops} trusted nodes where the configuration says origin = "qkd"')
            self._seen.check(key_id, material)
        except BadAnswer as error:
            wipe(material)
            raise type(error)(f"{self.settings.url}: {error}") from None
        finally:
            wipe(delivered.key)
        return Key(key_id, material, self.settings.origin or Origin.EXTERNAL, hops)

    async def _on_disk(self, key: Key, writing: Awaitable[None]) -> None:
        try:
            await writing
        except BaseException:
            key.wipe()
            raise

    def _opened(self) -> tuple[Etsi004Client, uuid.UUID]:
        if self._client is None or self._stream is None:
            raise Unavailable(self._trouble, answered=True)
        return self._client, self._stream

    def _lose(self, stream: uuid.UUID, why: str) -> None:
        if self._stream == stream:
            self._stream, self._trouble = None, why
            self._lost.set()

    # The stream

    async def _keep_open(self, client: Etsi004Client) -> None:
        wait = FIRST_WAIT
        while True:
            try:
                self._stream = await self._open(client)
                wait = FIRST_WAIT
                self._lost.clear()
                await self._lost.wait()
            except KeySourceError as error:
                self._trouble = str(error)
            await self._sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _open(self, client: Etsi004Client) -> uuid.UUID:
        """OPEN_CONNECT, and once more with the server's counter-proposal."""
        answer = await self._ask(client, self.settings.qos)
        if answer.status is Status.QOS_NOT_MET and answer.qos is not None:
            self._check_chunk(answer.qos)
            proposal = replace(answer.qos, timeout=self.settings.timeout)
            answer = await self._ask(client, proposal, answer.stream)
        said = f"{self.settings.url}: OPEN_CONNECT: {WORDS[answer.status]}"
        match answer.status:
            case Status.SUCCESSFUL | Status.PEER_NOT_CONNECTED | Status.QOS_NOT_MET:
                if answer.qos is None or answer.stream in (None, NO_STREAM):
                    raise BadAnswer(f"{said}, but without QoS and stream")
                self._check_chunk(answer.qos)
                if self.settings.stream not in (None, answer.stream):
                    raise BadAnswer(f"{said}, but another stream than was asked for")
                return answer.stream or NO_STREAM
            case Status.KSID_IN_USE if self._proposed is not None:
                return self._proposed  # ours, from before a restart; what is not ours GET_KEY refuses
        raise Unavailable(said, answered=True)

    async def _ask(self, client: Etsi004Client, qos: Qos, stream: uuid.UUID | None = None) -> Opened:
        table = self.settings
        self._proposed = table.stream or (stream if stream != NO_STREAM else None)
        return await client.open_connect(table.source, table.destination, qos, self._proposed or NO_STREAM)

    def _check_chunk(self, qos: Qos) -> None:
        if qos.key_chunk_size != self.settings.chunk:
            raise Unavailable(
                f"{self.settings.url}: the server has chunks of {qos.key_chunk_size} bytes, not of"
                f" {self.settings.chunk}: write chunk = {qos.key_chunk_size} at both sites",
                answered=True,
            )
