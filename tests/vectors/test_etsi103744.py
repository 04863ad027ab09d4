"""CasKDF against ETSI's own numbers: the six cases at SHA-384 of the program that belongs to TS 103 744, annex D.

The file holds what is short; public keys and ciphertexts of ML-KEM follow from the seeds, as in that program.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kyber_py.ml_kem import ML_KEM_768, ML_KEM_1024

from qvpn.crypto import kdf

WHOLE = json.loads(Path(__file__).with_name("etsi103744.json").read_text())
KEMS = {768: ML_KEM_768, 1024: ML_KEM_1024}
KEY_BYTES = 24
"""ETSI's cases take 24 bytes a round; a longer HKDF-Expand begins with the shorter (RFC 5869 section 2.3)."""


def message(cid: str, label: str, public: str) -> bytes:
    """``cid || len(L) || L || len(P) || P``: the form of the cases, whose lengths count hexadecimal digits."""
    parts = [bytes.fromhex(cid)]
    for part in (label, public):
        parts += [len(part).to_bytes(4, "big"), bytes.fromhex(part)]
    return b"".join(parts)


def crossed(a: str, b: str) -> bytes:
    return bytes(x ^ y for x, y in zip(bytes.fromhex(a), bytes.fromhex(b), strict=True))


@pytest.mark.parametrize("case", WHOLE["cases"], ids=lambda case: f"{case['curve']}-{case['kem']}")
def test_two_rounds_give_the_key_material_that_etsi_publishes(case: dict[str, str]) -> None:
    kem = KEMS[int(case["kem"])]
    public, _ = kem.key_derive(bytes.fromhex(case["keygen_seed"]))
    k2, ciphertext = kem._encaps_internal(public, bytes.fromhex(case["encapsulation_randomness"]))
    assert k2.hex() == case["k2"]
    info, cid = WHOLE["info"].encode(), case["cid"]
    first = kdf.cas_kdf(
        b"",  # no pre-shared key: round 1 starts from an empty chain secret
        bytes.fromhex(case["k1"]),
        message(cid, case["la1"], case["pa1"]),
        message(cid, case["lb1"], case["pb1"]),
        crossed(case["la1"], case["lb1"]),
        info,
    )
    second = kdf.cas_kdf(
        first.chain_secret,
        k2,
        message(cid, case["la2"], public.hex()),
        message(cid, case["lb2"], ciphertext.hex()),
        crossed(case["la2"], case["lb2"]),
        info,
    )
    assert second.key_material[:KEY_BYTES].hex() == case["key_material"]
