"""The conformance suite over ``skip`` and two key providers, which share their keys as a database would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from keysource import tls
from keysource.base import KeySource, Origin, SourceContext
from keysource.conformance import CHECKS, DISTURBANCES, Check, Pair, concurrent_draws_share_no_key
from keysource.kme.auth import certificate_of, common_name
from keysource.kme.pki import Authority
from keysource.skip.messages import Capabilities, SkipKey
from keysource.skip.server import Issued, Refused, skip_application
from keysource.skip.source import SkipSource

TOTAL_DRAWS = 10_000 if os.environ.get("QVPN_TEST_LONG") else 1_000


def caller(request: web.Request) -> str | None:
    return common_name(certificate_of(request))


class Provider:
    """One end; ``waiting`` holds what this end issued and the other has not fetched."""

    def __init__(self, system: str, remote: str) -> None:
        self.system, self.remote = system, remote
        self.waiting: dict[str, bytes] = {}
        self.other: Provider = self

    def capabilities(self, caller: str) -> Capabilities:
        if caller != self.system:
            raise Refused(401, "no such system")
        return Capabilities(self.system, (self.remote,))

    async def new_key(self, caller: str, remote_system: str) -> Issued:
        key_id, key = os.urandom(16).hex(), os.urandom(32)
        self.waiting[key_id] = key
        return Issued(SkipKey(key_id, bytearray(key)), Origin.QKD)

    async def key(self, caller: str, remote_system: str, key_id: str) -> Issued:
        await asyncio.sleep(0)
        key = self.other.waiting.pop(key_id, None)
        if key is None:
            raise Refused(400, "no such keyId")
        return Issued(SkipKey(key_id, bytearray(key)), Origin.QKD)


async def started(source: SkipSource) -> None:
    """Fifty calls at once, both servers in this process, on a busy machine: what is slow here is no fault."""
    await source.start()
    assert source._client is not None
    source._client._timeout = 30.0


@contextlib.asynccontextmanager
async def skip_pair(folder: Path) -> AsyncIterator[Pair]:
    authority = Authority("skip CA")
    names = ("left", "right")
    providers = [Provider(*names), Provider(*names[::-1])]
    providers[0].other, providers[1].other = providers[1], providers[0]
    async with contextlib.AsyncExitStack() as stack:
        places: dict[str, tuple[web.AppRunner, ssl.SSLContext, int]] = {}
        sources: dict[str, SkipSource] = {}

        def open_end(system: str) -> SkipSource:
            home = folder / system
            table = {
                "url": f"https://127.0.0.1:{places[system][2]}",
                "sae": system,
                "ca": "ca.crt",
                "certificate": "sae.crt",
                "private_key": "sae.key",
            }
            return SkipSource(table, SourceContext("skip", home, home, system))

        async def restart(old: KeySource) -> KeySource:
            system = next(system for system, source in sources.items() if source is old)
            await old.aclose()
            sources[system] = open_end(system)
            await started(sources[system])
            stack.push_async_callback(sources[system].aclose)
            return sources[system]

        async def outage(down: bool) -> None:
            for runner, context, port in places.values():
                if down:
                    for site in list(runner.sites):
                        await site.stop()
                else:
                    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context, reuse_address=True).start()

        for provider in providers:
            home = folder / provider.system
            home.mkdir(exist_ok=True)
            authority.sae(provider.system).write(home, "sae")
            (home / "ca.crt").write_bytes(authority.certificate)
            credential = authority.kme("provider", ["127.0.0.1"])
            context = tls.server_context(authority.certificate, credential.certificate, credential.private_key)
            runner = web.AppRunner(skip_application(provider, caller), access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context, backlog=512).start()
            places[provider.system] = (runner, context, runner.addresses[0][1])
            sources[provider.system] = open_end(provider.system)
            await started(sources[provider.system])
            stack.push_async_callback(sources[provider.system].aclose)
        yield Pair(sources["left"], sources["right"], "left", "right", restart, outage)


@pytest.mark.parametrize("check", (*CHECKS, *DISTURBANCES), ids=lambda check: check.__name__)
async def test_skip_conforms(check: Check, tmp_path: Path) -> None:
    await check(partial(skip_pair, tmp_path))


@pytest.mark.timeout(900)
async def test_many_draws_over_skip_from_both_sides_at_once(tmp_path: Path) -> None:
    await concurrent_draws_share_no_key(partial(skip_pair, tmp_path), TOTAL_DRAWS)
