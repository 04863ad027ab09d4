"""Records: exact bytes, limits, and the order of check, decrypt, mark."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from qvpn.tunnel.drops import DropReason
from qvpn.tunnel.keys import Cipher
from qvpn.tunnel.records import CONTROL_BIT, OVERHEAD, Limits, Opener, Refused, Sealer, index_bytes, split_header

KEY = bytes(range(32))
INDEX = 0xA1B2C3D0


def sealed(sealer: Sealer, *plaintexts: bytes) -> list[memoryview]:
    out = memoryview(bytearray(sum(map(len, plaintexts)) + OVERHEAD * len(plaintexts)))
    records, position = [], 0
    for length in sealer.seal_batch([memoryview(plaintext) for plaintext in plaintexts], out):
        records.append(out[position : position + length])
        position += length
    return records


def opened(opener: Opener, record: bytes | memoryview) -> bytes:
    index, counter = split_header(memoryview(record))
    assert index == index_bytes(INDEX)
    out = memoryview(bytearray(len(record)))
    return bytes(out[: opener.open(counter, memoryview(record), out)])


def reason(opener: Opener, record: bytes | memoryview) -> DropReason:
    with pytest.raises(Refused) as caught:
        opened(opener, record)
    return caught.value.reason


@pytest.mark.parametrize(
    ("cipher", "aead"), [(Cipher.AES_256_GCM, AESGCM), (Cipher.CHACHA20_POLY1305, ChaCha20Poly1305)]
)
def test_layout_built_by_hand(cipher: Cipher, aead: type[AESGCM] | type[ChaCha20Poly1305]) -> None:
    """The third record of the second batch, and the second control record, from the text of PROTOCOL.md."""
    sealer = Sealer(cipher, KEY, INDEX)
    sealed(sealer, b"first batch")
    third = sealed(sealer, b"a", b"b", b"third")[2]
    nonce = bytes.fromhex("a1b2c3d0") + (64 + 2).to_bytes(8, "little")
    assert third == bytes.fromhex("10010000") + nonce + aead(KEY).encrypt(nonce, b"third", None)
    sealer.seal_control(b"one")
    nonce = bytes.fromhex("a1b2c3d0") + (2**63 + 1).to_bytes(8, "little")
    assert sealer.seal_control(b"two") == bytes.fromhex("10010000") + nonce + aead(KEY).encrypt(nonce, b"two", None)


def test_no_counter_is_used_twice() -> None:
    sealer = Sealer(Cipher.AES_256_GCM, KEY, INDEX)
    nonces = []
    for size in (1, 64, 63, 2):
        nonces += [bytes(record[4:16]) for record in sealed(sealer, *[b"x"] * size)]
        nonces.append(sealer.seal_control(b"c")[4:16])
    assert len(set(nonces)) == len(nonces) == 134
    assert sealer.calls == 134


@pytest.mark.parametrize("control", [False, True])
def test_open_once_then_replay(control: bool) -> None:
    sealer, opener = Sealer(Cipher.AES_256_GCM, KEY, INDEX), Opener(Cipher.AES_256_GCM, KEY)
    record = sealer.seal_control(b"payload") if control else bytes(sealed(sealer, b"payload")[0])
    assert opened(opener, record) == b"payload"
    assert reason(opener, record) is DropReason.REPLAY
    assert opener.calls == 1


def test_data_and_control_have_windows_of_their_own() -> None:
    sealer, opener = Sealer(Cipher.AES_256_GCM, KEY, INDEX), Opener(Cipher.AES_256_GCM, KEY)
    first_control = sealer.seal_control(b"c0")
    for _ in range(9000):
        sealer.block += 1
    assert opened(opener, sealed(sealer, b"far ahead")[0]) == b"far ahead"
    assert opened(opener, first_control) == b"c0"
    assert (opener.data.marked, opener.control.marked) == (1, 1)


def test_a_forgery_moves_no_window() -> None:
    sealer, opener = Sealer(Cipher.AES_256_GCM, KEY, INDEX), Opener(Cipher.AES_256_GCM, KEY)
    record = bytes(sealed(sealer, b"payload")[0])
    for counter in (0, 1 << 40, CONTROL_BIT, CONTROL_BIT | 5):
        forged = record[:8] + counter.to_bytes(8, "little") + bytes(23)
        assert reason(opener, forged) is DropReason.AUTHENTICATION
    assert (opener.data.highest, opener.control.highest) == (-1, -1)
    assert opened(opener, record) == b"payload"


@pytest.mark.parametrize("position", range(4, 16))
@pytest.mark.parametrize("control", [False, True])
def test_the_nonce_is_under_the_tag(position: int, control: bool) -> None:
    sealer, opener = Sealer(Cipher.AES_256_GCM, KEY, INDEX), Opener(Cipher.AES_256_GCM, KEY)
    record = bytearray(sealer.seal_control(b"payload") if control else sealed(sealer, b"payload")[0])
    record[position] ^= 0x80
    _, counter = split_header(memoryview(record))
    with pytest.raises(Refused) as caught:
        opener.open(counter, memoryview(record), memoryview(bytearray(100)))
    assert caught.value.reason is DropReason.AUTHENTICATION


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("10000000", DropReason.BAD_VERSION),
        ("10020000", DropReason.BAD_VERSION),
        ("10ff0101", DropReason.BAD_VERSION),
        ("10010100", DropReason.BAD_HEADER),
        ("10010001", DropReason.BAD_HEADER),
        ("11010000", DropReason.BAD_HEADER),
        ("00010000", DropReason.BAD_HEADER),
    ],
)
def test_the_four_bytes_outside_the_tag_have_one_value(prefix: str, expected: DropReason) -> None:
    with pytest.raises(Refused) as caught:
        split_header(memoryview(bytes.fromhex(prefix) + bytes(40)))
    assert caught.value.reason is expected


@pytest.mark.parametrize("length", [0, 1, 16, 31])
def test_too_short_is_truncated(length: int) -> None:
    with pytest.raises(Refused) as caught:
        split_header(memoryview((b"\x10\x01" + bytes(40))[:length]))
    assert caught.value.reason is DropReason.TRUNCATED


def test_an_empty_plaintext_is_a_record() -> None:
    sealer, opener = Sealer(Cipher.AES_256_GCM, KEY, INDEX), Opener(Cipher.AES_256_GCM, KEY)
    record = sealer.seal_control(b"")
    assert len(record) == OVERHEAD
    assert opened(opener, record) == b""


def test_a_batch_beyond_the_limit_is_not_sealed_at_all() -> None:
    sealer = Sealer(Cipher.AES_256_GCM, KEY, INDEX, Limits(rekey=2, stop=3))
    assert not sealer.wants_rekey
    sealed(sealer, b"1", b"2")
    assert sealer.wants_rekey
    with pytest.raises(Refused, match="limit"):
        sealed(sealer, b"3", b"4")
    sealed(sealer, b"3")
    with pytest.raises(Refused, match="limit"):
        sealer.seal_control(b"4")
    assert sealer.calls == 3


def test_a_block_holds_no_more_than_64() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        sealed(Sealer(Cipher.AES_256_GCM, KEY, INDEX), *[b"x"] * 65)


def test_nothing_secret_in_a_repr() -> None:
    for thing in (Sealer(Cipher.AES_256_GCM, KEY, INDEX), Opener(Cipher.AES_256_GCM, KEY)):
        assert KEY.hex() not in repr(thing)
        assert repr(KEY)[2:-1] not in repr(thing)
