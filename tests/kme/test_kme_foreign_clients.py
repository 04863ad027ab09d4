"""Other people's programs against our KMEs, which are in ``requirements.lock``."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from tests.kme.network import Network

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def network():
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        network = Network(Path(folder))
        for sae in ("sae-alice", "sae-bob"):
            network.authority.sae(sae).write(network.folder, sae)
        (network.folder / "ca.crt").write_bytes(network.authority.certificate)
        try:
            await network.start(keys=200)
            yield network
        finally:
            await network.aclose()


async def test_qkdsec_finds_nothing_but_what_the_standard_says(network):
    """Its one warning wants 404 for an unknown key_ID, which ETSI GS QKD 014 V1.1.1 does not have."""
    client = pytest.importorskip("qkdsec.client")
    doctor = pytest.importorskip("qkdsec.doctor")

    def of(sae, site):
        files = (str(network.folder / f"{sae}.crt"), str(network.folder / f"{sae}.key"))
        url = f"https://127.0.0.1:{network.ports[site][0]}"
        return client.ETSI014Client(url, client_cert=files, verify=str(network.folder / "ca.crt"))

    alice, bob = of("sae-alice", "alice"), of("sae-bob", "bob")
    # It knows one identity only; the slave's half of its round trip is the slave's.
    alice.get_dec_keys = lambda _slave, **ids: bob.get_dec_keys("sae-alice", **ids)
    report = await asyncio.to_thread(doctor.run_all, alice, "sae-bob")
    results = {result.name: result.status.name for result in report.results}
    assert sorted(results.values()) == ["PASS"] * 9 + ["WARN"]
    assert results["error_contract_404"] == "WARN"
    for one in (alice, bob):
        one.close()


async def test_etsi_qkd_014_client_draws_fetches_and_multicasts(network):
    library = pytest.importorskip("etsi_qkd_014_client")

    def of(sae, site):
        files = (str(network.folder / name) for name in (f"{sae}.crt", f"{sae}.key", "ca.crt"))
        return library.QKD014Client(f"127.0.0.1:{network.ports[site][0]}", *files)

    alice, bob = of("sae-alice", "alice"), of("sae-bob", "bob")

    def use():
        assert alice.get_status("sae-bob")[0] == 200
        for asked in ({}, {"number": 3, "size": 512}, {"number": 2, "additional_slave_sae_ids": ["sae-carol"]}):
            status, drawn = alice.get_key("sae-bob", **asked)
            assert status == 200
            key_ids = [str(key.key_id) for key in drawn.keys]
            status, fetched = bob.get_key_with_key_IDs("sae-alice", key_ids)
            assert (status, [key.key for key in fetched.keys]) == (200, [key.key for key in drawn.keys])
            assert bob.get_key_with_key_IDs("sae-alice", key_ids)[0] == 400

    await asyncio.to_thread(use)
