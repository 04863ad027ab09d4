"""The store by itself, of both kinds: two stores stand for the two ends, and are opened again after an end."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.kme.records import KeysNotFound, LinkRow, NotTheSlave, Offer, StoreError, Terms
from keysource.kme.store import Store
from tests.kme.places import PostgresPlace, SqlitePlace, opened

PAIR = ("sae-a", "sae-b")
LONG = os.environ.get("QVPN_TEST_LONG") == "1"


def issue(store, key_ids):
    """Keys of one unit each."""
    return store.issue("other", [[key_id] for key_id in key_ids], 256)


def block_of(number, count=8):
    return bytearray(b"".join(bytes([number, i]) * 16 for i in range(count)))


@pytest.fixture
def ends(place):
    with opened(place, "a", End.A) as a, opened(place, "b", End.B) as b:
        yield a, b


def test_each_key_is_own_at_exactly_one_end(ends):
    for owner in Owner:
        (a, row_a), (b, row_b) = ends
        for store, row in ((a, row_a), (b, row_b)):
            row = store.bind_link(LinkRow("other", "link", row.end, owner, Origin.QKD, 2))
            store.add_block(row, 1 + list(Owner).index(owner), block_of(1))
    own_a = {key_id for key_id, _ in a.free_own("other", 100)}
    own_b = {key_id for key_id, _ in b.free_own("other", 100)}
    assert len(own_a) == len(own_b) == 12  # 4 of the block that alternates, 8 of their own, 0 of the other's
    assert not own_a & own_b
    assert own_a | own_b == {derive_key_id("link", block, i) for block in (1, 2, 3) for i in range(8)}


def test_issue_gives_the_bytes_once(ends):
    (a, row), _ = ends
    a.add_block(row, 0, block_of(5))
    key_ids = [key_id for key_id, _ in a.free_own("other", 2)]
    keys = issue(a, key_ids)
    assert [bytes(key.material) for key in keys] == [bytes([5, 0]) * 16, bytes([5, 2]) * 16]
    assert [(key.origin, key.hops) for key in keys] == [(Origin.QKD, 2)] * 2
    with pytest.raises(KeysNotFound):
        issue(a, key_ids[:1])
    assert a.counts("other").issued == 2


def test_issue_is_all_or_none(ends):
    (a, row), _ = ends
    a.add_block(row, 0, block_of(5))
    [(good, _)] = a.free_own("other", 1)
    for bad in ("nothing", derive_key_id("link", 0, 1)):  # unknown; owned by the other end
        with pytest.raises(KeysNotFound):
            issue(a, [good, bad])
    assert issue(a, [good])


def reserve(store, key_ids, pair=PAIR, token="t" * 20):
    terms = Terms(pair[0], (pair[1],))
    return store.reserve("other", terms, [Offer(key_id, 0, token) for key_id in key_ids], now=1000.0)


def test_reserve_only_the_other_ends_free_keys(ends):
    (a, row_a), (b, row_b) = ends
    a.add_block(row_a, 0, block_of(1))
    b.add_block(row_b, 0, block_of(1))
    owned_by_a, owned_by_b = derive_key_id("link", 0, 0), derive_key_id("link", 0, 1)
    answer = reserve(b, [owned_by_a, owned_by_b, "nothing"])
    assert answer.missing == [owned_by_b, "nothing"]
    assert reserve(b, [owned_by_a]).missing == []  # the same offer again
    assert reserve(b, [owned_by_a], token="u" * 20).missing == [owned_by_a]  # another offer
    assert reserve(b, [owned_by_a], pair=("sae-a", "sae-c")).missing == [owned_by_a]
    assert reserve(b, [owned_by_a], pair=("sae-x", "sae-b")).missing == [owned_by_a]
    b.fetch(*PAIR, [owned_by_a])
    assert reserve(b, [owned_by_a]).missing == [owned_by_a]  # gone


def test_reserve_tells_the_weakest_of_what_it_holds_now(ends):
    """For the audit log: also of what an earlier offer reserved, and nothing of what is missing."""
    _, (b, row) = ends
    b.add_block(row, 0, block_of(0, 2))
    b.add_block(replace(row, origin=Origin.RELAYED, hops=row.hops + 1), 1, block_of(1, 2))
    fibre, relayed = derive_key_id("link", 0, 0), derive_key_id("link", 1, 0)
    told = [
        (answer.origin, answer.hops)
        for key_ids in (["nothing"], [fibre], [fibre, "nothing"], [fibre, relayed], [relayed])
        for answer in [reserve(b, key_ids)]
    ]
    strong, weak = (Origin.QKD, row.hops), (Origin.RELAYED, row.hops + 1)
    assert told == [(None, 0), strong, strong, weak, weak]


def test_reserve_tells_how_far_the_stock_reaches(ends):
    _, (b, row) = ends
    assert (reserve(b, ["x"]).first_block, reserve(b, ["x"]).next_block) == (0, 0)
    b.add_block(row, 3, block_of(3, 2))
    b.add_block(row, 7, block_of(7, 2))
    answer = reserve(b, [derive_key_id("link", 3, 0)])
    assert (answer.missing, answer.first_block, answer.next_block) == ([], 7, 8)  # block 3's only key of a is taken
    answer = reserve(b, [derive_key_id("link", 7, 0)])
    assert (answer.first_block, answer.next_block) == (8, 8)


def test_fetch_is_for_the_named_pair_and_all_or_none(ends):
    _, (b, row) = ends
    b.add_block(row, 0, block_of(1))
    mine, other = derive_key_id("link", 0, 0), derive_key_id("link", 0, 2)
    reserve(b, [mine])
    reserve(b, [other], pair=("sae-a", "sae-c"))
    with pytest.raises(NotTheSlave):
        b.fetch(*PAIR, [mine, other])
    with pytest.raises(NotTheSlave):
        b.fetch("sae-a", "sae-x", [mine])
    with pytest.raises(KeysNotFound):
        b.fetch("sae-x", "sae-b", [mine])
    for bad in (derive_key_id("link", 0, 4), derive_key_id("link", 0, 1), "nothing", mine):
        with pytest.raises(KeysNotFound):
            b.fetch(*PAIR, [mine, bad])
    [key] = b.fetch(*PAIR, [mine])
    assert bytes(key.material) == bytes([1, 0]) * 16
    with pytest.raises(KeysNotFound):
        b.fetch(*PAIR, [mine])
    assert (b.counts("other").fetched, b.counts("other").reserved) == (1, 1)


def test_a_block_counts_once_and_numbers_never_come_back(ends):
    (a, row), _ = ends
    assert a.add_block(row, 4, block_of(4))
    assert not a.add_block(row, 4, block_of(9))
    assert not a.add_block(row, 2, block_of(2))
    assert a.link("other").next_block == 5
    assert a.counts("other").own_free == 4
    with pytest.raises(StoreError):
        a.add_block(row, 2**63, block_of(1))


def test_void_spares_reserved_keys(ends):
    _, (b, row) = ends
    b.add_block(row, 0, block_of(0))
    b.add_block(row, 1, block_of(1))
    reserved = derive_key_id("link", 0, 0)
    reserve(b, [reserved])
    assert b.void("other", 1) == 7
    assert b.void("other", 2**64) == 8
    assert b.fetch(*PAIR, [reserved])


def test_dropping_keeps_what_is_under_way(ends):
    (a, row), _ = ends
    for number in range(3):
        a.add_block(row, number, block_of(number, 4))
    first, second = (key_id for key_id, _ in a.free_own("other", 2))
    last = derive_key_id("link", 2, 0)
    assert a.drop_own("other", [last], below=1, keep={first}) == 2
    left = [key_id for key_id, _ in a.free_own("other", 10)]
    assert first in left
    assert second not in left
    assert last not in left
    assert a.counts("other").peer_free == 6  # the other end's keys are not ours to drop


def test_reservations_expire(ends):
    _, (b, row) = ends
    b.add_block(row, 0, block_of(0))
    reserve(b, [derive_key_id("link", 0, 0)])
    assert b.expire(1000.0) == 0
    assert b.expire(1000.1) == 1
    assert b.counts("other").reserved == 0


def test_a_full_store_drops_whole_old_blocks_but_no_reservation(place):
    with opened(place, "b", End.B, max_keys=10) as (b, row):
        b.add_block(row, 0, block_of(0))
        reserved = derive_key_id("link", 0, 0)
        reserve(b, [reserved])
        b.add_block(row, 1, block_of(1))
        counts = b.counts("other")
        assert (counts.own_free + counts.peer_free, counts.reserved) == (8, 1)
        assert b.fetch(*PAIR, [reserved])


# On the disk


def test_everything_is_there_after_closing_and_opening(place):
    with opened(place, "b", End.B) as (b, row):
        b.add_block(row, 0, block_of(0))
        reserve(b, [derive_key_id("link", 0, 0)])
        b.set_alarm("other", "qber: high")
    with opened(place, "b", End.B) as (b, row):
        assert (row.next_block, row.alarm, row.hops) == (1, "qber: high", 2)
        assert b.fetch(*PAIR, [derive_key_id("link", 0, 0)])


def test_a_transaction_that_fails_changes_nothing(ends):
    (a, row), _ = ends
    a.add_block(row, 0, block_of(0))
    [first, second] = (unit.key_id for unit in a.free_own("other", 2))
    with pytest.raises(ZeroDivisionError), a._transaction():
        a._db.execute("DELETE FROM key WHERE key_id = ?", (first,))
        raise ZeroDivisionError
    with pytest.raises(KeysNotFound):
        issue(a, [first, second, "nothing"])
    assert a.counts("other").own_free == 4
    assert len(issue(a, [first, second])) == 2


def test_a_block_that_fails_half_way_changes_nothing(tmp_path):
    with opened(SqlitePlace(tmp_path), "a", End.A) as (a, row):
        a._db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON key WHEN NEW.position = 5 BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
        with pytest.raises(sqlite3.Error):
            a.add_block(row, 0, block_of(0))
        assert a.counts("other").own_free == 0
        assert a.link("other").next_block == 0
        a._db.execute("DROP TRIGGER full")
        assert a.add_block(row, 0, block_of(0))


def test_files_are_private_and_written_through(tmp_path):
    with opened(SqlitePlace(tmp_path), "a", End.A) as (a, row):
        a.add_block(row, 0, block_of(0))
        folder = tmp_path / "a"
        assert folder.stat().st_mode & 0o777 == 0o700
        files = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
        assert set(files) >= {
            "kme.sqlite",
            "kme.sqlite-wal",
            "kme.sqlite.lock",
            "kme.sqlite.epochs",
            "kme.sqlite.site-key",
        }
        assert set(files.values()) == {0o600}
        pragma = {name: a._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
        assert pragma == {"journal_mode": "wal", "synchronous": 2}


def test_what_lies_there_is_wrapped_and_overwritten_when_deleted(tmp_path):
    with opened(SqlitePlace(tmp_path), "a", End.A) as (a, row):
        a.add_block(row, 0, block_of(7))
        file = tmp_path / "a" / "kme.sqlite"
        key_id = derive_key_id("link", 0, 0)
        (wrapped,) = a._db.execute("SELECT material FROM key WHERE key_id = ?", (key_id,)).fetchone()
        assert wrapped in file.with_name("kme.sqlite-wal").read_bytes()
        a._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert wrapped in file.read_bytes()
        [key] = issue(a, [key_id])
        assert bytes(key.material) == bytes([7, 0]) * 16
        for each in file.parent.iterdir():
            assert bytes(key.material) not in each.read_bytes(), each
        a._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert wrapped not in file.read_bytes()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: folder.chmod(0o755), "must be 0700"),
        (lambda folder: (folder / "kme.sqlite").chmod(0o644), "must have mode 0600"),
        (lambda folder: (folder / "kme.sqlite").write_bytes(b"no database at all, really" * 100), "not a database"),
    ],
)
def test_a_store_that_will_not_do_is_one_sentence(tmp_path, spoil, says):
    with opened(SqlitePlace(tmp_path), "a", End.A):
        pass
    spoil(tmp_path / "a")
    for _ in range(2):  # and it does not stay locked
        with pytest.raises(StoreError, match=says):
            Store(tmp_path / "a" / "kme.sqlite", "a", max_keys=10)


def test_a_store_belongs_to_one_kme_one_link_and_one_process(tmp_path):
    with opened(SqlitePlace(tmp_path), "a", End.A) as (a, row):
        with pytest.raises(StoreError, match="another KME process"):
            Store(tmp_path / "a" / "kme.sqlite", "a", max_keys=10)
        for other in (
            LinkRow("other", "another link", End.A, Owner.ALTERNATE, Origin.QKD, 0),
            LinkRow("other", "link", End.B, Owner.ALTERNATE, Origin.QKD, 0),
        ):
            with pytest.raises(StoreError, match="the device there says"):
                a.bind_link(other)
        assert a.link("other") == row
    with pytest.raises(StoreError, match="store of KME 'a', not of 'z'"):
        Store(tmp_path / "a" / "kme.sqlite", "z", max_keys=10)


# A slow model beside it


class TwoEnds(RuleBasedStateMachine):
    """Both stores under any order of events, as two dictionaries would have it: no key is ever out twice."""

    def __init__(self, place):
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.a, self.row_a = self.stack.enter_context(opened(place, "a", End.A))
        self.b, self.row_b = self.stack.enter_context(opened(place, "b", End.B))
        self.next_block = 0
        self.at_b = {}  # key_ID -> "free" or token, keys that end a owns
        self.at_a = set()
        self.issued = set()
        self.fetched = set()

    def teardown(self):
        self.stack.close()

    @rule(where=st.sampled_from(["a", "b", "both"]))
    def block(self, where):
        number, self.next_block = self.next_block, self.next_block + 1
        owned = [derive_key_id("link", number, i) for i in (0, 2)]
        if where in ("a", "both"):
            self.a.add_block(self.row_a, number, block_of(number % 256, 4))
            self.at_a.update(owned)
        if where in ("b", "both"):
            self.b.add_block(self.row_b, number, block_of(number % 256, 4))
            self.at_b.update(dict.fromkeys(owned, "free"))

    @rule(count=st.integers(1, 4), token=st.sampled_from(["token-1" * 3, "token-2" * 3]))
    def offer(self, count, token):
        free = self.a.free_own("other", count)
        assert len(free) == min(count, len(self.at_a))
        if not free:
            return
        answer = self.b.reserve(
            "other", Terms(PAIR[0], (PAIR[1],)), [Offer(key_id, block, token) for key_id, block in free], 1.0
        )
        missing = {key_id for key_id, _ in free if self.at_b.get(key_id) not in ("free", token)}
        assert set(answer.missing) == missing
        for key_id, _ in free:
            if key_id not in missing:
                self.at_b[key_id] = token

    @rule(count=st.integers(1, 3))
    def issue(self, count):
        key_ids = [key_id for key_id, _ in self.a.free_own("other", 10) if self.at_b.get(key_id, "free") != "free"]
        if key_ids[:count]:
            for key in issue(self.a, key_ids[:count]):
                assert key.key_id not in self.issued
                self.issued.add(key.key_id)
                self.at_a.discard(key.key_id)

    @rule()
    def fetch(self):
        for key_id in sorted(self.issued - self.fetched):
            if key_id in self.at_b:
                assert [key.key_id for key in self.b.fetch(*PAIR, [key_id])] == [key_id]
                self.fetched.add(key_id)
                del self.at_b[key_id]

    @precondition(lambda self: self.next_block)
    @rule(data=st.data())
    def void(self, data):
        before = data.draw(st.integers(0, self.next_block))
        gone = {derive_key_id("link", block, i) for block in range(before) for i in (0, 2)}
        self.a.void("other", before)
        self.b.void("other", before)
        self.at_a -= gone
        self.at_b = {key_id: state for key_id, state in self.at_b.items() if state != "free" or key_id not in gone}

    @invariant()
    def as_the_model(self):
        assert {key_id for key_id, _ in self.a.free_own("other", 1000)} == self.at_a
        assert self.b.counts("other").reserved == sum(state != "free" for state in self.at_b.values())


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_two_ends_are_as_the_model(request, tmp_path_factory, kind):
    def machine():
        if kind == "sqlite":
            return TwoEnds(SqlitePlace(tmp_path_factory.mktemp("ends")))
        return TwoEnds(PostgresPlace(request.getfixturevalue("postgres")))

    examples = {"sqlite": 20, "postgres": 20 if LONG else 6}[kind]
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None)
    )
