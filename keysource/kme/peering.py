"""KME to KME: what the two ends of a link tell each other before a key is issued.  Formats and the calling side.

Three methods over mutual TLS, caller and callee named by their certificates::

    POST {url}/kmapi/v2/reserve
    {"link": "left-right", "master_SAE_ID": "sae-alice", "slave_SAE_IDs": ["sae-bob"], "size": 256,
     "keys": [{"key_ID": "...", "block": 7, "token": "...", "more": [["...", 7]]}]}

    200  {"missing": ["..."], "first_block": 3, "next_block": 9}

A key is made of units of 256 bits: the one that names it, in ``block``, then ``more``, cut to ``size`` bits.  With
the answer, every key that has no ``missing`` unit is on the callee's disk as reserved for these SAEs.  A ``missing``
unit of a block below ``next_block`` will never be there; of a block from ``next_block`` on it may still come.  No
free unit of the caller is in any block below ``first_block``.  The same offer (same token) may come again: the answer
is the same as long as no slave fetched the key, which none can before the master has its key_ID.

Where one key goes to slaves at several KMEs, ``origin`` and ``hops`` say what all of them shall be told that it is.
``/kmapi/v2/deposit`` takes keys that another link made: ``{"key_ID", "token", "pad": [["...", 7]], "mac": ["...", 7],
"masked": base64, "tag": base64}``.  The key is ``masked`` XOR the units ``pad``, authentic under the unit ``mac``;
all of them are reserved, or where ``missing`` is not empty, none.

``/kmapi/v2/withdraw`` takes ``{"tokens": [...]}`` of keys that will never be issued and answers ``{"gone": 1}``.

Any other status means that nothing may be issued: 400 for a wrong request, 401 without body for a stranger, 403 where
these SAEs may not share keys here, 409 where the two ends disagree about the link, 503 while this end's device
reports an alarm.  Bodies of errors are those of ETSI GS QKD 014.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import ssl
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import aiohttp
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from keysource.base import Origin
from keysource.etsi014.messages import error_text_untrusted
from keysource.kme.auth import must_be
from keysource.kme.config import MAX_UNITS
from keysource.kme.records import UNIT_BITS, Deposit, Offer, Reservation, Terms, Unit
from keysource.settings import sentence

RESERVE = "/kmapi/v2/reserve"
DEPOSIT = "/kmapi/v2/deposit"
WITHDRAW = "/kmapi/v2/withdraw"
TIMEOUT = 0.8
MAX_KEYS = 1024
MAX_BODY = 4 * 1024 * 1024
_MAX_ANSWER = 1024 * 1024


class PeerUnavailable(Exception):
    """The other KME did not answer, or refused: nothing may be issued.  One sentence."""


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


def _unit(value: object) -> object:
    return {"key_id": value[0], "block": value[1]} if isinstance(value, list) and len(value) == 2 else value


class _Unit(_Model):
    key_id: str = Field(min_length=1, max_length=64)
    block: int = Field(ge=0, lt=2**63)

    def unit(self) -> Unit:
        return Unit(self.key_id, self.block)


_SomeUnit = Annotated[_Unit, BeforeValidator(_unit)]
_Token = Annotated[str, Field(min_length=16, max_length=64, repr=False)]


class OfferedKey(_Model):
    key_ID: str = Field(min_length=1, max_length=64)
    block: int = Field(ge=0, lt=2**63)
    token: _Token
    more: list[_SomeUnit] = Field(default_factory=list, max_length=MAX_UNITS)


class DepositedKey(_Model):
    key_ID: str = Field(min_length=1, max_length=64)
    token: _Token
    pad: list[_SomeUnit] = Field(min_length=1, max_length=MAX_UNITS)
    mac: _SomeUnit
    masked: str = Field(repr=False)
    tag: str = Field(repr=False)


class _Request(_Model):
    link: str
    master_SAE_ID: str
    slave_SAE_IDs: list[str] = Field(min_length=1, max_length=65)
    size: int = Field(default=UNIT_BITS, ge=8, multiple_of=8, le=65_536)
    origin: Annotated[Origin | None, Field(strict=False)] = None
    hops: int = Field(default=0, ge=0, le=255)

    def terms(self) -> Terms:
        return Terms(self.master_SAE_ID, tuple(self.slave_SAE_IDs), self.size, self.origin, self.hops)


class ReserveRequest(_Request):
    keys: list[OfferedKey] = Field(min_length=1, max_length=MAX_KEYS)

    def offers(self) -> list[Offer]:
        """Raises ``ValueError``: a key of another number of units than its size has, or a unit that stands twice."""
        keys = [Offer(key.key_ID, key.block, key.token, tuple(unit.unit() for unit in key.more)) for key in self.keys]
        _once([unit.key_id for key in keys for unit in key.units])
        if any(len(key.units) != self.terms().units for key in keys):
            raise ValueError("keys: a key has other units than its size asks for")
        return keys


class DepositRequest(_Request):
    origin: Annotated[Origin, Field(strict=False)]
    keys: list[DepositedKey] = Field(min_length=1, max_length=MAX_KEYS)

    def deposits(self) -> list[Deposit]:
        """Raises ``ValueError``, one sentence."""
        try:
            keys = [
                Deposit(
                    key.key_ID,
                    key.token,
                    tuple(unit.unit() for unit in key.pad),
                    key.mac.unit(),
                    base64.b64decode(key.masked, validate=True),
                    base64.b64decode(key.tag, validate=True),
                )
                for key in self.keys
            ]
        except binascii.Error:
            raise ValueError("keys: something is not base64") from None
        _once([unit.key_id for key in keys for unit in key.units])
        if any(len(key.pad) != self.terms().units or len(key.masked) != self.size // 8 for key in keys):
            raise ValueError("keys: a key has another size than it says")
        return keys


class WithdrawRequest(_Model):
    tokens: list[Annotated[str, Field(min_length=16, max_length=64)]] = Field(
        min_length=1, max_length=MAX_KEYS, repr=False
    )


class ReserveAnswer(_Model):
    missing: list[str]
    first_block: int = Field(ge=0)
    next_block: int = Field(ge=0)


def _once(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError("keys: a unit stands twice")


_M = TypeVar("_M", bound=BaseModel)


def request_untrusted(model: type[_M], body: bytes) -> _M:
    """Raises ``ValueError``, one sentence."""
    try:
        return model.model_validate(json.loads(body))
    except ValidationError as error:
        raise ValueError(sentence(error)) from None
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None


class PeerClient:
    """Calls one other KME.  Connections are kept; a call is repeated once where an idle one had died, which is safe
    because an offer may come twice."""

    def __init__(self, kme_id: str, url: str, tls: ssl.SSLContext, *, timeout: float = TIMEOUT) -> None:
        """``tls`` is this client's alone: from now on it believes only the KME of that name."""
        self.kme_id, self.url = kme_id, url
        self._tls, self._timeout = must_be(tls, kme_id), timeout
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def renew(self, tls: ssl.SSLContext) -> None:
        """Other certificates from now on; calls under way end as they began."""
        old, self._session = self._session, None
        self._tls = must_be(tls, self.kme_id)
        if old is not None:
            await asyncio.sleep(self._timeout)
            await old.close()

    async def reserve(self, link: str, terms: Terms, offers: Sequence[Offer]) -> Reservation:
        """Raises :class:`PeerUnavailable`."""
        keys: list[dict[str, Any]] = [
            {"key_ID": offer.key_id, "block": offer.block, "token": offer.token}
            | ({"more": offer.more} if offer.more else {})
            for offer in offers
        ]
        read = await self._call(RESERVE, _terms(link, terms) | {"keys": keys})
        return self._answer(read, [unit.key_id for offer in offers for unit in offer.units])

    async def deposit(self, link: str, terms: Terms, deposits: Sequence[Deposit]) -> Reservation:
        """Raises :class:`PeerUnavailable`."""
        keys = [
            {
                "key_ID": deposit.key_id,
                "token": deposit.token,
                "pad": deposit.pad,
                "mac": deposit.mac,
                "masked": base64.b64encode(deposit.masked).decode(),
                "tag": base64.b64encode(deposit.tag).decode(),
            }
            for deposit in deposits
        ]
        read = await self._call(DEPOSIT, _terms(link, terms) | {"keys": keys})
        return self._answer(read, [unit.key_id for deposit in deposits for unit in deposit.units])

    async def withdraw(self, tokens: Sequence[str]) -> None:
        """Raises :class:`PeerUnavailable`; then the keys go when their time is over."""
        await self._call(WITHDRAW, {"tokens": list(tokens)})

    async def _call(self, path: str, body: object) -> bytes:
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    status, read = await self._post(path, body)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                    if isinstance(error, aiohttp.ClientConnectorError):
                        raise
                    status, read = await self._post(path, body)
        except TimeoutError:
            raise PeerUnavailable(f"KME {self.kme_id!r} gave no answer within {self._timeout:g} s") from None
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise PeerUnavailable(f"KME {self.kme_id!r} does not answer ({type(error).__name__})") from None
        if status != 200:
            raise PeerUnavailable(
                f"KME {self.kme_id!r} answered {status}: {error_text_untrusted(read) or 'no reason'}"
            )
        return read

    async def _post(self, path: str, body: object) -> tuple[int, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls, limit=16),
                trust_env=False,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        async with self._session.post(self.url + path, json=body, allow_redirects=False) as response:
            read = await response.content.read(_MAX_ANSWER + 1)
            while len(read) <= _MAX_ANSWER and not response.content.at_eof():
                read += await response.content.read(_MAX_ANSWER + 1 - len(read))
            return response.status, read

    def _answer(self, read: bytes, units: Sequence[str]) -> Reservation:
        try:
            answer = ReserveAnswer.model_validate_json(read)
        except ValidationError:
            raise PeerUnavailable(f"KME {self.kme_id!r} answered something that is no reservation") from None
        if not set(answer.missing) <= set(units) or answer.first_block > answer.next_block:
            raise PeerUnavailable(f"KME {self.kme_id!r} answered something that does not fit the offer")
        return Reservation(answer.missing, answer.first_block, answer.next_block)


def _terms(link: str, terms: Terms) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "link": link,
        "master_SAE_ID": terms.master,
        "slave_SAE_IDs": list(terms.slaves),
        "size": terms.size,
    }
    return fields if terms.origin is None else fields | {"origin": terms.origin.value, "hops": terms.hops}
