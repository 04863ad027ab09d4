"""Schema fuzzing: schemathesis makes requests from the OpenAPI document of ETSI GS QKD 014, right and wrong ones.

Whatever is asked, the answer has a status, content type and body that the document knows, and a wrong request is
never granted.  Not asked of a KME: to accept every request that has the right form, since the standard lets it refuse
sizes, numbers and extensions; and to have no failure of its own, which is a 503 by name.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from keysource.etsi014 import messages
from tests.kme.conftest import ROOT

loop = pytest.mark.asyncio(loop_scope="module")
DOCUMENT = ROOT / "keysource" / "etsi014" / "openapi.yaml"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
EXAMPLES = 100 if os.environ.get("QVPN_TEST_LONG") == "1" else 5
LIMITS = "[limits]\nmax_key_per_request = 4\nmax_key_size = 1024\nrequests_per_second = 0\n"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(lab_class):
    with tempfile.TemporaryDirectory(prefix="kme-") as folder:
        lab = lab_class(Path(folder), limits=LIMITS)
        try:
            await lab.start(keys=0)
            for _ in range(4):
                lab.publish(512)  # enough that none of the requests meets an empty store
            await lab.stored(2048)
            yield lab
        finally:
            await lab.aclose()


async def fuzz(lab, document, *options, sae="sae-bob"):
    """Exit status and what schemathesis says."""
    home = lab.folder / "alice"
    config = home / "schemathesis.toml"
    config.write_text(f'[parameters]\nslave_SAE_ID = "{sae}"\nmaster_SAE_ID = "{sae}"\n')
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", str(document)]
    command += ["--url", lab.plans["alice"].url, "--tls-verify", str(home / "pki/ca.crt")]
    command += ["--request-cert", str(home / "pki/sae-alice.crt")]
    command += ["--request-cert-key", str(home / "pki/sae-alice.key")]
    command += ["--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--seed", "20190201"]
    command += ["--max-examples", str(EXAMPLES), "--continue-on-failure", "--no-shrink", *options]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=lab.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


@loop
@pytest.mark.timeout(900)
async def test_our_kme_answers_what_the_document_says_whatever_is_asked(lab):
    pytest.importorskip("schemathesis")
    before = lab.link("alice")["issued"]
    status, said = await fuzz(lab, DOCUMENT)
    assert status == 0, said[-6000:]
    [generated] = re.findall(r"(\d+) generated", said)
    assert int(generated) >= 150
    assert re.search(r"Tested: +5", said)
    assert lab.link("alice")["issued"] > before  # some of the requests were right, and got their keys


@loop
@pytest.mark.timeout(900)
async def test_an_answer_that_the_document_does_not_know_is_found(lab, tmp_path):
    """The same with a document that asks for one field more: the fuzzer can fail."""
    pytest.importorskip("schemathesis")
    text = DOCUMENT.read_text()
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("- source_KME_ID\n", "- source_KME_ID\n        - colour\n"))
    assert other.read_text() != text
    options = ("--include-operation-id", "getStatus", "--phases", "fuzzing")
    status, said = await fuzz(lab, other, *options)
    assert status == 1
    assert "colour" in said


def schemas():
    import yaml

    return yaml.safe_load(DOCUMENT.read_text())["components"]["schemas"]


@pytest.mark.parametrize("model", ["Status", "KeyRequest", "KeyContainer", "KeyIDs", "Error"])
def test_the_document_and_the_models_have_the_same_fields(model):
    pytest.importorskip("yaml")
    schema, ours = schemas()[model], getattr(messages, model).model_fields
    assert set(schema["properties"]) == set(ours)
    assert set(schema.get("required", ())) == {name for name, field in ours.items() if field.is_required()}
    inner = {"KeyContainer": ("keys", messages.KeyEntry), "KeyIDs": ("key_IDs", messages.KeyID)}
    if model in inner:
        name, entry = inner[model]
        assert set(schema["properties"][name]["items"]["properties"]) == set(entry.model_fields)
