"""What lies wrapped in a node's store is bound to what stands beside it; and stores of release 1."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.kme.epochs import EpochKeys, new_site_key, read_site_key
from keysource.kme.records import StoreError
from keysource.network import crashes
from keysource.network.errors import Lacking, TooFew
from keysource.network.rows import Block, Facts
from keysource.network.store import NodeStore
from tests.network.hostile import Net, topology

KEYS = random.Random(3).randbytes(32 * 12)
FACTS = Facts(Origin.RELAYED, 1, (("a", "b", "c"), ("a", "d", "c")))


def opened(folder: Path) -> NodeStore:
    return NodeStore(folder / "node" / "relay.sqlite", "a", max_units=1000)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[NodeStore]:
    with contextlib.closing(opened(tmp_path)) as store:
        for name in ("a-b", "a-d"):
            store.bind_link(name, End.A, Owner.ALTERNATE)
        store.add_block("a-b", 0, bytearray(KEYS), Origin.SIMULATED)
        yield store


def unit_of(position: int, block: int = 0) -> str:
    return derive_key_id("a-b", block, position)


@pytest.mark.parametrize(
    "edit",
    [
        "own = 1",  # both ends would mask under it
        "link = 'a-d'",
        "block = 7",
        "position = 90",
        "origin = 'qkd'",
        "key_id = 'f0000000-0000-8000-8000-000000000000'",
        "material = (SELECT material FROM unit ORDER BY position DESC LIMIT 1)",
        "material = 'text'",
        "epoch = 99",
    ],
)
def test_an_edited_unit_is_never_used(store: NodeStore, edit: str) -> None:
    """Drawn or spent, from whichever end it now seems to be: its bytes do not come out, and it is gone."""
    store._db.execute("DELETE FROM unit WHERE own = 0 AND position <> 1 OR own = 1 AND position <> 10")
    theirs, last = unit_of(1), unit_of(10)
    store._db.execute(f"UPDATE unit SET {edit} WHERE key_id = ?", (theirs,))
    (name,) = store._db.execute("SELECT key_id FROM unit WHERE key_id <> ?", (last,)).fetchone()
    taken: list[bytes] = []
    for link in ("a-b", "a-d"):
        with contextlib.suppress(Lacking):
            taken += [bytes(unit) for unit in store.spend(link, [name])]
        for count in (2, 1):
            with contextlib.suppress(TooFew):
                taken += [bytes(unit) for _key_id, unit in store.draw(link, count)]
    assert KEYS[32:64] not in taken
    assert len(store.damage) == 1 and "edited or damaged" in store.damage[0]
    assert KEYS[32:64].hex() not in store.damage[0] and theirs not in store.damage[0]
    assert store._db.execute("SELECT count(*) FROM unit").fetchone() == (0,)


def test_an_unedited_one_is(store: NodeStore) -> None:
    """What the test above would see if labels bound nothing."""
    assert bytes(store.spend("a-b", [unit_of(1)])[0]) == KEYS[32:64]
    assert [bytes(unit) for _key_id, unit in store.draw("a-b", 2)] == [KEYS[:32], KEYS[64:96]]
    assert store.damage == []


@pytest.mark.parametrize(
    "edit",
    [
        "facts = replace(facts, 'relayed', 'qkd')",
        "facts = replace(facts, '\"hops\": 1', '\"hops\": 0')",
        "facts = replace(facts, '\"b\"', '\"e\"')",
        "connection = 'other'",
        "block = 8",
        "transfer = 'other'",
        "prepared = 1",
        "tag = x'00'",
        "material = (SELECT material FROM block WHERE block = 6)",
    ],
)
def test_an_edited_block_is_never_delivered(store: NodeStore, edit: str) -> None:
    for number in (5, 6):
        keys = bytearray(KEYS[32 * number : 32 * number + 32])
        store.commit(Block("long", number, f"transfer {number}", FACTS, keys))
    store._db.execute(f"UPDATE block SET {edit} WHERE block = 5")
    blocks = [block for name in ("long", "other") for block in store.outbox(name)]
    assert [(block.block, bytes(block.keys)) for block in blocks] == [(6, KEYS[192:224])]
    assert store.prepared("long") is None
    assert len(store.damage) == 1 and "edited or damaged" in store.damage[0]
    assert store._db.execute("SELECT count(*) FROM block").fetchone() == (1,)


def test_settling_and_rewrapping_keep_what_a_block_says(store: NodeStore, tmp_path: Path) -> None:
    block = Block("long", 3, "transfer", FACTS, bytearray(KEYS[:64]), b"tag")
    store.prepare(block)
    store.begin_epoch(1.0)
    while store.rewrap():
        pass
    store.close()
    store.__init__(tmp_path / "node" / "relay.sqlite", "a", max_units=1000)  # type: ignore[misc]
    assert store.prepared("long") == block and store.outbox("long") == []
    store.settle(block, committed=True)
    assert store.prepared("long") is None and store.outbox("long") == [block]
    assert store.last("long") == (4, "transfer") and store.damage == []
    assert [bytes(unit) for _key_id, unit in store.draw("a-b", 2)] == [KEYS[:32], KEYS[64:96]]


def test_units_of_a_link_that_the_map_has_called_less_go(store: NodeStore) -> None:
    """Under a map that says "qkd" where it said "simulated", a node would make more of them than they are."""
    store.add_block("a-b", 1, bytearray(KEYS), Origin.QKD)
    assert store.drop_worse("a-b", Origin.SIMULATED) == 0
    assert store.drop_worse("a-d", Origin.QKD) == 0
    assert store.drop_worse("a-b", Origin.QKD) == 12
    link = store.link("a-b")
    assert link is not None and (link.own, link.peers) == (6, 6)
    assert store._db.execute("SELECT DISTINCT block, origin FROM unit").fetchall() == [(1, "qkd")]


# A store of release 1

RELEASE_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE link (name TEXT PRIMARY KEY, end TEXT NOT NULL, owner TEXT NOT NULL, next_block INTEGER NOT NULL,
    alarm TEXT NOT NULL, seen_block INTEGER NOT NULL, seen_position INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE unit (key_id TEXT PRIMARY KEY, link TEXT NOT NULL, own INTEGER NOT NULL, block INTEGER NOT NULL,
    position INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX unit_order ON unit (link, own, block, position);
CREATE TABLE connection (name TEXT PRIMARY KEY, next_block INTEGER NOT NULL, last_transfer TEXT NOT NULL)
    WITHOUT ROWID;
CREATE TABLE block (connection TEXT NOT NULL, block INTEGER NOT NULL, transfer TEXT NOT NULL, prepared INTEGER NOT
    NULL, facts TEXT NOT NULL, tag BLOB NOT NULL, PRIMARY KEY (connection, block)) WITHOUT ROWID;
CREATE TABLE secret (name TEXT PRIMARY KEY, epoch INTEGER NOT NULL, material BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX secret_epoch ON secret (epoch);
PRAGMA user_version=1;
"""


