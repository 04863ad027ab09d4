"""Names, owners, key_IDs, and how a ``type`` becomes a source."""

from __future__ import annotations

import hashlib
import os
import uuid
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keysource import registry
from keysource.base import End, Key, Origin, Owner, SourceContext, derive_key_id
from keysource.device.framing import Decoder, Frame, encode
from keysource.errors import BadAnswer, BadSettings
from keysource.file.source import FileSource
from keysource.simulated.source import SimulatedSource


def test_owner_alternates_or_stays() -> None:
    assert [Owner.ALTERNATE.of(i) for i in range(4)] == [End.A, End.B, End.A, End.B]
    assert {Owner.A.of(i) for i in range(9)} == {End.A}
    assert {Owner.B.of(i) for i in range(9)} == {End.B}
    assert (End.A.other, End.B.other) == (End.B, End.A)


def test_key_id_is_the_documented_uuid8() -> None:
    # RFC 9562 clause 5.8: version 8 and variant bits over a digest of our own choice, here spelled out by hand.
    name = b"qvpn key_ID v1" + bytes([0, 0, 0, 1]) + b"l" + bytes(7) + b"\x05" + bytes(3) + b"\x09"
    digest = hashlib.sha256(name).hexdigest()[:32]
    variant = "89ab"[int(digest[16], 16) & 3]
    expected = f"{digest[:8]}-{digest[8:12]}-8{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:]}"
    assert derive_key_id("l", 5, 9) == expected
    assert uuid.UUID(expected).version == 8


@given(*[st.tuples(st.text(max_size=5), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))] * 2)
def test_key_ids_differ_where_anything_differs(one: tuple[str, int, int], two: tuple[str, int, int]) -> None:
    assert (derive_key_id(*one) == derive_key_id(*two)) is (one == two)


def test_key_hides_and_wipes() -> None:
    key = Key("id", bytearray(b"\x07" * 32), Origin.QKD)
    assert "07" not in repr(key) and "\\x07" not in repr(key)
    key.wipe()
    assert key.material == bytearray(32)


def test_our_types_are_found_and_open_nothing(tmp_path: Path) -> None:
    context = SourceContext("k", tmp_path, tmp_path, "s")
    assert {"file", "simulated", "etsi014"} <= set(registry.available())
    assert isinstance(registry.open_source("file", {"path": "k", "end": "a"}, context), FileSource)
    assert isinstance(registry.open_source("simulated", {"socket": "s"}, context), SimulatedSource)


def test_a_secret_is_read_only_where_it_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_secret = SourceContext("k", tmp_path, tmp_path, "s").read_secret
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    for mode in (0o604, 0o640, 0o620):
        secret.chmod(mode)
        with pytest.raises(ValueError, match=f"open to others.*{mode:04o}"):
            read_secret(secret)
    secret.chmod(0o600)
    assert read_secret(secret) == b"x"
    (tmp_path / "link").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic link"):
        read_secret(tmp_path / "link")
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ValueError, match="not a file"):
        read_secret(tmp_path / "fifo")
    monkeypatch.setattr(os, "geteuid", lambda: secret.stat().st_uid + 1)
    with pytest.raises(ValueError, match="belongs to user"):
        read_secret(secret)


def test_unknown_type_names_those_installed() -> None:
    with pytest.raises(BadSettings, match=r"unknown key source type 'telepathy'.*file") as caught:
        registry.factory("telepathy")
    assert caught.value.key == "type"


def test_type_that_does_not_import_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_package.x:Y", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    with pytest.raises(BadSettings, match="does not load: No module named"):
        registry.factory("broken")


# The framing of the device socket

headers = st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=9), max_size=4)


@given(st.lists(st.tuples(headers, st.binary(max_size=100)), max_size=5), st.integers(1, 50))
def test_frames_survive_any_cutting(messages: list[tuple[dict[str, object], bytes]], size: int) -> None:
    frames = [Frame(header | {"op": "x"}, bytearray(trailer)) for header, trailer in messages]
    stream = b"".join(bytes(encode(frame.header, frame.trailer)) for frame in frames)
    decoder, seen = Decoder(), []
    for start in range(0, len(stream), size):
        seen += decoder.feed_untrusted(stream[start : start + size])
    assert seen == frames


@given(st.binary(max_size=200))
def test_noise_gives_frames_or_bad_answer(noise: bytes) -> None:
    try:
        frames = Decoder().feed_untrusted(noise)
    except BadAnswer:
        return
    assert all(isinstance(frame.op, str) for frame in frames)


@given(st.binary(max_size=60), st.binary(max_size=20))
def test_any_header_is_an_object_with_op_or_refused(header: bytes, trailer: bytes) -> None:
    size = len(header).to_bytes(4, "big")
    frame = (4 + len(header) + len(trailer)).to_bytes(4, "big") + size + header + trailer
    try:
        frames = Decoder().feed_untrusted(frame)
    except BadAnswer:
        return
    assert all(isinstance(frame.header["op"], str) and frame.trailer == trailer for frame in frames)


def test_too_long_a_frame_is_not_made() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        encode({"op": "x"}, bytes(4 * 1024 * 1024))
    with pytest.raises(ValueError, match="over the limit"):
        encode({"op": "x" * 70_000})
