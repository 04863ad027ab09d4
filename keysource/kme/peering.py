"""KME to KME: what the two ends of a link tell each other before a key is issued.  Formats and the calling side.

``POST {url}/kmapi/v1/reserve`` over mutual TLS, caller named by its certificate::

    {"link": "left-right", "master_SAE_ID": "sae-alice", "slave_SAE_IDs": ["sae-bob"],
     "keys": [{"key_ID": "...", "block": 7, "token": "..."}]}

    200  {"missing": ["..."], "first_block": 3, "next_block": 9}

With the answer, every key that is not ``missing`` is on the callee's disk as reserved for this pair.  A ``missing``
key of a block below ``next_block`` will never be there; of a block from ``next_block`` on it may still come.  No free
key of the caller is in any block below ``first_block``.  The same offer (same token) may come again: the answer is
the same as long as the slave did not fetch the key, which it cannot before the master has its key_ID.

Any other status means that nothing may be issued: 400 for a wrong request, 401 without body for a stranger, 403 where
these SAEs may not share keys here, 409 where the two ends disagree about the link, 503 while this end's device
reports an alarm.  Bodies of errors are those of ETSI GS QKD 014.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Sequence

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keysource.etsi014.messages import error_text_untrusted
from keysource.kme.store import Offer, Reservation
from keysource.settings import sentence

PATH = "/kmapi/v1/reserve"
TIMEOUT = 0.8
MAX_KEYS = 1024
_MAX_ANSWER = 256 * 1024


class PeerUnavailable(Exception):
    """The other KME did not answer, or refused: nothing may be issued.  One sentence."""


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class OfferedKey(_Model):
    key_ID: str = Field(min_length=1, max_length=64)
    block: int = Field(ge=0, lt=2**63)
    token: str = Field(min_length=16, max_length=64, repr=False)


class ReserveRequest(_Model):
    link: str
    master_SAE_ID: str
    slave_SAE_IDs: list[str] = Field(min_length=1, max_length=1)
    keys: list[OfferedKey] = Field(min_length=1, max_length=MAX_KEYS)

    def offers(self) -> list[Offer]:
        return [Offer(key.key_ID, key.block, key.token) for key in self.keys]


class ReserveAnswer(_Model):
    missing: list[str]
    first_block: int = Field(ge=0)
    next_block: int = Field(ge=0)


def request_untrusted(body: bytes) -> ReserveRequest:
    """Raises ``ValueError``, one sentence."""
    try:
        return ReserveRequest.model_validate(json.loads(body))
    except ValidationError as error:
        raise ValueError(sentence(error)) from None
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None


class PeerClient:
    """Calls one other KME.  Connections are kept; a call is repeated once where an idle one had died, which is safe
    because an offer may come twice."""

    def __init__(self, kme_id: str, url: str, tls: ssl.SSLContext, *, timeout: float = TIMEOUT) -> None:
        self.kme_id, self.url = kme_id, url
        self._tls, self._timeout = tls, timeout
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def reserve(self, link: str, master: str, slave: str, offers: Sequence[Offer]) -> Reservation:
        """Raises :class:`PeerUnavailable`."""
        keys = [{"key_ID": offer.key_id, "block": offer.block, "token": offer.token} for offer in offers]
        body = {"link": link, "master_SAE_ID": master, "slave_SAE_IDs": [slave], "keys": keys}
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    status, read = await self._post(body)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    if isinstance(error, aiohttp.ClientConnectorError):
                        raise
                    status, read = await self._post(body)
        except TimeoutError:
            raise PeerUnavailable(f"KME {self.kme_id!r} gave no answer within {self._timeout:g} s") from None
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise PeerUnavailable(f"KME {self.kme_id!r} does not answer ({type(error).__name__})") from None
        if status != 200:
            raise PeerUnavailable(
                f"KME {self.kme_id!r} answered {status}: {error_text_untrusted(read) or 'no reason'}"
            )
        return self._answer(read, offers)

    async def _post(self, body: object) -> tuple[int, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls, limit=16),
                trust_env=False,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        async with self._session.post(self.url + PATH, json=body, allow_redirects=False) as response:
            read = await response.content.read(_MAX_ANSWER + 1)
            while len(read) <= _MAX_ANSWER and not response.content.at_eof():
                read += await response.content.read(_MAX_ANSWER + 1 - len(read))
            return response.status, read

    def _answer(self, read: bytes, offers: Sequence[Offer]) -> Reservation:
        try:
            answer = ReserveAnswer.model_validate_json(read)
        except ValidationError:
            raise PeerUnavailable(f"KME {self.kme_id!r} answered something that is no reservation") from None
        if not set(answer.missing) <= {offer.key_id for offer in offers} or answer.first_block > answer.next_block:
            raise PeerUnavailable(f"KME {self.kme_id!r} answered something that does not fit the offer")
        return Reservation(answer.missing, answer.first_block, answer.next_block)
