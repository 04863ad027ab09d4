"""The conformance suite of key sources over ``etsi014`` and two real KMEs."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.base import Owner
from keysource.conformance import CHECKS, Pair

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
    [("get", CHECKS[0]), *(("post", check) for check in CHECKS)],
    ids=lambda x: getattr(x, "__name__", x),
)
async def test_the_source_conforms(lab, check, method):
    @contextlib.asynccontextmanager
    async def pair():
        held = lab.held("alice")
        lab.publish(256)
        await lab.until(lambda: lab.held("alice") == held + 256, "new keys")
        yield Pair(
            await lab.source("alice", method=method), await lab.source("bob", method=method), "sae-alice", "sae-bob"
        )

    await check(pair)
