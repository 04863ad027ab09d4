"""An SAE's side of ETSI GS QKD 014 V1.1.1: three methods over mutual TLS, suspicious of every answer.

Both key methods consume: whatever becomes of the answer, the key may be gone from the KME.  So no request is ever
sent a second time behind the caller's back; the one exception is an *answered* 503, by which the KME says that it did
nothing, and that once.  Redirects are not followed, proxies of the environment not used, bodies and times bounded.

What an answer means is decided by the class of its status, since texts differ from KME to KME:

=======================  ==============================  ==============================  ========================
status                   enc_keys                        dec_keys                        status
=======================  ==============================  ==============================  ========================
200                      keys, or ``BadAnswer``          keys, or ``BadAnswer``          answer, or ``BadAnswer``
400, 404, 410, 422       ``Exhausted`` [2]_              ``UnknownKeyID``                ``Unavailable`` answered
401, 403                 ``Unauthorized``                ``Unauthorized``                ``Unauthorized``
429, 503                 ``Unavailable`` answered [1]_   ``Unavailable`` answered        ``Unavailable`` answered
other 5xx                ``Unavailable``                 ``Unavailable``                 ``Unavailable``
redirects, others        ``BadAnswer``                   ``BadAnswer``                   ``BadAnswer``
no whole answer in time  ``Unavailable``                 ``Unavailable``                 ``Unavailable``
=======================  ==============================  ==============================  ========================

.. [1] ``Exhausted`` where the KME's ``details`` say ``qvpn_reason: exhausted``, ``NotOwner`` where they say
   ``not-owner``.
.. [2] ``Unauthorized`` where the KME's text says that it does not know an SAE: the standard gives 401 for that, some
   KMEs 400 or 404.  No later key would come, so it must not look like an empty stock.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

import aiohttp
from yarl import URL

from keysource.asking import no_answer, open_session, read_bounded
from keysource.base import KEY_BYTES, wipe
from keysource.errors import BadAnswer, Exhausted, KeySourceError, NotOwner, Unauthorized, Unavailable, UnknownKeyID
from keysource.etsi014.messages import (
    DeliveredKey,
    StatusAnswer,
    container_untrusted,
    error_details_untrusted,
    error_text_untrusted,
    normalise_key_id,
    status_untrusted,
)

Call = Literal["status", "enc_keys", "dec_keys"]
WHO = "the KME"
MAX_BODY = 1024 * 1024
TIMEOUT = 2.0
RETRY_DELAY = 0.2
_LONGEST_RETRY_AFTER = 1.0
_REFUSED = (400, 404, 410, 422)
_NO_SUCH_SAE = re.compile(
    r"\b(unknown|unregistered|unrecogni[sz]ed|invalid|no such) (\w+[ _])?sae"
    r"|sae.*\b(unknown|unregistered|not (be )?(found|known|registered|recogni[sz]ed|valid)|not exist)\b",
    re.IGNORECASE,
)
_ABOUT_KEYS = re.compile(r"\bkeys?\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes = field(repr=False)  # keys, where it answers a draw
    retry_after: float


class Etsi014Client:
    """Speaks to one KME as one SAE.

    ``timeout`` bounds each call in seconds, a retry included.  ``method`` is the HTTP method of the key calls: the
    standard has both for a single key, and some KMEs know only one.  Without ``keep_alive`` each call has its own
    connection: an idle connection that the KME closes at the wrong moment would cost a key.
    """

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext,
        *,
        method: Literal["get", "post"] = "post",
        timeout: float = TIMEOUT,
        max_body: int = MAX_BODY,
        retry_delay: float = RETRY_DELAY,
        keep_alive: bool = False,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self._tls = tls
        self._method = method
        self._timeout = timeout
        self._max_body = max_body
        self._retry_delay = retry_delay
        self._keep_alive = keep_alive
        self._sleep = sleep
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close all connections.  May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def status(self, slave_sae: str) -> StatusAnswer:
        """Clause 5.2; consumes nothing."""
        answer = await self._call("status", slave_sae, "GET", {}, None)
        return status_untrusted(answer.body)

    async def enc_keys(self, slave_sae: str, *, number: int = 1) -> list[DeliveredKey]:
        """Clause 5.3: at most ``number`` new keys of 256 bits, at least one.

        Raises:
            Exhausted, Unavailable, Unauthorized, BadAnswer: see the table of this module.
        """
        size = 8 * KEY_BYTES
        if self._method == "get":
            answer = await self._call("enc_keys", slave_sae, "GET", {"number": str(number), "size": str(size)}, None)
        else:
            answer = await self._call("enc_keys", slave_sae, "POST", {}, {"number": number, "size": size})
        keys = container_untrusted(answer.body, key_bytes=KEY_BYTES)
        if not keys:
            raise Exhausted(f"{self.url}: the KME has no key for {slave_sae}")
        if len(keys) > number:
            _wipe(keys)
            raise BadAnswer(f"{self.url}: {len(keys)} keys where {number} were asked for")
        return keys

    async def dec_keys(self, master_sae: str, key_ids: list[str]) -> list[DeliveredKey]:
        """Clause 5.4: the keys with exactly these key_IDs, in this order.

        Raises:
            UnknownKeyID: the KME does not have (all of) them; it may have consumed none.
            Unavailable, Unauthorized, BadAnswer: see the table of this module.
        """
        if self._method == "get" and len(key_ids) == 1:
            answer = await self._call("dec_keys", master_sae, "GET", {"key_ID": key_ids[0]}, None)
        else:
            body = {"key_IDs": [{"key_ID": key_id} for key_id in key_ids]}
            answer = await self._call("dec_keys", master_sae, "POST", {}, body)
        keys = container_untrusted(answer.body, key_bytes=KEY_BYTES)
        by_id = {key.key_id: key for key in keys}
        wanted = [normalise_key_id(key_id) for key_id in key_ids]
        if len(keys) != len(wanted) or set(by_id) != set(wanted):
            _wipe(keys)
            raise BadAnswer(f"{self.url}: the KME answered with other key_IDs than were asked for")
        return [by_id[key_id] for key_id in wanted]

    async def _call(
        self, call: Call, sae: str, http_method: str, query: dict[str, str], body: dict[str, Any] | None
    ) -> _Answer:
        url = URL(f"{self.url}/api/v1/keys/{quote(sae, safe='')}/{call}", encoded=True).with_query(query)
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._once(http_method, url, body)
                if answer.status == 503 and answer.retry_after <= _LONGEST_RETRY_AFTER:
                    await self._sleep(max(self._retry_delay, answer.retry_after))
                    answer = await self._once(http_method, url, body)
        except TimeoutError:
            raise Unavailable(f"{self.url}: no answer to {call} within {self._timeout:g} s") from None
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise Unavailable(f"{self.url}: {no_answer(error, WHO)}") from None
        if answer.status != 200:
            raise _refusal(self.url, call, answer)
        return answer

    async def _once(self, http_method: str, url: URL, body: dict[str, Any] | None) -> _Answer:
        session = self._opened()
        async with session.request(http_method, url, json=body, allow_redirects=False) as response:
            read = await read_bounded(response, self._max_body, self.url, WHO)
            return _Answer(response.status, read, _seconds(response.headers.get("Retry-After")))

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_session(self._tls, WHO, keep_alive=self._keep_alive)
        return self._session


def _refusal(url: str, call: Call, answer: _Answer) -> KeySourceError:
    """The exception for a status other than 200; see the table of this module."""
    text = error_text_untrusted(answer.body)
    said = f"{url}: {call} answered {answer.status}" + (f": {text}" if text else "")
    if answer.status in (401, 403):
        return Unauthorized(said)
    if answer.status in (429, 503):
        reason = error_details_untrusted(answer.body).get("qvpn_reason") if call == "enc_keys" else None
        if reason == "exhausted":
            return Exhausted(said, retry_after=answer.retry_after)
        if reason == "not-owner":
            return NotOwner(said)
        return Unavailable(said, answered=True, retry_after=answer.retry_after)
    if answer.status in _REFUSED:
        if call == "dec_keys":
            return UnknownKeyID(said)
        if call == "status":
            return Unavailable(said, answered=True)
        return Unauthorized(said) if _names_a_stranger(text) else Exhausted(said)
    if answer.status >= 500:
        return Unavailable(said)
    return BadAnswer(said)


def _names_a_stranger(text: str) -> bool:
    """Does the KME say that an SAE is unknown to it?  In doubt no: a text about keys is about the stock."""
    return _NO_SUCH_SAE.search(text) is not None and _ABOUT_KEYS.search(text) is None


def _seconds(header: str | None) -> float:
    """``Retry-After`` in seconds; its form with a date is not for KMEs and counts as nothing said."""
    if header is not None and header.isascii() and header.isdigit() and len(header) < 6:
        return float(header)
    return 0.0


def _wipe(keys: list[DeliveredKey]) -> None:
    for key in keys:
        wipe(key.material)
