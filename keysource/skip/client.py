"""An encryptor's side of SKIP (``messages``): three requests over mutual TLS 1.3, suspicious of every answer.

Both key requests consume, so none is ever sent twice; redirects are not followed, proxies of the environment not
used, bodies and times bounded.  What a status means:

=======================  ==========================  ==========================  ==========================
status                   new key                     key by keyId                capabilities
=======================  ==========================  ==========================  ==========================
200                      key, or ``BadAnswer``       key, or ``BadAnswer``       answer, or ``BadAnswer``
400, 404                 ``Unavailable`` answered    ``UnknownKeyID``            ``Unavailable`` answered
401, 403                 ``Unauthorized``            ``Unauthorized``            ``Unauthorized``
429, 503                 ``Exhausted``               ``Unavailable`` answered    ``Unavailable`` answered
500 and other 5xx        ``Unavailable``             ``Unavailable``             ``Unavailable``
405, redirects, others   ``BadAnswer``               ``BadAnswer``               ``BadAnswer``
no whole answer in time  ``Unavailable``             ``Unavailable``             ``Unavailable``
=======================  ==========================  ==========================  ==========================
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from urllib.parse import quote

import aiohttp
from yarl import URL

from keysource.asking import no_answer, open_session, read_bounded
from keysource.base import KEY_BYTES, wipe
from keysource.errors import BadAnswer, Exhausted, KeySourceError, Unauthorized, Unavailable, UnknownKeyID
from keysource.skip.messages import (
    HOPS_HEADER,
    ORIGIN_HEADER,
    Capabilities,
    SkipKey,
    capabilities_untrusted,
    error_text_untrusted,
    key_id_untrusted,
    key_untrusted,
)

WHO = "the key provider"
TIMEOUT = 2.0
MAX_BODY = 64 * 1024


@dataclass(frozen=True, slots=True)
class Said:
    """A key, and what a key provider of ours says about it beside the draft; None where nothing was said."""

    key: SkipKey
    origin: str | None
    hops: str | None


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes = field(repr=False)
    origin: str | None
    hops: str | None


class SkipClient:
    """Speaks to one key provider.  ``timeout`` bounds each request in seconds."""

    def __init__(self, url: str, tls: ssl.SSLContext, *, timeout: float = TIMEOUT) -> None:
        self.url = url.rstrip("/")
        tls.minimum_version = ssl.TLSVersion.TLSv1_3  # what the draft requires of certificates' users
        self._tls = tls
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close all connections.  May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def capabilities(self) -> Capabilities:
        """Consumes nothing."""
        answer = await self._call("capabilities", "/capabilities", {})
        return capabilities_untrusted(answer.body)

    async def new_key(self, remote_system: str) -> Said:
        """A key nobody had before, of 256 bits.  Raises what the table of this module says."""
        query = {"remoteSystemID": remote_system, "size": str(8 * KEY_BYTES)}
        return self._said(await self._call("key", "/key", query))

    async def key(self, remote_system: str, key_id: str) -> Said:
        """The key that the other end was given.  Raises what the table of this module says."""
        try:
            key_id = key_id_untrusted(key_id)
        except BadAnswer as error:
            raise UnknownKeyID(f"{self.url}: {error}") from None
        answer = await self._call("key by keyId", f"/key/{quote(key_id, safe='')}", {"remoteSystemID": remote_system})
        said = self._said(answer)
        if said.key.key_id != key_id:
            wipe(said.key.material)
            raise BadAnswer(f"{self.url}: the key provider answered with another keyId than was asked for")
        return said

    def _said(self, answer: _Answer) -> Said:
        return Said(key_untrusted(answer.body, key_bytes=KEY_BYTES), answer.origin, answer.hops)

    async def _call(self, what: str, path: str, query: dict[str, str]) -> _Answer:
        url = URL(self.url + path, encoded=True).with_query(query)
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._once(url)
        except TimeoutError:
            raise Unavailable(f"{self.url}: no answer to {what} within {self._timeout:g} s") from None
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise Unavailable(f"{self.url}: {no_answer(error, WHO)}") from None
        if answer.status != 200:
            raise _refusal(self.url, what, answer)
        return answer

    async def _once(self, url: URL) -> _Answer:
        async with self._opened().get(url, allow_redirects=False) as response:
            read = await read_bounded(response, MAX_BODY, self.url, WHO)
            headers = response.headers
            return _Answer(response.status, read, headers.get(ORIGIN_HEADER), headers.get(HOPS_HEADER))

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_session(self._tls, WHO)
        return self._session


def _refusal(url: str, what: str, answer: _Answer) -> KeySourceError:
    text = error_text_untrusted(answer.body)
    said = f"{url}: {what} answered {answer.status}" + (f": {text}" if text else "")
    if answer.status in (401, 403):
        return Unauthorized(said)
    if answer.status in (400, 404):
        return UnknownKeyID(said) if what == "key by keyId" else Unavailable(said, answered=True)
    if answer.status in (429, 503):
        return Exhausted(said) if what == "key" else Unavailable(said, answered=True)
    return Unavailable(said) if answer.status >= 500 else BadAnswer(said)
