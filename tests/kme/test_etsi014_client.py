"""The client against a KME that breaks every rule: a real TLS server of this test, one misdeed each."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from aiohttp import web

from keysource import tls
from keysource.errors import (
    BadAnswer,
    Exhausted,
    KeySourceError,
    NotOwner,
    Unauthorized,
    Unavailable,
    UnknownKeyID,
)
from keysource.etsi014.client import Etsi014Client
from keysource.kme.pki import Authority

KEY = bytes(range(32))
KEY_ID = "bc490419-7d60-487f-adc1-4ddcc177c139"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def container(key: bytes = KEY, key_id: str = KEY_ID, count: int = 1) -> dict[str, object]:
    return {"keys": [{"key_ID": key_id, "key": base64.b64encode(key).decode()}] * count}


class Mock:
    """A TLS server with one handler for everything; counts what reaches it."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.handler: Handler = self.refuse
        self.clients: list[Etsi014Client] = []
        self.waits: list[float] = []

    async def refuse(self, request: web.Request) -> web.StreamResponse:
        raise AssertionError("no handler")

    async def start(self, hosts: tuple[str, ...] = ("127.0.0.1",), maximum: ssl.TLSVersion | None = None) -> None:
        credential = self.authority.kme("kme", hosts)
        context = tls.server_context(self.authority.certificate, credential.certificate, credential.private_key)
        if maximum:
            context.maximum_version = maximum
        application = web.Application()
        application.router.add_route("*", "/{tail:.*}", self._handle)
        self.runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0, ssl_context=context).start()
        self.url = f"https://127.0.0.1:{self.runner.addresses[0][1]}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.raw_path))
        self.bodies.append(await request.read())
        return await self.handler(request)

    def answers(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def handler(request: web.Request) -> web.StreamResponse:
            return web.Response(status=status, body=raw, headers=headers)

        self.handler = handler

    def client(self, **options: object) -> Etsi014Client:
        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        credential = self.authority.sae("sae-a")
        context = tls.client_context(self.authority.certificate, credential.certificate, credential.private_key)
        self.clients.append(Etsi014Client(self.url, context, **{"sleep": sleep, **options}))  # type: ignore[arg-type]
        return self.clients[-1]

    async def aclose(self) -> None:
        for client in self.clients:
            await client.aclose()
        await self.runner.cleanup()


@pytest_asyncio.fixture
async def mock() -> AsyncIterator[Mock]:
    mock = Mock(Authority("test CA"))
    await mock.start()
    try:
        yield mock
    finally:
        await mock.aclose()


async def fails(call: Awaitable[object]) -> KeySourceError:
    """The error, once it is certain that it hides the key."""
    try:
        await call
    except KeySourceError as error:
        assert base64.b64encode(KEY).decode() not in str(error)
        return error
    raise AssertionError("no error")


# What is sent


async def test_requests_have_the_form_of_clause_5(mock):
    mock.answers(200, container())
    await mock.client().enc_keys("sae b/ä%1")
    await mock.client().dec_keys("sae-a", [KEY_ID])
    await mock.client(method="get").enc_keys("sae-b")
    await mock.client(method="get").dec_keys("sae-a", [KEY_ID])
    mock.answers(200, {})
    await mock.client().status("sae-b")
    assert mock.requests == [
        ("POST", "/api/v1/keys/sae%20b%2F%C3%A4%251/enc_keys"),
        ("POST", "/api/v1/keys/sae-a/dec_keys"),
        ("GET", "/api/v1/keys/sae-b/enc_keys?number=1&size=256"),
        ("GET", f"/api/v1/keys/sae-a/dec_keys?key_ID={KEY_ID}"),
        ("GET", "/api/v1/keys/sae-b/status"),
    ]
    assert json.loads(mock.bodies[0]) == {"number": 1, "size": 256}
    assert json.loads(mock.bodies[1]) == {"key_IDs": [{"key_ID": KEY_ID}]}


async def test_a_good_answer_is_a_bytearray(mock):
    mock.answers(200, container())
    [key] = await mock.client().enc_keys("sae-b")
    assert (key.key_id, bytes(key.material), type(key.material)) == (KEY_ID, KEY, bytearray)


async def test_several_keys_come_in_the_order_asked_for(mock):
    other = "0a782fb5-3434-48fe-aa4d-14f41d46cf92"
    both = {"keys": [*container(KEY[::-1], other)["keys"], *container(KEY, KEY_ID.upper())["keys"]]}
    mock.answers(200, both)
    keys = await mock.client().dec_keys("sae-a", [KEY_ID, other])
    assert [bytes(key.material) for key in keys] == [KEY, KEY[::-1]]


# What an answer means: the table of the client's docstring


@pytest.mark.parametrize(
    ("status", "enc", "dec", "sta"),
    [
        (400, Exhausted, UnknownKeyID, Unavailable),
        (404, Exhausted, UnknownKeyID, Unavailable),
        (410, Exhausted, UnknownKeyID, Unavailable),
        (422, Exhausted, UnknownKeyID, Unavailable),
        (401, Unauthorized, Unauthorized, Unauthorized),
        (403, Unauthorized, Unauthorized, Unauthorized),
        (429, Unavailable, Unavailable, Unavailable),
        (503, Unavailable, Unavailable, Unavailable),
        (500, Unavailable, Unavailable, Unavailable),
        (502, Unavailable, Unavailable, Unavailable),
        (418, BadAnswer, BadAnswer, BadAnswer),
        (204, BadAnswer, BadAnswer, BadAnswer),
    ],
)
@pytest.mark.parametrize("body", [b'{"message": "said so"}', b'{"detail": "said so"}', b"<html>said so</html>", b""])
async def test_every_status_has_its_error_whatever_the_body(mock, status, enc, dec, sta, body):
    mock.answers(status, body)
    client = mock.client()
    calls = (client.enc_keys("b"), client.dec_keys("a", [KEY_ID]), client.status("b"))
    for expected, call in zip((enc, dec, sta), calls, strict=True):
        error = await fails(call)
        assert type(error) is expected
        assert f"answered {status}" in str(error)
        assert ("said so" in str(error)) is (body.startswith(b"{") and status != 204)
        if type(error) is Unavailable:
            assert error.answered is (status in (400, 404, 410, 422, 429, 503))


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize(
    ("text", "stranger"),
    [
        ("Unknown SAE", True),
        ("unknown slave_SAE_ID", True),
        ("invalid SAE ID", True),
        ("SAE sae-b is not registered at this KME", True),
        ("slave SAE ID not found", True),
        ("the SAE does not exist", True),
        ("SAE could not be found", True),
        ("no key for SAE sae-b", False),
        ("SAE sae-b: key not found", False),
        ("insufficient keys, unknown SAE demand", False),
        ("link to the KME of the SAE is not ready", False),
        ("not found", False),
        ("", False),
    ],
)
async def test_an_sae_that_the_kme_does_not_know_is_no_empty_stock(mock, status, text, stranger):
    """KMEs that answer 400 or 404 where the standard has 401: the operator's mistake must not look like patience."""
    mock.answers(status, {"message": text})
    error = await fails(mock.client().enc_keys("b"))
    assert type(error) is (Unauthorized if stranger else Exhausted)
    assert text in str(error)


async def test_our_own_kme_says_why_there_is_no_key(mock):
    mock.answers(503, {"message": "m", "details": [{"qvpn_reason": "exhausted"}]}, {"Retry-After": "7"})
    error = await fails(mock.client().enc_keys("b"))
    assert isinstance(error, Exhausted)
    assert error.retry_after == 7.0
    mock.answers(503, {"message": "m", "details": [{"qvpn_reason": "not-owner"}]}, {"Retry-After": "7"})
    assert type(await fails(mock.client().enc_keys("b"))) is NotOwner


# Never twice


async def test_an_answered_503_is_tried_once_more_and_only_once(mock):
    mock.answers(503, b"")
    await fails(mock.client(retry_delay=0.25).enc_keys("b"))
    assert len(mock.requests) == 2
    assert mock.waits == [0.25]


async def test_the_second_try_waits_as_long_as_the_kme_says(mock):
    mock.answers(503, b"", {"Retry-After": "1"})
    await fails(mock.client(retry_delay=0.25).enc_keys("b"))
    assert mock.waits == [1.0]


async def test_the_second_try_may_succeed(mock):
    async def handler(request: web.Request) -> web.StreamResponse:
        if len(mock.requests) == 1:
            return web.Response(status=503)
        return web.json_response(container())

    mock.handler = handler
    [key] = await mock.client().enc_keys("b")
    assert key.key_id == KEY_ID
    assert len(mock.requests) == 2


async def test_a_kme_that_wants_to_be_left_alone_is(mock):
    mock.answers(503, b"", {"Retry-After": "30"})
    error = await fails(mock.client().enc_keys("b"))
    assert isinstance(error, Unavailable)
    assert (error.answered, error.retry_after) == (True, 30.0)
    assert len(mock.requests) == 1


@pytest.mark.parametrize("keep_alive", [False, True])
@pytest.mark.parametrize("method", ["get", "post"])
async def test_a_connection_cut_before_the_answer_repeats_nothing(mock, method, keep_alive):
    """aiohttp by itself repeats a GET on a broken connection: each repetition would consume a key."""
    client = mock.client(method=method, keep_alive=keep_alive)
    mock.answers(200, container())
    await client.enc_keys("b")

    async def cut(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    mock.handler = cut
    before = len(mock.requests)
    for call in (client.enc_keys("b"), client.dec_keys("a", [KEY_ID])):
        error = await fails(call)
        assert type(error) is Unavailable
        assert not error.answered
    assert len(mock.requests) == before + 2


async def test_an_answer_cut_in_the_middle_is_no_answer(mock):
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"keys": [')
        assert request.transport is not None
        request.transport.abort()
        return response

    mock.handler = half
    error = await fails(mock.client().enc_keys("b"))
    assert isinstance(error, Unavailable)
    assert not error.answered
    assert len(mock.requests) == 1


# Bounds


async def test_a_slow_kme_is_given_up_in_time(mock):
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    mock.handler = slow
    start = asyncio.get_running_loop().time()
    error = await fails(mock.client(timeout=0.3).enc_keys("b"))
    assert asyncio.get_running_loop().time() - start < 2
    assert isinstance(error, Unavailable)
    assert not error.answered
    assert len(mock.requests) == 1


async def test_a_kme_that_dribbles_is_given_up_in_time(mock):
    async def dribble(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.02)

    mock.handler = dribble
    assert type(await fails(mock.client(timeout=0.3).enc_keys("b"))) is Unavailable


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("status", [200, 400])
async def test_an_oversize_body_is_not_read(mock, chunked, status):
    async def large(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        if not chunked:
            response.content_length = 3 * 1024 * 1024
        await response.prepare(request)
        for _ in range(48):
            await response.write(bytes(64 * 1024))
        return response

    mock.handler = large
    error = await fails(mock.client().enc_keys("b"))
    assert isinstance(error, BadAnswer)
    assert "longer than 1048576" in str(error)


async def test_a_compressed_bomb_stays_compressed(mock):
    async def bomb(request: web.Request) -> web.StreamResponse:
        response = web.json_response({"keys": [], "x": " " * 30_000_000})
        response.enable_compression(web.ContentCoding.gzip)
        return response

    mock.handler = bomb
    assert type(await fails(mock.client().enc_keys("b"))) is BadAnswer


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_not_followed(mock, status):
    mock.answers(status, b"", {"Location": "/api/v1/keys/b/enc_keys2"})
    assert type(await fails(mock.client().enc_keys("b"))) is BadAnswer
    assert type(await fails(mock.client(method="get").enc_keys("b"))) is BadAnswer
    assert len(mock.requests) == 2


async def test_proxies_of_the_environment_are_not_used(mock, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    mock.answers(200, container())
    assert await mock.client().enc_keys("b")


# Answers that are wrong


@pytest.mark.parametrize(
    "body",
    [
        container(KEY[:16]),
        container(KEY + KEY),
        container(count=2),
        {"keys": None},
        b"<html>200 OK</html>",
        b"",
        b"[" * 50_000,
    ],
    ids=["short", "long", "two keys for one", "null", "html", "empty", "deep"],
)
async def test_wrong_answers_are_bad_answers(mock, body):
    mock.answers(200, body)
    assert type(await fails(mock.client().enc_keys("b"))) is BadAnswer


async def test_no_key_in_a_200_is_exhausted(mock):
    mock.answers(200, {"keys": []})
    assert type(await fails(mock.client().enc_keys("b"))) is Exhausted


async def test_another_key_id_than_asked_for_is_refused(mock):
    mock.answers(200, container(key_id="0a782fb5-3434-48fe-aa4d-14f41d46cf92"))
    assert type(await fails(mock.client().dec_keys("a", [KEY_ID]))) is BadAnswer
    mock.answers(200, container(key_id=KEY_ID.upper()))
    assert await mock.client().dec_keys("a", [KEY_ID])


# TLS


async def test_only_the_configured_authority_is_believed(mock):
    mock.answers(200, container())
    stranger = Authority("another CA")
    credential = stranger.sae("sae-a")
    context = tls.client_context(stranger.certificate, credential.certificate, credential.private_key)
    client = Etsi014Client(mock.url, context)
    error = await fails(client.enc_keys("b"))
    await client.aclose()
    assert isinstance(error, Unavailable)
    assert "certificate" in str(error)
    assert not mock.requests


async def test_the_servers_name_is_checked():
    mock = Mock(Authority("test CA"))
    await mock.start(hosts=("kme.example", "127.0.0.2"))
    mock.answers(200, container())
    error = await fails(mock.client().enc_keys("b"))
    await mock.aclose()
    assert "127.0.0.1" in str(error)
    assert not mock.requests


async def test_a_client_without_certificate_gets_nothing(mock):
    mock.answers(200, container())
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(cadata=mock.authority.certificate.decode())
    client = Etsi014Client(mock.url, bare)
    assert isinstance(await fails(client.enc_keys("b")), Unavailable)
    await client.aclose()
    assert not mock.requests


async def test_tls_1_2_is_spoken_with_aead_only():
    mock = Mock(Authority("test CA"))
    await mock.start(maximum=ssl.TLSVersion.TLSv1_2)
    seen: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        connection = request.get_extra_info("ssl_object")
        seen.extend([connection.version(), connection.cipher()[0]])
        return web.json_response(container())

    mock.handler = handler
    await mock.client().enc_keys("b")
    await mock.aclose()
    assert seen[0] == "TLSv1.2"
    assert "GCM" in seen[1] or "CHACHA20" in seen[1]


def test_contexts_allow_nothing_old():
    authority = Authority("test CA")
    credential = authority.kme("kme", ["127.0.0.1"])
    for make in (tls.client_context, tls.server_context):
        context = make(authority.certificate, credential.certificate, credential.private_key)
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED
        names = {cipher["name"] for cipher in context.get_ciphers()}
        assert names
        assert all(("GCM" in name or "CHACHA20" in name) and not name.startswith("AES") for name in names), names


@pytest.mark.parametrize(
    ("ca", "certificate", "key", "says"),
    [
        (b"x", None, None, "CA"),
        (b"\xff", None, None, "CA"),
        (None, b"x", None, "certificate and private key"),
        (None, None, b"x", "certificate and private key"),
        (None, None, "other", "key values mismatch"),
        (None, None, "encrypted", "encrypted"),
    ],
)
def test_bad_pem_is_one_sentence(ca, certificate, key, says):
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    authority = Authority("test CA")
    good, other = authority.sae("a"), authority.sae("b")
    if key == "other":
        key = other.private_key
    elif key == "encrypted":
        loaded = load_pem_private_key(good.private_key, None)
        key = loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    with pytest.raises(ValueError, match=says) as caught:
        tls.client_context(ca or authority.certificate, certificate or good.certificate, key or good.private_key)
    assert "\n" not in str(caught.value)
