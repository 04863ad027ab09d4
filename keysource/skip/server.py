"""A key provider's side of SKIP (``messages``) as an aiohttp application over any :class:`KeyProvider`.

Whoever mounts it brings TLS (1.3, client certificates required) and says who calls::

    application = skip_application(provider, identify=caller)

Answers: 200; 400 for what is malformed, an unknown keyId or remote system; 401 for a caller without a name that the
provider knows; 404 for another path; 405 for another method; 500 where a key could not be read or erased; 503 where
there is none now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from keysource.base import KEY_BYTES, Origin, wipe
from keysource.errors import BadAnswer
from keysource.skip.messages import (
    DEFAULT_KEY_BITS,
    HOPS_HEADER,
    ORIGIN_HEADER,
    Capabilities,
    SkipKey,
    key_id_untrusted,
)

MOST_ENTROPY_BITS = 8192
RETRY_AFTER = 2
Identify = Callable[[web.Request], str | None]
"""The name in the client's certificate; None where there is none."""


class Refused(Exception):
    """An answer other than 200, with a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Issued:
    """A key on its way out; the server wipes it."""

    key: SkipKey
    origin: Origin
    hops: int = 0


class KeyProvider(Protocol):
    """What stands behind the interface.  All raise :class:`Refused`: 401 for a caller it does not know, 400 for a
    remote system or keyId it does not know, 503 where it has no key now, 500 where its store fails."""

    def capabilities(self, caller: str) -> Capabilities:
        """What this caller may ask for."""

    async def new_key(self, caller: str, remote_system: str) -> Issued:
        """A key of 256 bits that nobody had before, already safe for the remote system to fetch."""

    async def key(self, caller: str, remote_system: str, key_id: str) -> Issued:
        """The key that the remote system was given for this caller; it is gone afterwards.  ``key_id`` is
        lower-case hexadecimal."""


def skip_application(provider: KeyProvider, identify: Identify) -> web.Application:
    """All four requests; everything else is 404 or 405."""
    return _Skip(provider, identify).application()


class _Skip:
    def __init__(self, provider: KeyProvider, identify: Identify) -> None:
        self._provider, self._identify = provider, identify

    def application(self) -> web.Application:
        application = web.Application(client_max_size=1024, middlewares=[_as_json])
        for path, handler in (
            ("/capabilities", self._capabilities),
            ("/key", self._new_key),
            ("/key/{key_id}", self._key),
            ("/entropy", self._entropy),
        ):
            application.router.add_get(path, handler, allow_head=False)
        return application

    async def _capabilities(self, request: web.Request) -> web.Response:
        caller = self._caller(request)
        _query(request)
        return _answer(self._provider.capabilities(caller).to_json())

    async def _new_key(self, request: web.Request) -> web.Response:
        caller = self._caller(request)
        query = _query(request, "remotesystemid", "size")
        bits = _number(query, "size", DEFAULT_KEY_BITS)
        if bits != 8 * KEY_BYTES:
            raise Refused(400, f"size: only keys of {8 * KEY_BYTES} bits are served")
        return _key_answer(await self._provider.new_key(caller, self._remote(caller, query)))

    async def _key(self, request: web.Request) -> web.Response:
        caller = self._caller(request)
        remote = self._remote(caller, _query(request, "remotesystemid"))
        try:
            key_id = key_id_untrusted(request.match_info["key_id"])
        except BadAnswer as error:
            raise Refused(400, str(error)) from None
        return _key_answer(await self._provider.key(caller, remote, key_id))

    async def _entropy(self, request: web.Request) -> web.Response:
        caller = self._caller(request)
        bits = _number(_query(request, "minentropy"), "minentropy", DEFAULT_KEY_BITS)
        if not self._provider.capabilities(caller).entropy:
            raise Refused(503, "this key provider gives no entropy")
        if not 1 <= bits <= MOST_ENTROPY_BITS:
            raise Refused(400, f"minentropy: 1 to {MOST_ENTROPY_BITS} bits are served")
        count = -(-bits // 8)
        return _answer(json.dumps({"randomStr": os.urandom(count).hex(), "minentropy": 8 * count}).encode())

    def _caller(self, request: web.Request) -> str:
        name = self._identify(request)
        if name is None:
            raise Refused(401, "the certificate names no system")
        return name

    def _remote(self, caller: str, query: Mapping[str, str]) -> str:
        remote = query.get("remotesystemid")
        if remote is None or not self._provider.capabilities(caller).knows(remote):
            raise Refused(400, "remoteSystemID: is missing, or no system that shares keys with this one")
        return remote


@web.middleware
async def _as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as error:
        return _error(error.status, str(error))
    except web.HTTPException as error:
        return _error(error.status, error.reason)
    except Exception:  # nothing of what was in hand may show
        return _error(500, "the key provider failed")


def _error(status: int, message: str) -> web.Response:
    headers = {"Retry-After": str(RETRY_AFTER)} if status == 503 else {"Allow": "GET"} if status == 405 else None
    return web.json_response({"message": message}, status=status, headers=headers)


def _answer(body: bytes, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=body, content_type="application/json", headers={"Cache-Control": "no-store", **(headers or {})}
    )


def _key_answer(issued: Issued) -> web.Response:
    body = issued.key.to_json()
    wipe(issued.key.material)
    answer = _answer(bytes(body), {ORIGIN_HEADER: issued.origin.value, HOPS_HEADER: str(issued.hops)})
    wipe(body)
    return answer


def _query(request: web.Request, *names: str) -> dict[str, str]:
    """The query with lower-case names.  Raises :class:`Refused` for an unknown name or one given twice."""
    found: dict[str, str] = {}
    for name, value in request.query.items():
        if name.lower() not in names or name.lower() in found:
            raise Refused(400, "the query has a name that does not belong here, or one twice")
        found[name.lower()] = value
    return found


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Refused(400, f"{name}: a number is expected")
    return int(text)
