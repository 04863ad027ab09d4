"""SKIP, both sides: the draft's table of answers, spellings of the wild, a provider that breaks every rule."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from keysource import tls
from keysource.base import KEY_BYTES, Hop, Origin, SourceContext
from keysource.errors import (
    BadAnswer,
    BadSettings,
    Exhausted,
    KeySourceError,
    RepeatedKey,
    Unauthorized,
    Unavailable,
    UnknownKeyID,
)
from keysource.kme.auth import certificate_of, common_name
from keysource.kme.pki import Authority
from keysource.skip.messages import Capabilities, SkipKey, capabilities_untrusted, key_untrusted
from keysource.skip.server import Issued, Refused, skip_application
from keysource.skip.source import SkipSource

AUTHORITY = Authority("skip test CA")


def caller(request: web.Request) -> str | None:
    return common_name(certificate_of(request))


KEY = bytes(range(32))
KEY_ID = "0a" * 16
ASKED = web.AppKey("asked", list)


@asynccontextmanager
async def serving(application: web.Application, maximum: ssl.TLSVersion | None = None) -> AsyncIterator[str]:
    credential = AUTHORITY.kme("provider", ["127.0.0.1"])
    context = tls.server_context(AUTHORITY.certificate, credential.certificate, credential.private_key)
    if maximum:
        context.maximum_version = maximum
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def files(folder: Path, name: str = "left") -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    if not (folder / f"{name}.key").exists():
        AUTHORITY.sae(name).write(folder, name)
        (folder / "ca.crt").write_bytes(AUTHORITY.certificate)
    return {"sae": name, "ca": "ca.crt", "certificate": f"{name}.crt", "private_key": f"{name}.key"}


@asynccontextmanager
async def source(folder: Path, url: str, **more: object) -> AsyncIterator[SkipSource]:
    made = SkipSource({"url": url, **files(folder), **more}, SourceContext("skip", folder, folder, "left"))
    await made.start()
    try:
        yield made
    finally:
        await made.aclose()


class Provider:
    """Knows "left", which shares with "right"."""

    def __init__(self) -> None:
        self.keys: dict[tuple[str, str, str], bytes] = {}
        self.fail: Exception | None = None

    def capabilities(self, caller: str) -> Capabilities:
        if caller not in ("left", "right"):
            raise Refused(401, "no such system")
        return Capabilities(caller, ("right", "branch-*") if caller == "left" else ("left",), entropy=True)

    async def new_key(self, caller: str, remote_system: str) -> Issued:
        if self.fail:
            raise self.fail
        key_id, key = os.urandom(16).hex(), os.urandom(32)
        self.keys[caller, remote_system, key_id] = key
        return Issued(SkipKey(key_id, bytearray(key)), Origin.SIMULATED, 2)

    async def key(self, caller: str, remote_system: str, key_id: str) -> Issued:
        key = self.keys.pop((remote_system, caller, key_id), None)
        if key is None:
            raise Refused(400, "no such keyId")
        return Issued(SkipKey(key_id, bytearray(key)), Origin.SIMULATED, 2)


async def get(url: str, path: str, name: str = "left", method: str = "GET") -> tuple[int, dict[str, object]]:
    credential = AUTHORITY.sae(name)
    context = tls.client_context(AUTHORITY.certificate, credential.certificate, credential.private_key)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.request(method, url + path) as answer,
    ):
        body = await answer.read()
        return answer.status, json.loads(body) if body else {}


async def test_the_server_answers_as_the_draft_says() -> None:
    async with serving(skip_application(Provider(), caller)) as url:
        status, said = await get(url, "/capabilities")
        assert (status, said["localSystemID"], said["remoteSystemID"]) == (200, "left", ["right", "branch-*"])
        assert (said["entropy"], said["key"], said["algorithm"]) == (True, True, "QKD")
        status, said = await get(url, "/key?remoteSystemID=right")
        assert (status, set(said)) == (200, {"keyId", "key"})
        assert (len(str(said["keyId"])), len(str(said["key"]))) == (32, 64)
        again = await get(url, f"/key/{str(said['keyId']).upper()}?remoteSystemID=left", "right")
        assert again == (200, said)
        assert (await get(url, f"/key/{said['keyId']}?remoteSystemID=left", "right"))[0] == 400
        status, said = await get(url, "/entropy?minentropy=300")
        assert (status, said["minentropy"], len(str(said["randomStr"]))) == (200, 304, 76)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/key?remoteSystemId=right&size=256", 200),  # as one client in the wild spells it
        ("/key?remoteSystemID=branch-7", 200),
        ("/key", 400),
        ("/key?remoteSystemID=stranger", 400),
        ("/key?remoteSystemID=right&size=128", 400),
        ("/key?remoteSystemID=right&size=many", 400),
        ("/key?remoteSystemID=right&remoteSystemID=right", 400),
        ("/key?remoteSystemID=right&colour=red", 400),
        (f"/key/{KEY_ID}?remoteSystemID=right", 400),
        ("/key/xyz?remoteSystemID=right", 400),
        (f"/key/{KEY_ID}", 400),
        ("/capabilities?x=1", 400),
        ("/entropy?minentropy=0", 400),
        ("/entropy?minentropy=99999999", 400),
        ("/keys", 404),
        ("/", 404),
    ],
)
async def test_the_servers_status_codes(path: str, status: int) -> None:
    async with serving(skip_application(Provider(), caller)) as url:
        assert (await get(url, path))[0] == status


async def test_another_method_a_stranger_and_a_failure() -> None:
    provider = Provider()
    async with serving(skip_application(provider, caller)) as url:
        assert (await get(url, "/key?remoteSystemID=right", method="POST"))[0] == 405
        assert (await get(url, "/key?remoteSystemID=right", "stranger"))[0] == 401
        provider.fail = RuntimeError("secret inside")
        status, said = await get(url, "/key?remoteSystemID=right")
        assert (status, said) == (500, {"message": "the key provider failed"})
        provider.fail = Refused(503, "no key now")
        assert await get(url, "/key?remoteSystemID=right") == (503, {"message": "no key now"})


async def test_origin_and_hops_of_our_provider_come_with_the_key(tmp_path: Path) -> None:
    async with serving(skip_application(Provider(), caller)) as url, source(tmp_path, url) as left:
        key = await left.get_key("right")
        assert (key.origin, key.hops) == (Origin.SIMULATED, 2)
        assert (await left.status("right")).origin is Origin.SIMULATED
        assert (await left.status("right")).hop is Hop.CLASSICAL_TLS
    async with (
        serving(skip_application(Provider(), caller)) as url,
        source(tmp_path, url, origin="qkd") as left,
    ):
        with pytest.raises(BadAnswer, match=r'says that its keys are "simulated".*"qkd"'):
            await left.get_key("right")


async def test_status_names_what_does_not_fit(tmp_path: Path) -> None:
    async with serving(skip_application(Provider(), caller)) as url:
        async with source(tmp_path, url) as left:
            assert (await left.status("right")).ready
            assert "no keys for system 'nobody'" in (await left.status("nobody")).reason
        async with source(tmp_path, url, sae="lefty") as wrong:
            assert "our system is called 'left'" in (await wrong.status("right")).reason
        async with source(tmp_path / "s", url, **files(tmp_path / "s", "stranger")) as stranger:
            assert "401" in (await stranger.status("right")).reason


# Against a provider that breaks the rules


def saying(status: int, body: object, headers: dict[str, str] | None = None) -> web.Application:
    async def handler(request: web.Request) -> web.StreamResponse:
        application[ASKED].append(request.raw_path)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(status=status, body=raw, headers=headers)

    application = web.Application()
    application[ASKED] = []
    application.router.add_route("*", "/{tail:.*}", handler)
    return application


async def fails(call: Awaitable[object]) -> KeySourceError:
    try:
        await call
    except KeySourceError as error:
        assert KEY.hex() not in f"{error!r}{error.__cause__!r}"
        return error
    raise AssertionError("no error")


GOOD = {"keyId": KEY_ID, "key": KEY.hex()}


@pytest.mark.parametrize(
    ("status", "drawing", "fetching"),
    [
        (400, Unavailable, UnknownKeyID),
        (404, Unavailable, UnknownKeyID),
        (401, Unauthorized, Unauthorized),
        (403, Unauthorized, Unauthorized),
        (405, BadAnswer, BadAnswer),
        (301, BadAnswer, BadAnswer),
        (500, Unavailable, Unavailable),
        (503, Exhausted, Unavailable),
    ],
)
async def test_what_a_status_means(
    tmp_path: Path, status: int, drawing: type[Exception], fetching: type[Exception]
) -> None:
    application = saying(status, GOOD, {"Location": "/elsewhere"})
    async with serving(application) as url, source(tmp_path, url) as left:
        assert type(await fails(left.get_key("right"))) is drawing
        assert type(await fails(left.get_key_with_id("right", KEY_ID))) is fetching
        assert len(application[ASKED]) == 2  # nothing is asked twice, no redirect followed
        assert application[ASKED][0] == "/key?remoteSystemID=right&size=256"


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        {"keyId": KEY_ID},
        {"key": KEY.hex()},
        {"keyId": KEY_ID, "key": KEY[:16].hex()},
        {"keyId": KEY_ID, "key": KEY.hex() + "00"},
        {"keyId": KEY_ID, "key": "zz" * 32},
        {"keyId": KEY_ID, "key": " ".join(f"{b:02x}" for b in KEY)},
        {"keyId": "", "key": KEY.hex()},
        {"keyId": "00" * 33, "key": KEY.hex()},
        {"keyId": 7, "key": KEY.hex()},
        {"keyId": KEY_ID, "key": KEY.hex(), "filler": "x" * 70_000},
    ],
)
async def test_a_bad_answer_gives_no_key(tmp_path: Path, body: object) -> None:
    async with serving(saying(200, body)) as url, source(tmp_path, url) as left:
        assert type(await fails(left.get_key("right"))) is BadAnswer


async def test_another_key_id_or_the_same_key_again_is_refused(tmp_path: Path) -> None:
    async with serving(saying(200, GOOD)) as url, source(tmp_path, url) as left:
        assert type(await fails(left.get_key_with_id("right", "0b" * 16))) is BadAnswer
        assert (await left.get_key("right")).material == KEY
        again = await fails(left.get_key("right"))
        assert type(again) is RepeatedKey and "delivered before" in str(again)


async def test_nobody_there_a_foreign_authority_and_old_tls(tmp_path: Path) -> None:
    async with serving(saying(200, GOOD)) as url:
        pass
    async with source(tmp_path, url) as left:
        assert type(await fails(left.get_key("right"))) is Unavailable
    async with serving(saying(200, GOOD), maximum=ssl.TLSVersion.TLSv1_2) as url, source(tmp_path, url) as left:
        assert type(await fails(left.get_key("right"))) is Unavailable
    async with serving(saying(200, GOOD)) as url:
        table = files(tmp_path / "o")
        (tmp_path / "o/ca.crt").write_bytes(Authority("another CA").certificate)
        async with source(tmp_path / "o", url, **table) as left:
            assert "certificate is refused" in str(await fails(left.get_key("right")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"url": "http://127.0.0.1"}, "url: it must be"),
        ({"url": "https://127.0.0.1:0"}, "url: it must be"),
        ({"url": "https://a:b@127.0.0.1"}, "url: user"),
        ({"sae": ""}, "sae: "),
        ({"hop": "local", "url": "https://192.0.2.1"}, 'hop = "local" needs'),
        ({"origin": "magic"}, "origin: "),
        ({"psk": "x"}, "psk: TLS-PSK is missing in this version"),
        ({"colour": 1}, "colour: no such key"),
        ({"ca": "nowhere.crt"}, "ca: .*nowhere.crt"),
    ],
)
async def test_a_wrong_table_is_one_sentence(tmp_path: Path, change: dict[str, object], said: str) -> None:
    table = {"url": "https://127.0.0.1:1", **files(tmp_path), **change}
    with pytest.raises(BadSettings, match=said):
        await SkipSource(table, SourceContext("skip", tmp_path, tmp_path, "left")).start()


@given(st.binary(max_size=200))
def test_decoders_raise_nothing_but_bad_answer_on_bytes(body: bytes) -> None:
    _only_bad_answer(body)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from(["", "*", "é", KEY_ID, KEY.hex(), "0x", "f" * 70])
)
json_values = scalars | st.lists(scalars, max_size=3)
FIELDS = ["keyId", "key", "localSystemID", "remoteSystemID", "algorithm", "KEYID", "entropy"]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_decoders_raise_nothing_but_bad_answer_on_json(fields: dict[str, object]) -> None:
    _only_bad_answer(json.dumps(fields).encode())


def _only_bad_answer(body: bytes) -> None:
    decoders: list[Callable[[bytes], object]] = [
        capabilities_untrusted,
        lambda data: key_untrusted(data, key_bytes=KEY_BYTES),
    ]
    for decode in decoders:
        with suppress(BadAnswer):
            decode(body)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=32))
def test_keys_survive_the_way(material: bytes, key_id: bytes) -> None:
    key = SkipKey(key_id.hex(), bytearray(material))
    assert key_untrusted(bytes(key.to_json()), key_bytes=32) == key