def release_1(folder: Path, name: str = "a") -> None:
    """As that release left it: a block to deliver, one that is prepared, a damaged one, and four units."""
    home = folder / "node"
    home.mkdir(mode=0o700)
    new_site_key(home / "relay.sqlite.site-key")
    epochs = EpochKeys(home / "relay.sqlite.epochs", read_site_key(home / "relay.sqlite.site-key"), name)
    epochs.begin(4, 1.0)
    path = home / "relay.sqlite"
    path.touch(0o600)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(RELEASE_1)
        db.execute("INSERT INTO meta VALUES ('node', ?), ('epoch', '4')", (name,))
        db.execute("INSERT INTO link VALUES ('a-b', 'a', 'alternate', 9, 'qber: 25 %', 7, 3)")
        db.execute("INSERT INTO connection VALUES ('long', 8, 'transfer 6')")
        for number in range(4):
            db.execute("INSERT INTO unit VALUES (?, 'a-b', ?, 8, ?)", (unit_of(number, 8), number % 2, number))
            db.execute("INSERT INTO secret VALUES (?, 4, ?)", (f"unit/{unit_of(number, 8)}", b"x" * 60))
        for number, prepared, label in ((5, 0, "block/5/long"), (6, 0, "another"), (7, 1, "block/7/long")):
            row = ("long", number, f"transfer {number}", prepared, FACTS.text(), b"tag")
            db.execute("INSERT INTO block VALUES (?, ?, ?, ?, ?, ?)", row)
            sealed = epochs.seal(label.encode(), KEYS[32 * number : 32 * number + 32])
            db.execute("INSERT INTO secret VALUES (?, 4, ?)", (f"block/{number}/long", sealed))
        db.commit()
    epochs.close()


