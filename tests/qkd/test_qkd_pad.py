"""The authentication pad: no ticket twice, whatever dies when; restored backups refuse; both ends stay in step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keysource.private import create_private, write_private
from keysource.qkd import pad as pad_module
from keysource.qkd.distill.mac import TICKET_BYTES, Ticket, Transcript
from keysource.qkd.errors import BadFrame, LinkSettings, PadEmpty, RolledBackLink, StateLost
from keysource.qkd.files import lock_folder, read_private
from keysource.qkd.pad import HEAD_BYTES, Claims, LinkState, make_pad

NOBODY: frozenset[int] = frozenset()
SYNC = os.fsync


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests lose power by loading anew; one test below looks at the real calls."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def make_end(folder: Path, pad: bytes, end: str = "a") -> LinkState:
    folder.mkdir(exist_ok=True)
    file = folder / "auth.pad"
    if not file.exists():
        create_private(file, pad)
    return LinkState(folder, file, "test", end)


def settle(a: LinkState, b: LinkState) -> None:
    of_a, of_b = a.claims(NOBODY), b.claims(NOBODY)
    a.check_rollback(of_b)
    b.check_rollback(of_a)
    a.settle(of_b)
    b.settle(of_a)


def test_tickets_of_the_file_come_in_order_and_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    pad = make_pad(HEAD_BYTES + 3 * TICKET_BYTES + 50)
    state = make_end(tmp_path / "a", pad)
    assert state.base_tickets == state.tickets_left == 3
    for i in range(3):
        ticket = state.spend(state.next_ticket(), i)
        start = HEAD_BYTES + i * TICKET_BYTES
        assert b"".join(ticket.key(k) for k in range(3)) == pad[start : start + TICKET_BYTES]
    with pytest.raises(PadEmpty, match="make a new pad"):
        state.next_ticket()
    state.refill(2, [os.urandom(TICKET_BYTES)])
    assert state.tickets_left == 1 and state.spend(state.next_ticket(), 3)


def test_what_was_spent_is_spent_after_a_crash_at_any_point(tmp_path: Path) -> None:
    """The state is loaded anew after each step: a killed process never did more than its last fsync."""
    pad, used = make_pad(4096), []
    for block in range(20):
        state = make_end(tmp_path / "a", pad)
        assert state.next_block == block
        number = state.next_ticket()
        ticket = state.spend(number, block)
        used.append(ticket.key(0))
        if block % 3 == 0:
            make_end(tmp_path / "a", pad).refill(block, [os.urandom(TICKET_BYTES) for _ in range(2)])
    assert len(set(used)) == 20


def test_it_is_on_disk_before_the_ticket_is_given_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_end(tmp_path / "a", make_pad(4096))

    def full_disk(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pad_module, "write_private", full_disk)
    with pytest.raises(StateLost, match="No space left"):
        state.spend(0, 0)


def test_write_private_syncs_file_and_folder_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), SYNC(fd))[-1]
    )
    write_private(tmp_path / "state", b"x")
    assert synced[0].startswith(f"{tmp_path}/state") and synced[-1] == str(tmp_path)


@pytest.mark.parametrize(("number", "block"), [(1, 0), (0, 1), (0, 5), (1 << 62, 0)])
def test_a_ticket_or_block_out_of_step_is_refused_and_costs_nothing(tmp_path: Path, number: int, block: int) -> None:
    state = make_end(tmp_path / "a", make_pad(4096))
    with pytest.raises(BadFrame, match="out of step"):
        state.spend(number, block)
    assert state.spent == 0 and state.next_ticket() == 0


def test_a_restored_backup_refuses_when_the_peer_has_seen_more(tmp_path: Path) -> None:
    pad = make_pad(8192)
    a, b = make_end(tmp_path / "a", pad), make_end(tmp_path / "b", pad, "b")
    settle(a, b)
    shutil.copytree(tmp_path / "a", tmp_path / "backup")
    for block in range(3):
        ticket = a.next_ticket()
        a.spend(ticket, block)
        b.saw(a.spent)
        b.spend(ticket, block)
        a.saw(b.spent)
    restored = make_end(tmp_path / "backup", pad)
    with pytest.raises(RolledBackLink, match="backup"):
        restored.check_rollback(b.claims(NOBODY))
    b.check_rollback(a.claims(NOBODY))


def test_ordinary_lag_after_a_crash_is_no_rollback(tmp_path: Path) -> None:
    """Alice spent and died before Bob heard of it."""
    pad = make_pad(8192)
    a, b = make_end(tmp_path / "a", pad), make_end(tmp_path / "b", pad, "b")
    settle(a, b)
    a.spend(a.next_ticket(), 0)
    a = make_end(tmp_path / "a", pad)
    settle(a, b)
    assert a.next_ticket() == b.next_ticket() == 1 and a.next_block == b.next_block == 1 and a.spent == b.spent


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["pass", "abort", "a dies", "b dies", "a keeps", "b keeps"]), max_size=25), st.data())
def test_random_lives_of_a_link_never_use_a_ticket_twice_and_stay_in_step(
    tmp_path_factory: pytest.TempPathFactory, story: list[str], data: st.DataObject
) -> None:
    """Every way a block can end, with the crash at that point; then both meet again."""
    folder = tmp_path_factory.mktemp("life")
    pad = make_pad(HEAD_BYTES + 30 * TICKET_BYTES)
    a, b = make_end(folder / "a", pad), make_end(folder / "b", pad, "b")
    used: dict[str, set[bytes]] = {"a": set(), "b": set()}
    for event in story:
        settle(a, b)
        number, block, wanted = a.next_ticket(), a.next_block, a.refills_wanted()
        assert b.refills_wanted() == wanted
        of_a = a.spend(number, block).key(0)
        assert of_a not in used["a"], "pad twice"
        used["a"].add(of_a)
        if event == "a dies":
            a = make_end(folder / "a", pad)
            continue
        b.saw(a.spent)
        of_b = b.spend(number, block).key(0)
        assert of_b not in used["b"] and of_b == of_a
        used["b"].add(of_b)
        fresh = [os.urandom(TICKET_BYTES) for _ in range(wanted)]
        if event == "b dies":
            b = make_end(folder / "b", pad, "b")
            continue
        a.saw(b.spent)
        if event in ("pass", "b keeps"):
            b.refill(block, fresh)
        if event in ("pass", "a keeps"):
            a.refill(block, fresh)
        if event in ("a keeps", "b keeps"):  # the commit was lost: the connection broke
            a, b = make_end(folder / "a", pad), make_end(folder / "b", pad, "b")


def test_a_link_whose_blocks_pass_lives_for_ever_on_three_tickets(tmp_path: Path) -> None:
    a = make_end(tmp_path / "a", make_pad(HEAD_BYTES + 3 * TICKET_BYTES))
    for block in range(200):
        a.spend(a.next_ticket(), block)
        a.refill(block, [os.urandom(TICKET_BYTES)] * a.refills_wanted())
    assert pad_module.REFILL_TARGET <= a.tickets_left <= pad_module.REFILL_TARGET + 3


def test_the_head_of_the_pad_is_never_a_ticket_and_each_purpose_has_its_key(tmp_path: Path) -> None:
    pad = make_pad(4096)
    state = make_end(tmp_path / "a", pad)
    keys = {state.link_key(purpose) for purpose in (b"hello", b"fibre", b"name")}
    assert len(keys) == 3
    assert state.spend(0, 0).key(0) == pad[HEAD_BYTES : HEAD_BYTES + 32]


def test_state_and_pad_are_private_and_belong_together(tmp_path: Path) -> None:
    pad = make_pad(4096)
    state = make_end(tmp_path / "a", pad)
    assert (tmp_path / "a" / "link.json").stat().st_mode & 0o777 == 0o600
    assert pad.hex() not in repr(state) and repr(Ticket(3, bytes(96))) == "Ticket(3)"
    with pytest.raises(LinkSettings, match="another link, end or pad"):
        LinkState(tmp_path / "a", tmp_path / "a" / "auth.pad", "test", "b")
    create_private(tmp_path / "other.pad", make_pad(4096))
    with pytest.raises(LinkSettings, match="another link, end or pad"):
        LinkState(tmp_path / "a", tmp_path / "other.pad", "test", "a")
    (tmp_path / "other.pad").chmod(0o640)
    with pytest.raises(LinkSettings, match="open to others"):
        read_private(tmp_path / "other.pad", "the pad")
    with pytest.raises(LinkSettings, match="no authentication pad"):
        LinkState(tmp_path, tmp_path / "missing.pad", "test", "a")
    create_private(tmp_path / "short.pad", bytes(100))
    with pytest.raises(LinkSettings, match="100 bytes"):
        LinkState(tmp_path, tmp_path / "short.pad", "test", "a")
    with pytest.raises(FileExistsError):
        create_private(tmp_path / "short.pad", b"")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "\x00\xff"])
def test_a_state_that_is_something_else_is_one_sentence(tmp_path: Path, text: str) -> None:
    pad = make_pad(4096)
    make_end(tmp_path / "a", pad)
    (tmp_path / "a" / "link.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LinkSettings, match=r"link\.json"):
        make_end(tmp_path / "a", pad)


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    held = lock_folder(tmp_path / "state")
    with pytest.raises(LinkSettings, match="another process"):
        lock_folder(tmp_path / "state")
    os.close(held)
    os.close(lock_folder(tmp_path / "state"))


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 2))
def test_a_tag_fits_its_transcript_and_no_other(one: bytes, other: bytes, kind: int) -> None:
    key = bytes(range(32))
    left, right = Transcript(), Transcript()
    left.add(b"A", kind, one)
    right.add(b"A", kind, other)
    tag = left.tag(key)
    assert left.fits(key, tag)
    assert right.fits(key, tag) == (one == other)
    turned, split = Transcript(), Transcript()
    turned.add(b"B", kind, one)
    split.add(b"A", kind, one[: len(one) // 2])
    split.add(b"A", kind, one[len(one) // 2 :])
    assert not turned.fits(key, tag) and not split.fits(key, tag)


def test_poly1305_is_the_one_of_rfc_8439() -> None:
    """RFC 8439 section 2.5.2, so that the proof's bound speaks of this function."""
    from cryptography.hazmat.primitives.poly1305 import Poly1305

    key = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
    tag = Poly1305.generate_tag(key, b"Cryptographic Forum Research Group")
    assert tag.hex() == "a8061dc1305136c6c22b8baf0c0127a9"


def test_the_forgery_bound_grows_with_the_transcript() -> None:
    transcript = Transcript()
    transcript.add(b"A", 1, bytes(16 * 1000 - 10))
    assert transcript.forgery() == 8 * 1000 / 2**106


@pytest.mark.parametrize("raw", [
    None, {}, [], {"spent": 1},
    {"spent": -5, "seen": 0, "base_next": 0, "refills": [], "next_block": 0, "acked": 0, "held": []},
    {"spent": True, "seen": 0, "base_next": 0, "refills": [], "next_block": 0, "acked": 0, "held": []},
    {"spent": 1, "seen": 0, "base_next": 0, "refills": [1 << 64], "next_block": 0, "acked": 0, "held": []},
    {"spent": 1, "seen": 0, "base_next": 0, "refills": "no", "next_block": 0, "acked": 0, "held": []},
    {"spent": 1, "seen": 0, "base_next": 0, "refills": [], "next_block": 0, "acked": 0, "held": list(range(9999))},
])  # fmt: skip
def test_claims_of_another_form_are_refused(raw: object) -> None:
    with pytest.raises(BadFrame):
        Claims.from_untrusted(raw)
