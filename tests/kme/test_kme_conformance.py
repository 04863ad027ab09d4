"""The conformance suite of key sources over ``etsi014`` and two real KMEs; an outage is kill -9 of both."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.base import Owner
from keysource.conformance import CHECKS, DISTURBANCES, Pair

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=[Owner.ALTERNATE, Owner.A])
async def lab(request, lab_class):
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        lab = lab_class(Path(folder), owner=request.param)
        try:
            await lab.start(keys=0)
            yield lab
        finally:
            await lab.aclose()


@pytest.mark.parametrize(
    ("method", "check"),
    [("get", CHECKS[0]), *(("post", check) for check in (*CHECKS, *DISTURBANCES))],
    ids=lambda x: getattr(x, "__name__", x),
)
async def test_the_source_conforms(lab, check, method):
    @contextlib.asynccontextmanager
    async def pair():
        held = lab.held("alice")
        lab.publish(256)
        await lab.until(lambda: lab.held("alice") == held + 256, "new keys")
        ends = {site: await lab.source(site, method=method) for site in ("alice", "bob")}

        async def restart(old):
            [site] = [site for site, source in ends.items() if source is old]
            await old.aclose()
            ends[site] = await lab.source(site, method=method)
            return ends[site]

        async def outage(down):
            for site in ends:
                if down:
                    lab.kill_kme(site)
                else:
                    lab.start_kme(site)
            for site in () if down else ends:
                await lab.ready(site)

        yield Pair(ends["alice"], ends["bob"], "sae-alice", "sae-bob", restart, outage)

    await check(pair)
