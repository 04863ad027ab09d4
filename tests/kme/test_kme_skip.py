"""Our KME serves SKIP: the suite over ``skip`` sources, both interfaces at once, faults, and PyPI's skip-qkd."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.base import Origin, SourceContext
from keysource.conformance import CHECKS, Pair
from keysource.errors import Exhausted, Unauthorized, UnknownKeyID
from keysource.skip.source import SkipSource

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(lab_class):
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        lab = lab_class(Path(folder))
        for file in lab.files.values():
            text = file.read_text()
            file.write_text(text.replace("[kme]\n", '[kme]\nskip_listen = "127.0.0.1:0"\n', 1))
        try:
            await lab.start(keys=0)
            yield lab
        finally:
            await lab.aclose()


async def source(lab, site: str, sae: str = "") -> SkipSource:
    plan, home = lab.plans[site], lab.folder / site
    table = {
        "url": f"https://{lab.status(site)['skip_listen']}",
        "sae": plan.sae_id,
        "ca": "pki/ca.crt",
        "certificate": f"pki/{sae or plan.sae_id}.crt",
        "private_key": f"pki/{sae or plan.sae_id}.key",
    }
    if sae:
        lab.authority.sae(sae).write(home / "pki", sae)
    made = SkipSource(table, SourceContext("skip", home, home, site))
    await made.start()
    assert made._client is not None
    made._client._timeout = 20.0
    lab.clients.append(made)
    return made


async def filled(lab, keys: int) -> None:
    held = lab.held("alice")
    lab.publish(keys)
    await lab.until(lambda: lab.held("alice") == held + keys, "new keys")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_skip_over_our_kme_conforms(lab, check):
    @contextlib.asynccontextmanager
    async def pair():
        await filled(lab, 256)
        yield Pair(await source(lab, "alice"), await source(lab, "bob"), "sae-alice", "sae-bob")

    await check(pair)


async def test_a_key_drawn_over_skip_is_fetched_over_014_and_the_other_way(lab):
    await filled(lab, 64)
    skip, etsi = await source(lab, "alice"), await lab.source("bob")
    drawn = await skip.get_key("sae-bob")
    assert drawn.origin is Origin.SIMULATED
    fetched = await etsi.get_key_with_id("sae-alice", str(uuid.UUID(drawn.key_id)))
    assert fetched.material == drawn.material
    drawn = await etsi.get_key("sae-alice")
    fetched = await skip.get_key_with_id("sae-bob", uuid.UUID(drawn.key_id).hex)
    assert fetched.material == drawn.material
    with pytest.raises(UnknownKeyID):
        await skip.get_key_with_id("sae-bob", uuid.UUID(drawn.key_id).hex)
    audit = lab.config("alice").audit_path.read_text()
    assert any(json.loads(line).get("interface") == "skip" for line in audit.splitlines())
    assert drawn.key_id not in audit


async def test_a_stranger_and_an_empty_kme(lab):
    stranger = await source(lab, "alice", "sae-mallory")
    with pytest.raises(Unauthorized):
        await stranger.get_key("sae-bob")
    skip = await source(lab, "alice")
    lab.fault("alice", "empty")
    with pytest.raises(Exhausted):
        await skip.get_key("sae-bob")
    lab.fault("alice", "none")
    await filled(lab, 8)
    await skip.get_key("sae-bob")


CLIENT = """
import importlib.util, json, sys, types
if importlib.util.find_spec("sslpsk3") is None:  # for TLS-PSK, which is not used here
    sys.modules["sslpsk3"] = types.ModuleType("sslpsk3")
    sys.modules["sslpsk3"].SSLPSKContext = None
from skip_qkd import MTLSConfig, SkipQKDClient

def client(address, folder, name):
    files = MTLSConfig(f"{folder}/pki/ca.crt", f"{folder}/pki/{name}.crt", f"{folder}/pki/{name}.key")
    return SkipQKDClient(address, name, files)

alice, bob = sys.argv[1:3], sys.argv[3:5]
said = client(*alice, "sae-alice").capabilities()
drawn = client(*alice, "sae-alice").request_key("sae-bob", 256)
fetched = client(*bob, "sae-bob").fetch_key_by_id(drawn["keyId"], "sae-alice")
entropy = client(*alice, "sae-alice").entropy(256)
try:
    client(*bob, "sae-bob").fetch_key_by_id(drawn["keyId"], "sae-alice")
    again = "given again"
except RuntimeError as error:
    again = str(error)
print(json.dumps([said, drawn == fetched, len(drawn["key"]), entropy["minentropy"], again]))
"""


async def test_pypis_skip_qkd_draws_and_fetches(lab):
    if importlib.util.find_spec("skip_qkd") is None:
        pytest.skip("pip install --no-deps skip-qkd")
    await filled(lab, 8)
    places = [word for site in ("alice", "bob") for word in (lab.status(site)["skip_listen"], str(lab.folder / site))]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, *places, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    said, same, digits, entropy, again = json.loads(output)
    assert (said["localSystemID"], said["remoteSystemID"]) == ("sae-alice", ["sae-bob"])
    assert (same, digits, entropy) == (True, 64, 256)
    assert "400" in again
