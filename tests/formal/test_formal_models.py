"""The models are those the verdicts in README.md belong to; where ProVerif is installed, it is asked again."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SUMS = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
LONG = os.environ.get("QVPN_TEST_LONG") == "1"
QUICK = {"unknown_key_share": ["true"], "sanity_m3r_must_cover_m4": ["false"]}
VERDICTS = {
    "secrecy_initiator": ["true"],
    "secrecy_responder": ["true"],
    "secrecy_without_qkd_key": ["true", "true"],
    "forward_secrecy_without_x25519": ["true"] * 4,
    "forward_secrecy_without_mlkem": ["true"] * 4,
    "agreement_initiator": ["true"],
    "agreement_responder": ["true"],
    "agreement_responder_without_qkd_key": ["true"],
    "downgrade_initiator": ["true"],
    "downgrade_responder": ["true"],
    "key_draw": ["true", "true"],
    "signatures_alone": ["true", "true", "true", "false"],
    "both_roles_secrecy": ["true"],
    "both_roles_downgrade_responder": ["true"],
    "downgrade_responder_own_choice": ["false"],
    "downgrade_initiator_unsigned_m4_attack": ["false", "true"],
    "downgrade_responder_unsigned_m3r_attack": ["false", "true"],
    "sanity_reachable": ["false"] * 3,
    "sanity_no_single_primitive": ["false", "false"],
    "sanity_forward_secrecy_needs_one_kex": ["false"],
    **QUICK,
}
OTHER_LIBRARY = {"signatures_alone", "sanity_m3r_must_cover_m4"}


@pytest.mark.parametrize("name", sorted(SUMS))
def test_model_is_the_one_that_was_verified(name: str) -> None:
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == SUMS[name]


def test_every_model_has_a_sum_a_verdict_and_a_row() -> None:
    models = {path.name for pattern in ("*.pv", "*.pvl") for path in FOLDER.glob(pattern)}
    assert models == set(SUMS)
    assert {name for name in models if name.endswith(".pv")} == {f"{name}.pv" for name in VERDICTS}
    table = (FOLDER / "README.md").read_text()
    assert [name for name in VERDICTS if name not in table] == []


@pytest.mark.skipif(shutil.which("proverif") is None, reason="proverif is not installed: verdicts not run again")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(VERDICTS if LONG else QUICK))
def test_proverif_says_what_the_readme_says(name: str) -> None:
    library = "signatures_only.pvl" if name in OTHER_LIBRARY else "handshake.pvl"
    run = subprocess.run(
        ["proverif", "-lib", library, f"{name}.pv"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    found = re.findall(r"^Query .* is (true|false)\.$", run.stdout, re.MULTILINE)
    assert found == VERDICTS[name], run.stdout[-2000:] + run.stderr[-500:]
