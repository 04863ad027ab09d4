"""An SAE that shows what came over the wire: nothing is forgiven and nothing is repeated behind the caller's back.

Every answer is noted in a :class:`Notebook`, so that what must hold for all of them can be asked at the end.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from keysource.asking import no_answer, open_session, read_bounded
from keysource.errors import KeySourceError
from keysource.kme.conform.report import Failed, Skipped, plain

TIMEOUT = 20.0
_MAX_BODY = 4 * 1024 * 1024
_TRIES, _PAUSE = 8, 0.5
_WHO = "the KME"


class NoAnswer(Exception):
    """No connection, or no whole answer over it; one sentence."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it came."""

    asked: str
    """Method and last part of the path, for sentences."""
    status: int
    content_type: str
    body: bytes = field(repr=False)

    def object(self) -> dict[str, Any]:
        """The body as a JSON object.  Raises :class:`Failed`."""
        try:
            fields = json.loads(self.body.decode())
        except (ValueError, RecursionError):
            raise Failed(f"{self.asked}: the body of the {self.status} is not JSON in UTF-8") from None
        if not isinstance(fields, dict):
            raise Failed(f"{self.asked}: the body of the {self.status} is not a JSON object")
        return fields

    @property
    def message(self) -> str:
        """Of an Error; empty where there is none."""
        try:
            return str(self.object().get("message", ""))
        except Failed:
            return ""

    def told(self) -> str:
        """For a sentence."""
        return f"{self.asked}: {self.status}" + (f" {plain(self.message, 80)!r}" if self.message else "")


@dataclass(slots=True)
class Notebook:
    """All answers of an examination, without what may have keys in it."""

    answers: list[Answer] = field(default_factory=list)

    def note(self, answer: Answer) -> None:
        self.answers.append(replace(answer, body=b"") if answer.status == 200 else answer)


class Caller:
    """One identity at one KME.  ``sae`` is its SAE ID."""

    def __init__(self, url: str, sae: str, make_context: Callable[[], ssl.SSLContext], notebook: Notebook) -> None:
        """``make_context`` gives a TLS context with this identity, another one each time."""
        self.url, self.sae = url.rstrip("/"), sae
        self.make_context, self.context = make_context, make_context()
        self._notebook = notebook
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def call(
        self,
        method: str,
        other: str,
        call: str,
        *,
        query: str = "",
        body: object = None,
        raw: bytes | None = None,
        encoded: str | None = None,
    ) -> Answer:
        """One request.  ``other`` is the SAE ID of the path, or ``encoded`` that as it shall stand there.

        Raises:
            NoAnswer: the connection failed, broke, or took too long.
        """
        part = quote(other, safe="") if encoded is None else encoded
        url = URL(f"{self.url}/api/v1/keys/{part}/{call}" + (f"?{query}" if query else ""), encoded=True)
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        if self._session is None:
            self._session = open_session(self.context, _WHO, keep_alive=True)
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                self._session.request(method, url, data=data, headers=headers, allow_redirects=False) as response,
            ):
                read = await read_bounded(response, _MAX_BODY, self.url, _WHO)
                kind = response.headers.get("Content-Type", "")
                answer = Answer(f"{method} {call}", response.status, kind, read)
        except TimeoutError:
            raise NoAnswer(f"{method} {call}: no answer within {TIMEOUT:g} s") from None
        except KeySourceError as error:
            raise NoAnswer(f"{method} {call}: {error}") from None
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise NoAnswer(f"{method} {call}: {no_answer(error, _WHO)}") from None
        self._notebook.note(answer)
        return answer

    async def patiently(self, method: str, other: str, call: str, **how: Any) -> Answer:
        """The same; a 503 is asked again a few times, since it says that nothing was done.

        Raises:
            Skipped: only 503.
        """
        for _ in range(_TRIES):
            answer = await self.call(method, other, call, **how)
            if answer.status != 503:
                return answer
            await asyncio.sleep(_PAUSE)
        raise Skipped(f"only 503 ({plain(answer.message, 80)!r}): are there keys for this pair?")