def test_a_store_of_release_1_keeps_its_blocks_and_loses_its_units(tmp_path: Path) -> None:
    release_1(tmp_path)
    for turn in range(2):  # brought up to date, and then as any other
        with contextlib.closing(opened(tmp_path)) as store:
            assert [(b.block, bytes(b.keys), b.facts) for b in store.outbox("long")] == [(5, KEYS[160:192], FACTS)]
            waiting = store.prepared("long")
            assert waiting is not None and (waiting.block, waiting.tag) == (7, b"tag")
            link = store.link("a-b")
            assert link is not None and (link.own, link.peers, link.next_block, link.alarm) == (0, 0, 9, "qber: 25 %")
            assert store.last("long") == (8, "transfer 6") and store.seen("a-b") == (7, 3)
            assert len(store.damage) == (1 if turn == 0 else 0)
            tables = {row[0] for row in store._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            assert "secret" not in tables
            if turn == 1:
                store._db.execute("UPDATE block SET facts = replace(facts, 'relayed', 'qkd') WHERE block = 7")
            assert (store.prepared("long") is None) == (turn == 1), "its blocks are bound from now on"


def test_a_store_of_another_node_or_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    release_1(tmp_path, "b")
    with pytest.raises(StoreError, match="store of node 'b'"):
        opened(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "node" / "relay.sqlite")) as db:
        db.execute("PRAGMA user_version=3")
    with pytest.raises(StoreError, match="version 3"):
        opened(tmp_path)


def test_two_nodes_go_on_when_one_store_was_of_release_1(tmp_path: Path) -> None:
    """It has lost the other's pads, and its own that the other still keeps: fresh blocks make it good."""
    net = Net(tmp_path, topology([("a", "b"), ("b", "c")], ("a", "c")), seed=21)
    net.feed(60)
    net.run(1.5)
    net.stores["b"]._db.execute("DELETE FROM unit")
    net.reboot("b")
    before = len(net.keys("a"))
    net.feed(100)
    net.run(15.0)
    left, right = net.keys("a"), net.keys("c")
    assert left == right and len(left) > before
    net.close()


_OPEN = """
import sys
from pathlib import Path
from keysource.network import crashes
from keysource.network.store import NodeStore
crashes.arm_from_environment()
NodeStore(Path(sys.argv[1]), "a", max_units=1000).close()
"""


def test_killed_while_a_store_is_brought_up_to_date(tmp_path: Path) -> None:
    """All of it, or the store of release 1 as it was."""
    for kill in range(3):
        home = tmp_path / str(kill)
        home.mkdir()
        release_1(home)
        command = [sys.executable, "-c", _OPEN, str(home / "node" / "relay.sqlite")]
        environment = os.environ | {crashes.VARIABLE: "migrate.in-transaction"}
        died = subprocess.run(command, env=environment, check=False, capture_output=True)
        assert died.returncode == -9, died.stderr
        with contextlib.closing(sqlite3.connect(home / "node" / "relay.sqlite")) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (1,)
            assert db.execute("SELECT count(*) FROM secret").fetchone() == (7,)
        with contextlib.closing(opened(home)) as store:
            assert [bytes(block.keys) for block in store.outbox("long")] == [KEYS[160:192]]
            waiting = store.prepared("long")
            assert waiting is not None and bytes(waiting.keys) == KEYS[224:256]
