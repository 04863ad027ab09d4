"""HTTPS where a question consumes a key: asked once, bounded answers, failures in the words of the system."""

from __future__ import annotations

import ssl

import aiohttp

from keysource.errors import BadAnswer, Unavailable


def open_session(tls: ssl.SSLContext, who: str, *, keep_alive: bool = False) -> aiohttp.ClientSession:
    """A session that keeps nothing between answers; ``who`` is the other end in error sentences, as "the KME"."""

    async def never_again(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        # aiohttp repeats a GET whose connection broke, as RFC 9110 allows for safe methods.  Here a GET consumes
        # keys, so the error leaves under a type that aiohttp does not repeat.
        try:
            return await handler(request)
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError):
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            raise Unavailable(f"{request.url.origin()}: {no_answer(error, who)}") from None

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=tls, force_close=not keep_alive),
        trust_env=False,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        middlewares=(never_again,),
    )


async def read_bounded(response: aiohttp.ClientResponse, most: int, url: str, who: str) -> bytes:
    """The body.  Raises :class:`BadAnswer` as soon as it is known to be longer than ``most`` bytes."""
    too_much = BadAnswer(f"{url}: {who}'s answer is longer than {most} bytes")
    if (response.content_length or 0) > most:
        raise too_much
    read = bytearray()
    async for chunk in response.content.iter_any():
        read += chunk
        if len(read) > most:
            raise too_much
    return bytes(read)


def no_answer(error: BaseException, who: str) -> str:
    """Why there is no answer."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        said = getattr(error.certificate_error, "verify_message", None) or type(error).__name__
        return f"{who}'s certificate is refused: {said}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return f"{who} closed the connection without an answer"
    reason = getattr(error, "reason", None)
    text = getattr(error, "strerror", None) or (reason if isinstance(reason, str) else None)
    if isinstance(error, aiohttp.ClientConnectorError):
        text = getattr(error.os_error, "strerror", None) or text
    return f"{who} does not answer ({text or type(error).__name__})"
