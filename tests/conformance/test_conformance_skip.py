"""The conformance suite over ``skip`` and two key providers, which share their keys as a database would."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from keysource.base import Origin, SourceContext
from keysource.conformance import CHECKS, Check, Pair, concurrent_draws_share_no_key
from keysource.etsi014 import tls
from keysource.kme.auth import caller
from keysource.kme.pki import Authority
from keysource.skip.messages import Capabilities, SkipKey
from keysource.skip.server import Issued, Refused, skip_application
from keysource.skip.source import SkipSource

TOTAL_DRAWS = 10_000 if os.environ.get("QVPN_TEST_LONG") else 1_000


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


@contextlib.asynccontextmanager
async def skip_pair(folder: Path) -> AsyncIterator[Pair]:
    authority = Authority("skip CA")
    names = ("left", "right")
    providers = [Provider(*names), Provider(*names[::-1])]
    providers[0].other, providers[1].other = providers[1], providers[0]
    async with contextlib.AsyncExitStack() as stack:
        sources = []
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
            table = {
                "url": f"https://127.0.0.1:{runner.addresses[0][1]}",
                "sae": provider.system,
                "ca": "ca.crt",
                "certificate": "sae.crt",
                "private_key": "sae.key",
            }
            source = SkipSource(table, SourceContext("skip", home, home, provider.system))
            await source.start()
            stack.push_async_callback(source.aclose)
            sources.append(source)
        yield Pair(*sources, "left", "right")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_skip_conforms(check: Check, tmp_path: Path) -> None:
    await check(partial(skip_pair, tmp_path))


@pytest.mark.timeout(900)
async def test_many_draws_over_skip_from_both_sides_at_once(tmp_path: Path) -> None:
    await concurrent_draws_share_no_key(partial(skip_pair, tmp_path), TOTAL_DRAWS)
