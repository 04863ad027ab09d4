"""Shares, the one-time MAC and the confirmation: against a model, and against whoever bends bits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keysource.network import onetime, shares
from keysource.network.errors import NotAuthentic

TERMS = shares.Terms(
    "0b0e7f5e-0000-4000-8000-000000000001", "long", 3, 2, (("a", "b", "c"), ("a", "d", "c")), "relayed"
)


def poly1305_model(key: bytes, message: bytes) -> bytes:
    """RFC 8439 clause 2.5.1, in whole numbers."""
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    s, total = int.from_bytes(key[16:], "little"), 0
    for start in range(0, len(message), 16):
        total = (total + int.from_bytes(message[start : start + 16] + b"\1", "little")) * r % (2**130 - 5)
    return ((total + s) % 2**128).to_bytes(16, "little")


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=80), st.binary(max_size=80))
def test_the_tag_is_poly1305_over_both_with_their_lengths(key: bytes, header: bytes, masked: bytes) -> None:
    framed = len(header).to_bytes(8, "big") + header + len(masked).to_bytes(8, "big") + masked
    tag = onetime.tag(key, header, masked)
    assert tag == poly1305_model(key, framed)
    onetime.check(key, header, masked, tag)


@given(st.binary(min_size=1, max_size=40), st.binary(max_size=40), st.data())
def test_any_flipped_bit_is_seen(header: bytes, masked: bytes, data: st.DataObject) -> None:
    key = bytes(range(7, 39))
    tag = onetime.tag(key, header, masked)
    parts = [bytearray(header), bytearray(masked), bytearray(tag)]
    part = data.draw(st.sampled_from([p for p in parts if p]))
    bit = data.draw(st.integers(0, 8 * len(part) - 1))
    part[bit // 8] ^= 1 << bit % 8
    with pytest.raises(NotAuthentic):
        onetime.check(key, bytes(parts[0]), bytes(parts[1]), bytes(parts[2]))
    if header:
        with pytest.raises(NotAuthentic):  # a byte moved from one to the other
            onetime.check(key, header[:-1], header[-1:] + masked, tag)


@given(st.binary(min_size=1, max_size=200))
def test_a_pad_hides_and_gives_back(body: bytes) -> None:
    source = random.Random(len(body))
    pad = [source.randbytes(32) for _ in range(onetime.units_for(len(body)) - 1)]
    masked = onetime.mask(body, pad)
    assert onetime.mask(masked, pad) == body and len(masked) == len(body)
    assert bytes(a ^ b for a, b in zip(masked, body, strict=True)) == b"".join(pad)[: len(body)]
    with pytest.raises(ValueError, match="shorter"):
        onetime.mask(body, pad[:-1])


@pytest.mark.parametrize("paths", [1, 2, 3, 5])
def test_all_shares_are_needed(paths: int) -> None:
    secret, parts = shares.new_shares(2, paths, random.Random(paths).randbytes)
    assert len(secret.keys) == 64 and len(secret.value) == shares.VALUE_BYTES
    assert shares.joined(parts) == secret
    if paths > 1:
        # For every other secret there is a missing share that makes it: k - 1 shares say nothing.
        wanted = random.Random(99).randbytes(len(parts[0]))
        known = shares.joined(parts[1:])
        whole = bytes(known.keys + known.value)
        other = bytearray(a ^ b for a, b in zip(wanted, whole, strict=True))
        made = shares.joined([other, *parts[1:]])
        assert bytes(made.keys + made.value) == wanted


def sent(index: int = 0) -> tuple[shares.PrivateKey, bytes, bytes, bytes]:
    private, ek = shares.new_kem()
    wrapping, kem = shares.encapsulate_untrusted(ek)
    share = bytes(2 * 32 + shares.VALUE_BYTES)
    return private, wrapping, kem, shares.wrap(wrapping, TERMS, index, share)


def test_a_wrapped_share_is_bound_to_its_place() -> None:
    private, wrapping, kem, blob = sent()
    assert len(blob) == shares.wrapped_bytes(2)
    assert shares.decapsulate_untrusted(private, kem) == wrapping
    assert shares.unwrap_untrusted(wrapping, TERMS, 0, blob) == bytes(128)
    for terms, index in (
        (TERMS, 1),
        (replace(TERMS, block=4), 0),
        (replace(TERMS, origin="qkd"), 0),
        (replace(TERMS, paths=TERMS.paths[::-1]), 0),
        (replace(TERMS, transfer="0b0e7f5e-0000-4000-8000-000000000002"), 0),
    ):
        with pytest.raises(NotAuthentic):
            shares.unwrap_untrusted(wrapping, terms, index, blob)


def test_an_altered_share_or_ciphertext_is_seen() -> None:
    private, wrapping, kem, blob = sent()
    for place in (0, 63, len(blob) - 1):
        bent = bytearray(blob)
        bent[place] ^= 0x80
        with pytest.raises(NotAuthentic):
            shares.unwrap_untrusted(wrapping, TERMS, 0, bent)
    other = shares.decapsulate_untrusted(private, bytes([kem[0] ^ 1]) + kem[1:])
    with pytest.raises(NotAuthentic):
        shares.unwrap_untrusted(other, TERMS, 0, blob)
    for length in (0, 31, 1087, 1089):
        with pytest.raises(NotAuthentic):
            shares.decapsulate_untrusted(private, bytes(length))
    with pytest.raises(NotAuthentic):
        shares.encapsulate_untrusted(bytes(1184)[:-1] + b"")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 * 256 + 512 - 1), st.booleans())
def test_without_ml_kem_a_bent_share_still_fails_the_confirmation(bit: int, by_target: bool) -> None:
    """What a corrupt node does that has broken ML-KEM and holds one of two shares: it can bend, and not pass."""
    secret, parts = shares.new_shares(2, 2, random.Random(bit).randbytes)
    parts[1][bit // 8] ^= 1 << bit % 8
    bent = shares.joined(parts)
    assert bent != secret
    here, there = (shares.confirmation(end, TERMS, b"ek", b"ct", by_target=by_target) for end in (secret, bent))
    half = slice(0, 32) if by_target else slice(32, 64)
    if bent.keys != secret.keys or bent.value[half] != secret.value[half]:
        with pytest.raises(NotAuthentic):
            shares.confirm(here, there)


def test_the_confirmation_covers_everything_and_each_direction() -> None:
    secret, _parts = shares.new_shares(2, 1, random.Random(1).randbytes)
    first = shares.confirmation(secret, TERMS, b"ek", b"ct", by_target=True)
    shares.confirm(first, first)
    others = [
        shares.confirmation(secret, TERMS, b"ek", b"ct", by_target=False),
        shares.confirmation(secret, TERMS, b"ekc", b"t", by_target=True),
        shares.confirmation(secret, replace(TERMS, paths=(("a", "c"),)), b"ek", b"ct", by_target=True),
        shares.confirmation(secret, replace(TERMS, count=1), b"ek", b"ct", by_target=True),
        shares.confirmation(secret, replace(TERMS, connection="other"), b"ek", b"ct", by_target=True),
    ]
    for other in others:
        with pytest.raises(NotAuthentic):
            shares.confirm(first, other)
    assert len({first, *others}) == 6


def test_nothing_shows_its_bytes() -> None:
    secret, parts = shares.new_shares(1, 1, random.Random(1).randbytes)
    assert "bytearray" not in repr(secret) and bytes(parts[0]).hex()[:8] not in repr(secret)
