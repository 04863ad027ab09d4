"""HKDF and CasKDF against code that shares nothing with them."""

from __future__ import annotations

import hashlib
import hmac

from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from qvpn.crypto import kdf, labels

secrets = st.binary(min_size=1, max_size=80)
short = st.binary(max_size=80)


@given(ikm=secrets, salt=short, info=short, length=st.integers(1, 300))
def test_hkdf_is_the_librarys(ikm: bytes, salt: bytes, info: bytes, length: int) -> None:
    assert kdf.hkdf(ikm, salt, info, length) == HKDF(SHA384(), length, salt, info).derive(ikm)
    prk = kdf.extract(salt, ikm)
    assert kdf.expand(prk, info, length) == HKDFExpand(SHA384(), length, info).derive(prk)


def cascade_by_the_formula(chain: bytes, key: bytes, ma: bytes, mb: bytes, label: bytes, info: bytes) -> bytes:
    """ETSI TS 103 744, cascade, in the words of clauses 7.2.3, 7.3.2, 7.4 and 8.3: PRF, then KDF."""
    formatted = hashlib.sha384()
    for part in (key, ma, mb):
        formatted.update(len(part).to_bytes(4, "big") + part)
    round_secret = hmac.new(chain, formatted.digest(), hashlib.sha384).digest()
    return HKDF(SHA384(), 48 + 96, label, info).derive(round_secret)


@given(chain=st.binary(min_size=48, max_size=48), key=short, ma=short, mb=short, info=short)
def test_cascade_round_is_the_formula(chain: bytes, key: bytes, ma: bytes, mb: bytes, info: bytes) -> None:
    round_ = kdf.cas_kdf(chain, key, ma, mb, labels.KEX, info)
    whole = cascade_by_the_formula(chain, key, ma, mb, labels.KEX, info)
    assert (round_.chain_secret, round_.key_material) == (whole[:48], whole[48:])


def test_two_rounds_with_a_known_answer() -> None:
    """A fixed answer: the same one tomorrow, whatever is refactored."""
    first = kdf.cas_kdf(bytes(48), b"k" * 64, b"message A", b"message B", labels.KEX, b"context")
    second = kdf.cas_kdf(first.chain_secret, b"q" * 32, b"A2", b"\0", labels.QKD, b"context 2")
    expected = cascade_by_the_formula(
        cascade_by_the_formula(bytes(48), b"k" * 64, b"message A", b"message B", b"qvpn1 kex", b"context")[:48],
        b"q" * 32,
        b"A2",
        b"\0",
        b"qvpn1 qkd",
        b"context 2",
    )
    assert second.chain_secret + second.key_material == expected
    assert hashlib.sha256(expected).hexdigest() == "b9bb3712fc59973f95f57fd83c46b5692f6bf7de590f714d4fd3ca7381187d7e"


@given(st.lists(short, min_size=1, max_size=4), st.lists(short, min_size=1, max_size=4))
def test_length_prefixes_leave_no_ambiguity(one: list[bytes], other: list[bytes]) -> None:
    assert (kdf.digest(*one) == kdf.digest(*other)) == (one == other)


def test_every_label_is_its_own() -> None:
    values = [value for name, value in vars(labels).items() if name.isupper()]
    assert len(values) == len(set(values)) == 14
    prefix_free = [a for a in values for b in values if a != b and b.startswith(a)]
    assert set(prefix_free) == {labels.PROTOCOL}  # "qvpn1" is only ever a part of its own in ctx
