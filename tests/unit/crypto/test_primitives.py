"""The library's primitives as this project calls them, against published answers and independent implementations."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from dilithium_py.ml_dsa import ML_DSA_65, ML_DSA_87
from hypothesis import given, settings
from hypothesis import strategies as st
from kyber_py.ml_kem import ML_KEM_768, ML_KEM_1024

from qvpn.config import identity
from qvpn.crypto import aead, labels
from qvpn.crypto.kem import HybridEphemeral, HybridKem
from qvpn.crypto.sign import sign, verifies
from qvpn.crypto.suites import ED25519_SIGNATURE, SUITES, TAG, Suite
from qvpn.errors import BadPacket

PEER_KEM = {1: ML_KEM_768, 2: ML_KEM_768, 3: ML_KEM_1024}
PEER_SIGNER = {3: ML_DSA_65, 5: ML_DSA_87}
each_suite = pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: f"suite{suite.code}")
each_level = pytest.mark.parametrize("level", identity.LEVELS)


def test_x25519_iterated_rfc_7748_5_2() -> None:
    k = u = b"\x09" + bytes(31)
    for turn in range(1, 1001):
        k, u = X25519PrivateKey.from_private_bytes(k).exchange(X25519PublicKey.from_public_bytes(u)), k
        if turn == 1:
            assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_ed25519_rfc_8032_7_1_test_1() -> None:
    secret = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.public_key().public_bytes_raw().hex() == public
    assert key.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555f"
        "b8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )


@each_suite
def test_ml_kem_agrees_with_an_independent_one_in_both_roles(suite: Suite) -> None:
    peer, seed = PEER_KEM[suite.code], bytes(range(64))
    ours = suite.mlkem_private.from_seed_bytes(seed)
    ek, dk = peer.key_derive(seed)
    assert ours.public_key().public_bytes_raw() == ek
    secret, ciphertext = peer.encaps(ek)
    assert ours.decapsulate(ciphertext) == secret
    secret, ciphertext = ours.public_key().encapsulate()
    assert peer.decaps(dk, ciphertext) == secret
    assert (len(ek), len(ciphertext)) == (suite.ek_bytes, suite.ct_bytes)


@each_suite
def test_ml_kem_rejects_as_an_independent_one_does(suite: Suite) -> None:
    """An altered ciphertext gives the same other secret (FIPS 203, implicit rejection), never an error."""
    peer, seed = PEER_KEM[suite.code], bytes(range(64))
    ek, dk = peer.key_derive(seed)
    secret, ciphertext = peer.encaps(ek)
    altered = bytes([ciphertext[0] ^ 1]) + ciphertext[1:]
    rejected = suite.mlkem_private.from_seed_bytes(seed).decapsulate(altered)
    assert rejected == peer.decaps(dk, altered)
    assert rejected != secret


@each_level
def test_ml_dsa_agrees_with_an_independent_one_in_both_roles(level: int) -> None:
    peer, site = PEER_SIGNER[level], identity.generate(level)
    signatures = sign(site, labels.SIGN_INITIATOR, b"transcript")
    message = labels.SIGN_INITIATOR + b"transcript"
    public = site.public.mldsa.public_bytes_raw()
    assert peer.verify(public, message, signatures[ED25519_SIGNATURE:], ctx=labels.SIGN_INITIATOR)
    derived, secret = peer.key_derive(site.mldsa.private_bytes_raw())
    assert derived == public
    theirs = site.ed25519.sign(message) + peer.sign(secret, message, labels.SIGN_INITIATOR)
    assert verifies(site.public, labels.SIGN_INITIATOR, b"transcript", theirs)


@each_level
def test_both_signatures_must_verify(level: int) -> None:
    site, other = identity.generate(level), identity.generate(level)
    good, foreign = (sign(who, labels.SIGN_RESPONDER, b"data") for who in (site, other))
    label, ed = labels.SIGN_RESPONDER, ED25519_SIGNATURE
    assert len(good) == next(s.signature_bytes for s in SUITES.values() if s.level == level)
    assert verifies(site.public, label, b"data", good)
    assert not verifies(site.public, label, b"data", good[:ed] + foreign[ed:])
    assert not verifies(site.public, label, b"data", foreign[:ed] + good[ed:])
    assert not verifies(other.public, label, b"data", good)
    assert not verifies(site.public, label, b"datb", good)
    assert not verifies(site.public, labels.SIGN_INITIATOR, b"data", good)
    assert not verifies(site.public, label, b"data", good[:-1])
    assert not verifies(site.public, label, b"data", b"")


def test_ml_dsa_context_counts_by_itself() -> None:
    """The label is in the message *and* the context: a signature without the context is not ours."""
    site = identity.generate(3)
    message = labels.SIGN_RESPONDER + b"data"
    without = site.ed25519.sign(message) + site.mldsa.sign(message)
    assert not verifies(site.public, labels.SIGN_RESPONDER, b"data", without)


@each_suite
def test_hybrid_exchange_agrees_and_puts_ml_kem_first(suite: Suite) -> None:
    kem = HybridKem()
    ours = kem.generate(suite)
    answer = kem.encapsulate_untrusted(suite, ours.ek, ours.x25519)
    assert ours.decapsulate_untrusted(answer.ciphertext, answer.x25519) == answer.secret
    mlkem, x25519 = suite.mlkem_private.generate(), X25519PrivateKey.generate()
    ephemeral = HybridEphemeral(mlkem, x25519)
    answer = kem.encapsulate_untrusted(suite, ephemeral.ek, ephemeral.x25519)
    assert answer.secret[:32] == mlkem.decapsulate(answer.ciphertext)
    assert answer.secret[32:] == x25519.exchange(X25519PublicKey.from_public_bytes(answer.x25519))


@each_suite
def test_values_that_must_not_be_used_are_refused(suite: Suite) -> None:
    kem = HybridKem()
    ours = kem.generate(suite)
    answer = kem.encapsulate_untrusted(suite, ours.ek, ours.x25519)
    low_order = bytes(32)
    for ek, x25519 in (
        (ours.ek, low_order),
        (ours.ek, b"\x01" + bytes(31)),
        (b"\xff" * suite.ek_bytes, ours.x25519),
        (ours.ek[:-1], ours.x25519),
        (ours.ek, ours.x25519[:-1]),
    ):
        with pytest.raises(BadPacket):
            kem.encapsulate_untrusted(suite, ek, x25519)
    for ciphertext, x25519 in (
        (answer.ciphertext[:-1], answer.x25519),
        (answer.ciphertext, low_order),
        (answer.ciphertext, b""),
    ):
        with pytest.raises(BadPacket):
            ours.decapsulate_untrusted(ciphertext, x25519)


def test_each_exchange_is_fresh() -> None:
    kem, suite = HybridKem(), SUITES[1]
    one, other = kem.generate(suite), kem.generate(suite)
    assert one.ek != other.ek and one.x25519 != other.x25519
    answers = [kem.encapsulate_untrusted(suite, one.ek, one.x25519) for _ in range(2)]
    assert answers[0].secret != answers[1].secret and answers[0].x25519 != answers[1].x25519


@each_suite
@settings(max_examples=25)
@given(plaintext=st.binary(max_size=200), aad=st.binary(max_size=48), number=st.integers(0, 3), bit=st.integers(0))
def test_aead_notices_every_bit(suite: Suite, plaintext: bytes, aad: bytes, number: int, bit: int) -> None:
    key, iv = bytes(range(32)), bytes(range(12))
    sealed = aead.seal(suite, key, iv, number, aad, plaintext)
    assert len(sealed) == len(plaintext) + TAG
    assert aead.open_untrusted(suite, key, iv, number, aad, sealed) == plaintext
    broken = bytearray(sealed)
    broken[bit // 8 % len(sealed)] ^= 1 << bit % 8
    for attempt in (
        (number, aad, bytes(broken)),
        (number + 1, aad, sealed),
        (number, aad + b"\0", sealed),
        (number, aad, sealed[: TAG - 1]),
    ):
        with pytest.raises(BadPacket):
            aead.open_untrusted(suite, key, iv, *attempt)


def test_nonces_differ_in_their_last_eight_bytes_only() -> None:
    iv = bytes.fromhex("00112233445566778899aabb")
    assert aead.nonce(iv, 0) == iv
    assert aead.nonce(iv, 3) == iv[:11] + bytes([iv[11] ^ 3])
    assert len({aead.nonce(iv, number) for number in range(1000)}) == 1000


@each_level
def test_fingerprint_covers_family_and_both_keys(level: int) -> None:
    one, other = identity.generate(level).public, identity.generate(level).public
    mixed = identity.PublicIdentity(one.ed25519, other.mldsa, level)
    assert len({one.fingerprint, other.fingerprint, mixed.fingerprint}) == 3
    assert len(one.fingerprint) == 48
