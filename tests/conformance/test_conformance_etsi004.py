"""``etsi004`` in both wire profiles against independent servers: the suite, restarts, statuses, wrong profiles."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from keysource import tls
from keysource.base import KeySource, Origin, SourceContext
from keysource.conformance import CHECKS, DISTURBANCES, Check, Pair, concurrent_draws_share_no_key
from keysource.errors import BadAnswer, BadSettings, Exhausted, KeySourceError, NotOwner, RolledBack, Unavailable
from keysource.etsi004.source import Etsi004Source
from keysource.kme.pki import Authority
from tests.conformance.etsi004_servers import SERVERS, Link, Server

TOTAL_DRAWS = 10_000 if os.environ.get("QVPN_TEST_LONG") else 1_000
STREAM = "0f8b2f0e-9a3c-4c57-8f0e-2f6a1d3c4b5a"
AUTHORITY = Authority("004 CA")
PROFILES = sorted(SERVERS)


def server_context() -> object:
    credential = AUTHORITY.kme("server", ["127.0.0.1"])
    return tls.server_context(AUTHORITY.certificate, credential.certificate, credential.private_key)


@asynccontextmanager
async def serving(profile: str, link: Link, **more: int) -> AsyncIterator[tuple[Server, str]]:
    server = SERVERS[profile](link, **more)
    port = await server.start(server_context())  # type: ignore[arg-type]
    try:
        yield server, f"tls://127.0.0.1:{port}"
    finally:
        await server.aclose()


def made(folder: Path, url: str, profile: str, end: str = "a", **more: object) -> Etsi004Source:
    folder.mkdir(exist_ok=True)
    if not (folder / "app.key").exists():
        AUTHORITY.sae("app").write(folder, "app")
        (folder / "ca.crt").write_bytes(AUTHORITY.certificate)
    table: dict[str, object] = {
        "url": url,
        "profile": profile,
        "source": "app://left",
        "destination": "app://right",
        "stream": STREAM,
        "end": end,
        "timeout": 100,
        "ca": "ca.crt",
        "certificate": "app.crt",
        "private_key": "app.key",
        **more,
    }

    async def quick(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))

    settings = {name: value for name, value in table.items() if value is not None}
    return Etsi004Source(settings, SourceContext("stream", folder, folder, end), sleep=quick)


@asynccontextmanager
async def running(*sources: Etsi004Source, wait: bool = True) -> AsyncIterator[None]:
    try:
        for source in sources:
            await source.start()
            assert source._client is not None
            source._client._timeout = 30.0  # fifty calls at once on a busy machine: what is slow is no fault
        for source in sources if wait else ():
            await ready(source)
        yield
    finally:
        for source in sources:
            await source.aclose()


async def ready(source: Etsi004Source) -> None:
    async with asyncio.timeout(10):
        while not (await source.status("x")).ready:
            await asyncio.sleep(0.01)


async def trouble(source: Etsi004Source, part: str) -> None:
    async with asyncio.timeout(10):
        while part not in (await source.status("x")).reason:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def stream_pair(profile: str, folder: Path, **more: object) -> AsyncIterator[Pair]:
    link = Link()
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(serving(profile, link)) for _ in range(2)]
        urls = {end: url for end, (_, url) in zip("ab", found, strict=True)}
        servers = [server for server, _ in found]
        sources = {end: made(folder / end, urls[end], profile, end, **more) for end in "ab"}

        async def restart(old: KeySource) -> KeySource:
            end = next(end for end, source in sources.items() if source is old)
            await old.aclose()
            sources[end] = made(folder / end, urls[end], profile, end, **more)
            await stack.enter_async_context(running(sources[end]))
            return sources[end]

        async def outage(down: bool) -> None:
            for server, url in zip(servers, urls.values(), strict=True):
                if down:
                    await server.aclose()
                else:
                    await server.start(server_context(), int(url.rpartition(":")[2]))  # type: ignore[arg-type]

        await stack.enter_async_context(running(*sources.values()))
        yield Pair(sources["a"], sources["b"], restart=restart, outage=outage)


@pytest.mark.parametrize("check", (*CHECKS, *DISTURBANCES), ids=lambda check: check.__name__)
@pytest.mark.parametrize("profile", PROFILES)
async def test_the_stream_conforms(profile: str, check: Check, tmp_path: Path) -> None:
    await check(partial(stream_pair, profile, tmp_path))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("profile", PROFILES)
async def test_many_draws_from_both_sides_at_once(profile: str, tmp_path: Path) -> None:
    await concurrent_draws_share_no_key(partial(stream_pair, profile, tmp_path), TOTAL_DRAWS)


@pytest.mark.parametrize("profile", PROFILES)
async def test_streams_that_servers_assign_and_one_owner(profile: str, tmp_path: Path) -> None:
    async with stream_pair(profile, tmp_path, stream=None, owner="b") as pair:
        key = await pair.b.get_key("x")
        assert (await pair.a.get_key_with_id("x", key.key_id)).material == key.material
        with pytest.raises(NotOwner):
            await pair.a.get_key("x")


@pytest.mark.parametrize("profile", PROFILES)
async def test_after_a_restart_no_index_is_drawn_or_fetched_again(profile: str, tmp_path: Path) -> None:
    link, drawn, fetched = Link(), [], []
    async with serving(profile, link) as (_, url):
        for _ in range(4):
            a, b = (
                made(tmp_path / "a", url, profile, stream=None),
                made(tmp_path / "b", url, profile, "b", stream=None),
            )
            async with running(a, b):
                mine, theirs = await a.get_key("x"), await b.get_key("x")
                drawn += [mine.key_id, theirs.key_id]
                fetched.append((await a.get_key_with_id("x", theirs.key_id)).key_id)
                for old in fetched:
                    with pytest.raises(KeySourceError, match="no longer"):
                        await a.get_key_with_id("x", old)
    assert len(set(drawn)) == len(drawn) == 8


@pytest.mark.parametrize("profile", PROFILES)
async def test_a_server_that_goes_and_comes_costs_no_index(profile: str, tmp_path: Path) -> None:
    link = Link()
    async with serving(profile, link) as (first, url):
        source = made(tmp_path / "a", url, profile)
        async with running(source):
            assert (await source.get_key("x")).key_id.endswith(":0")
            port = first.server.sockets[0].getsockname()[1]
            await first.aclose()
            await trouble_of_a_draw(source)
            second = SERVERS[profile](link)
            await second.start(server_context(), port)  # type: ignore[arg-type]
            await ready(source)
            last = int((await source.get_key("x")).key_id.rpartition(":")[2])
            assert 2 <= last <= 4  # at most the one that was under way is lost
            await second.aclose()


async def trouble_of_a_draw(source: Etsi004Source) -> None:
    with pytest.raises(Unavailable):
        await source.get_key("x")


@pytest.mark.parametrize("profile", PROFILES)
async def test_an_empty_server_gives_later_what_was_asked_for_first(profile: str, tmp_path: Path) -> None:
    link = Link(chunks=1)
    async with serving(profile, link) as (_, url):
        source = made(tmp_path / "a", url, profile)
        async with running(source):
            assert (await source.get_key("x")).key_id.endswith(":0")
            for _ in range(3):
                with pytest.raises(Exhausted):
                    await source.get_key("x")
            link.chunks = 9
            assert [(await source.get_key("x")).key_id.rpartition(":")[2] for _ in range(3)] == ["2", "4", "6"]


@pytest.mark.parametrize(("status", "kind"), [(2, Exhausted), (3, Unavailable), (4, Unavailable), (6, Unavailable)])
@pytest.mark.parametrize("profile", PROFILES)
async def test_what_a_status_of_get_key_means(
    profile: str, status: int, kind: type[Exception], tmp_path: Path
) -> None:
    async with serving(profile, Link()) as (server, url):
        source = made(tmp_path / "a", url, profile)
        async with running(source):
            server.orders[4] = status
            with pytest.raises(kind):
                await source.get_key("x")
            del server.orders[4]
            await ready(source)
            await source.get_key("x")


@pytest.mark.parametrize(
    ("status", "said"), [(4, "there is no QKD connection"), (6, "timeout"), (7, "cannot be met|without QoS")]
)
@pytest.mark.parametrize("profile", PROFILES)
async def test_what_a_status_of_open_connect_means(profile: str, status: int, said: str, tmp_path: Path) -> None:
    async with serving(profile, Link()) as (server, url):
        server.orders[2] = status
        source = made(tmp_path / "a", url, profile)
        async with running(source, wait=False):
            if status != 7:
                await trouble(source, said)
                with pytest.raises(Unavailable, match=said):
                    await source.get_key("x")
            del server.orders[2]
            await ready(source)


@pytest.mark.parametrize("profile", PROFILES)
async def test_another_chunk_size_is_named_and_can_be_agreed(profile: str, tmp_path: Path) -> None:
    async with serving(profile, Link(), chunk=512) as (_, url):
        source = made(tmp_path / "a", url, profile)
        async with running(source, wait=False):
            await trouble(source, "write chunk = 512 at both sites")
        agreed = made(tmp_path / "a", url, profile, chunk=512)
        async with running(agreed):
            assert len((await agreed.get_key("x")).material) == 32


@pytest.mark.parametrize("profile", PROFILES)
async def test_metadata_that_need_more_room_cost_no_key_and_hops_travel(profile: str, tmp_path: Path) -> None:
    async with serving(profile, Link()) as (server, url):
        server.metadata = lambda: b'{"hops": 3, "note": "' + b"x" * 3000 + b'"}'  # type: ignore[method-assign]
        source = made(tmp_path / "a", url, profile)
        async with running(source):
            key = await source.get_key("x")
            assert (key.hops, key.origin) == (3, Origin.EXTERNAL)
            assert [service for service, _ in server.calls].count(4) == 2
        strict = made(tmp_path / "a", url, profile, origin="qkd")
        async with running(strict):
            with pytest.raises(BadAnswer, match="3 trusted nodes"):
                await strict.get_key("x")


async def test_connections_are_used_as_the_profile_says(tmp_path: Path) -> None:
    for profile, connections in (("etsi-c", 5), ("qubip", 1)):
        async with serving(profile, Link()) as (server, url):
            source = made(tmp_path / profile, url, profile)
            async with running(source):
                for _ in range(4):
                    await source.get_key("x")
                assert server.connections == connections


@pytest.mark.parametrize(("server", "client"), [("etsi-c", "qubip"), ("qubip", "etsi-c")])
async def test_the_profiles_do_not_understand_each_other_and_it_is_said(
    server: str, client: str, tmp_path: Path
) -> None:
    async with serving(server, Link()) as (other, url):
        other.version = SERVERS[client].version  # so far that it answers at all
        source = made(tmp_path / "a", url, client)
        async with running(source, wait=False):
            await trouble(source, "tls://127.0.0.1")
            other.version = SERVERS[server].version
            with pytest.raises(KeySourceError):
                await source.get_key("x")


async def test_an_answer_of_the_other_version_is_named(tmp_path: Path) -> None:
    class Confused(SERVERS["qubip"]):  # type: ignore[name-defined,misc]
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(8)
            writer.write(bytes((2, 1, 1, 3)) + bytes(4))
            writer.close()

    server = Confused(Link())
    port = await server.start(server_context())
    source = made(tmp_path / "a", f"tls://127.0.0.1:{port}", "qubip")
    async with running(source, wait=False):
        await trouble(source, "an answer of version 2.1.1: this is not wire profile 'qubip'")
    await server.aclose()


async def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keysource.etsi004.client.TIMEOUT", 0.1)
    async with serving("qubip", Link()) as (server, url):
        source = made(tmp_path / "a", url, "qubip")
        async with running(source):
            assert source._client is not None
            source._client._timeout = 0.1
            server.silent = True
            with pytest.raises(Unavailable, match="no answer to GET_KEY within"):
                await source.get_key("x")


async def test_a_restored_backup_is_noticed_by_the_peers_claim(tmp_path: Path) -> None:
    async with stream_pair("qubip", tmp_path) as pair:
        assert isinstance(pair.a, Etsi004Source)
        assert isinstance(pair.b, Etsi004Source)
        for _ in range(3):
            await pair.b.get_key_with_id("x", (await pair.a.get_key("x")).key_id)
        claim = pair.b.claim()
    for old in (tmp_path / "a").glob("*.position"):
        old.unlink()
    async with stream_pair("qubip", tmp_path) as pair:
        assert isinstance(pair.a, Etsi004Source)
        with pytest.raises(RolledBack, match="a backup was restored"):
            pair.a.check_claim(claim)
        with pytest.raises(RolledBack):
            await pair.a.get_key("x")
        assert "backup" in (await pair.a.status("x")).reason


async def test_two_daemons_do_not_share_a_stream(tmp_path: Path) -> None:
    async with serving("qubip", Link()) as (_, url):
        source = made(tmp_path / "a", url, "qubip")
        async with running(source):
            with pytest.raises(BadSettings, match="another process uses this key stream"):
                await made(tmp_path / "a", url, "qubip").start()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"profile": None}, "profile: is required"),
        ({"profile": "004"}, "profile: "),
        ({"url": "https://127.0.0.1:1"}, "url: it must be"),
        ({"url": "tls://127.0.0.1"}, "url: it must be"),
        ({"source": "left"}, "source: a URI begins with its scheme"),
        ({"destination": "app://ä"}, "destination: a URI has"),
        ({"stream": "00000000-0000-0000-0000-000000000000"}, "stream: the zero UUID"),
        ({"stream": "x"}, "stream: "),
        ({"chunk": 31}, "chunk: "),
        ({"end": "c"}, "end: "),
        ({"colour": 1}, "colour: no such key"),
    ],
)
def test_a_wrong_table_is_one_sentence(change: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=said):
        made(tmp_path, **{"url": "tls://127.0.0.1:1", "profile": "qubip", **change})  # type: ignore[arg-type]


async def test_aclose_closes_the_stream(tmp_path: Path) -> None:
    async with serving("etsi-c", Link()) as (server, url):
        async with running(made(tmp_path / "a", url, "etsi-c")):
            assert len(server.streams) == 1
        assert not server.streams
        with contextlib.suppress(KeySourceError):
            await made(tmp_path / "a", url, "etsi-c").aclose()
