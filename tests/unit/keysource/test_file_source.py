"""Couriered key material: format, permissions, position on disk, rollback, claims, one process at a time."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keysource.base import Claiming, End, Hop, KeySource, Origin, Owner, SourceContext, derive_key_id
from keysource.errors import BadAnswer, BadSettings, Exhausted, NotOwner, RolledBack, Unavailable, UnknownKeyID
from keysource.file import format as key_format
from keysource.file.format import Header, decode_untrusted, write_pair
from keysource.file.position import WINDOW, Position, PositionFile
from keysource.file.source import FileSource

# The format


@given(st.binary(min_size=16, max_size=16), st.integers(1, key_format.MAX_KEYS), st.sampled_from(list(Owner)))
def test_header_round_trip(link: bytes, count: int, owner: Owner) -> None:
    header = Header(link, count, owner)
    assert len(header.encode()) == key_format.HEADER_BYTES
    assert decode_untrusted(header.encode()) == header


def test_header_bytes_are_as_documented() -> None:
    data = Header(bytes(range(16)), 10_000, Owner.B).encode()
    assert data[:32] == b"QVPNKEYS" + b"\x01\x02\x00\x20" + b"\x00\x00\x27\x10" + bytes(range(16))


@given(st.binary(max_size=100))
@example(b"")
@example(b"QVPNKEYS" + bytes(60))
def test_any_other_bytes_are_refused_with_a_sentence(data: bytes) -> None:
    with pytest.raises(BadSettings):
        decode_untrusted(data)


@given(st.integers(0, 63), st.integers(1, 255))
def test_every_byte_of_the_header_counts(place: int, change: int) -> None:
    data = bytearray(Header(bytes(16), 7).encode())
    data[place] ^= change
    with pytest.raises(BadSettings):
        decode_untrusted(bytes(data))


def test_pair_is_equal_private_and_never_overwritten(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        link = write_pair(tmp_path / "a", tmp_path / "b", 5)
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "a", tmp_path / "b")] == [0o600, 0o600]
    assert len(link) == 32
    with pytest.raises(FileExistsError):
        write_pair(tmp_path / "c", tmp_path / "b", 5)
    assert not (tmp_path / "c").exists()
    assert write_pair(tmp_path / "d", tmp_path / "e", 5) != link
    with pytest.raises(ValueError, match="1 to"):
        write_pair(tmp_path / "f", tmp_path / "g", 0)


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keysource.file", str(tmp_path / "a"), str(tmp_path / "b"), "--keys", "3"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    header = decode_untrusted((tmp_path / "b").read_bytes())
    assert (header.link, header.count) == (made.stdout.strip(), 3)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (1, f"{tmp_path / 'a'}: File exists\n")


# The source


def make(folder: Path, end: str, **more: object) -> FileSource:
    folder.mkdir(exist_ok=True, mode=0o700)
    return FileSource({"path": "keys", "end": end, **more}, SourceContext("f", folder, folder, "site"))


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[FileSource, FileSource]]:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    write_pair(tmp_path / "a/keys", tmp_path / "b/keys", 21)
    await a.start()
    await b.start()
    yield a, b
    await a.aclose()
    await b.aclose()


def test_is_a_claiming_key_source(tmp_path: Path) -> None:
    source = make(tmp_path, "a")
    assert isinstance(source, KeySource)
    assert isinstance(source, Claiming)


@pytest.mark.parametrize(
    "table,key",
    [
        ({"end": "a"}, "path"),
        ({"path": "x"}, "end"),
        ({"path": "x", "end": "c"}, "end"),
        ({"path": "x", "end": "a", "owner": "me"}, "owner"),
        ({"path": "x", "end": "a", "colour": "red"}, "colour"),
        ({"path": 7, "end": "a"}, "path"),
    ],
)
def test_wrong_table_names_the_key(table: dict[str, object], key: str, tmp_path: Path) -> None:
    with pytest.raises(BadSettings) as caught:
        FileSource(table, SourceContext("f", tmp_path, tmp_path, "site"))
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")


async def test_keys_come_in_order_of_own_positions_with_derived_ids(
    pair: tuple[FileSource, FileSource], tmp_path: Path
) -> None:
    a, b = pair
    link = a.sae_pair("x").local.removesuffix("/a")
    content = (tmp_path / "a/keys").read_bytes()
    for source, first in ((a, 0), (b, 1)):
        for position in (first, first + 2, first + 4):
            key = await source.get_key("x")
            assert key.key_id == derive_key_id(link, 0, position)
            assert bytes(key.material) == content[64 + 32 * position :][:32]
            assert key.origin is Origin.COURIERED


async def test_status_and_exhaustion(pair: tuple[FileSource, FileSource]) -> None:
    a, b = pair
    status = await a.status("x")
    assert (status.ready, status.stored_keys, status.hop, status.survives_harvest) == (True, 11, Hop.LOCAL, True)
    for _ in range(11):
        await a.get_key("x")
    status = await a.status("x")
    assert (status.ready, status.stored_keys) == (True, 0)  # b's keys can still be fetched
    with pytest.raises(Exhausted, match="all 11 keys of end a are used"):
        await a.get_key("x")
    for _ in range(10):
        await a.get_key_with_id("x", (await b.get_key("x")).key_id)
    assert not (await a.status("x")).ready


async def test_one_owner_means_one_issuer(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", "a"), make(tmp_path / "b", "b", owner="a")
    write_pair(tmp_path / "a/keys", tmp_path / "b/keys", 3, Owner.A)
    await a.start()
    await b.start()
    with pytest.raises(NotOwner):
        await b.get_key("x")
    keys = [await a.get_key("x") for _ in range(3)]
    assert [await b.get_key_with_id("x", key.key_id) for key in keys] == keys
    await a.aclose()
    await b.aclose()
    wrong = make(tmp_path / "b", "b", owner="b")
    with pytest.raises(BadSettings, match='made with owner = "a"'):
        await wrong.start()


async def test_used_keys_are_overwritten_in_both_files(pair: tuple[FileSource, FileSource], tmp_path: Path) -> None:
    a, b = pair
    key = await a.get_key("x")
    await b.get_key_with_id("x", key.key_id.upper())
    for site in "ab":
        content = (tmp_path / site / "keys").read_bytes()
        assert not any(content[64:96])
        assert any(content[96:128])


async def test_restart_goes_on_and_old_ids_stay_used(pair: tuple[FileSource, FileSource], tmp_path: Path) -> None:
    a, b = pair
    used = [(await a.get_key("x")).key_id for _ in range(3)]
    await b.get_key_with_id("x", used[0])
    await b.get_key_with_id("x", used[2])  # the one between was lost on the way
    await a.aclose()
    await b.aclose()
    a2, b2 = make(tmp_path / "a", "a"), make(tmp_path / "b", "b")
    await a2.start()
    await b2.start()
    assert (await a2.get_key("x")).key_id not in used
    for key_id in (used[0], used[2]):
        with pytest.raises(UnknownKeyID, match=r"keys: key [04] of end a was used before$"):
            await b2.get_key_with_id("x", key_id)
    assert (await b2.get_key_with_id("x", used[1])).key_id == used[1]
    a2.check_claim(b2.claim())
    b2.check_claim(a2.claim())
    await a2.aclose()
    await b2.aclose()


async def test_position_is_on_disk_before_the_key_is_read(
    pair: tuple[FileSource, FileSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _b = pair
    done: list[str] = []
    real_fsync, real_preadv = os.fsync, os.preadv
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(os, "preadv", lambda *args: (done.append("read"), real_preadv(*args))[1])
    await a.get_key("x")
    assert done == ["fsync", "fsync", "read"]  # file, folder, key


async def test_unwritable_state_gives_no_key_and_heals(
    pair: tuple[FileSource, FileSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _b = pair

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable, match="cannot be written"):
            await a.get_key("x")
    link = a.sae_pair("x").local.removesuffix("/a")
    assert (await a.get_key("x")).key_id == derive_key_id(link, 0, 0)


@pytest.mark.parametrize("end", ["a", "b"])
async def test_older_state_is_noticed_by_the_overwritten_keys(
    pair: tuple[FileSource, FileSource], tmp_path: Path, end: str
) -> None:
    source = pair["ab".index(end)]
    await source.get_key("x")
    [state] = (tmp_path / end).glob("*.position")
    backup = state.read_bytes()
    await source.get_key("x")
    await source.aclose()
    state.write_bytes(backup)
    restored = make(tmp_path / end, end)
    with pytest.raises(RolledBack, match="was used before"):
        await restored.start()


async def test_lost_state_is_noticed_too(pair: tuple[FileSource, FileSource], tmp_path: Path) -> None:
    a, _b = pair
    await a.get_key("x")
    await a.aclose()
    for state in (tmp_path / "a").glob("*.position"):
        state.unlink()
    with pytest.raises(RolledBack):
        await make(tmp_path / "a", "a").start()


async def test_restored_snapshot_of_everything_is_noticed_by_the_peer(
    pair: tuple[FileSource, FileSource], tmp_path: Path
) -> None:
    a, b = pair
    await a.aclose()
    shutil.copytree(tmp_path / "a", tmp_path / "snapshot")
    shutil.copytree(tmp_path / "a", tmp_path / "second")
    a2 = make(tmp_path / "snapshot", "a")
    await a2.start()
    await b.get_key_with_id("x", (await a2.get_key("x")).key_id)
    a2.check_claim(b.claim())
    await a2.aclose()
    a3 = make(tmp_path / "second", "a")
    await a3.start()
    with pytest.raises(RolledBack, match="0 positions are used, the peer has seen 1"):
        a3.check_claim(b.claim())
    with pytest.raises(RolledBack):
        await a3.get_key("x")
    with pytest.raises(RolledBack):
        await a3.get_key_with_id("x", (await b.get_key("x")).key_id)
    assert not (await a3.status("x")).ready
    await a3.aclose()


async def test_claims_of_another_link_or_the_same_end_are_told_apart(
    pair: tuple[FileSource, FileSource], tmp_path: Path
) -> None:
    a, _b = pair
    with pytest.raises(BadAnswer, match='both sites say end = "a"'):
        a.check_claim(a.claim())
    stranger = make(tmp_path / "c", "b")
    write_pair(tmp_path / "c/keys", tmp_path / "d", 3)
    await stranger.start()
    with pytest.raises(BadAnswer, match="another key file"):
        a.check_claim(stranger.claim())
    await stranger.aclose()


@given(st.binary(max_size=80))
def test_any_claim_is_accepted_or_refused_in_order(claim: bytes) -> None:
    source = object.__new__(FileSource)
    source._end = End.A  # type: ignore[attr-defined]
    source._keys = type("K", (), {"header": Header(bytes(16), 4), "position": Position()})()
    with pytest.raises(BadAnswer):
        source.check_claim(claim)


async def test_one_process_at_a_time(pair: tuple[FileSource, FileSource], tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="another process"):
        await make(tmp_path / "a", "a").start()
    await pair[0].aclose()
    again = make(tmp_path / "a", "a")
    await again.start()
    await again.aclose()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
async def test_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    write_pair(tmp_path / "keys", tmp_path / "copy", 3)
    (tmp_path / "keys").chmod(mode)
    with pytest.raises(BadSettings, match="chmod 600"):
        await make(tmp_path, "a").start()


async def test_missing_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(BadSettings, match="No such file"):
        await make(tmp_path, "a").start()
    write_pair(path, tmp_path / "copy", 3)
    os.truncate(path, 64 + 95)
    with pytest.raises(BadSettings, match="not complete; it should hold 3"):
        await make(tmp_path, "a").start()
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----" * 9)
    with pytest.raises(BadSettings, match="not a file of key material"):
        await make(tmp_path, "a").start()
    path.unlink()
    path.mkdir()
    with pytest.raises(BadSettings):
        await make(tmp_path, "a").start()


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"version": 1}', "\x00" * 80])
async def test_damaged_state_never_starts_at_zero(tmp_path: Path, text: str) -> None:
    link = write_pair(tmp_path / "keys", tmp_path / "copy", 3)
    (tmp_path / f"keyfile-{link}-a.position").write_text(text)
    with pytest.raises(BadSettings, match="damaged"):
        await make(tmp_path, "a").start()


async def test_closed_source_gives_nothing(pair: tuple[FileSource, FileSource]) -> None:
    a, _b = pair
    await a.aclose()
    await a.aclose()
    with pytest.raises(Unavailable):
        await a.get_key("x")
    with pytest.raises(Unavailable):
        a.claim()


async def test_cancelled_draw_burns_its_key(pair: tuple[FileSource, FileSource]) -> None:
    a, _b = pair
    before = await a.get_key("x")
    task = asyncio.create_task(a.get_key("x"))
    while not a.claim().endswith((3).to_bytes(4, "big") + bytes(4)):  # position 2 is on disk
        await asyncio.sleep(0)
    task.cancel()
    after = await a.get_key("x")
    assert len({before.key_id, after.key_id}) == 2
    link = a.sae_pair("x").local.removesuffix("/a")
    assert after.key_id == derive_key_id(link, 0, 4)


# The position, against a slow model


@given(st.lists(st.integers(0, 3 * WINDOW), max_size=40))
def test_position_never_forgets_a_use(order: list[int]) -> None:
    others = range(1, 4 * WINDOW, 2)
    place, used = Position(), set()
    for position in (2 * n + 1 for n in order if 2 * n + 1 in others):
        if position in used:
            assert place.was_fetched(position)
        elif not place.was_fetched(position):
            place = place.fetched(position, others)
        used.add(position)
        assert all(place.was_fetched(p) for p in used)
        assert len(place.missing) <= WINDOW
    recent = [p for p in others if place.seen - WINDOW < p < place.seen]
    assert all(place.was_fetched(p) == (p in used) for p in recent)


def test_position_file_survives_a_crash_before_the_rename(tmp_path: Path) -> None:
    file = PositionFile(tmp_path, "ab" * 16, End.A)
    assert file.open() == Position()
    file.write(Position(3, 4, frozenset({1})))
    file.close()
    (tmp_path / f"{file.path.name}.new").write_text('{"version"')
    assert file.open() == Position(3, 4, frozenset({1}))
    file.close()
    assert json.loads(file.path.read_text())["missing"] == [1]
    assert file.path.stat().st_mode & 0o777 == 0o600
