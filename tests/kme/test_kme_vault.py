"""Wrapping at rest: site key, epochs that die, damaged rows, and a store that an older release wrote in clear."""

from __future__ import annotations

import base64
import contextlib
import importlib
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest
from alembic.script import ScriptDirectory

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.kme import migrate, schema
from keysource.kme.epochs import EpochKeys, new_site_key, read_site_key, site_key_path
from keysource.kme.records import (
    BadDeposit,
    Deposit,
    KeysNotFound,
    LinkRow,
    Offer,
    StoreError,
    Terms,
    Unit,
    deposit_tag,
    xor,
)
from keysource.kme.store import Store

BOB = Terms("sae-a", ("sae-b",))
TOKEN = "t" * 20


def material(block, position):
    return bytes([0xA0 + block, position + 1]) * 16


def block_of(block, count=4):
    return bytearray(b"".join(material(block, i) for i in range(count)))


def unit(position, block=0):
    return Unit(derive_key_id("link", block, position), block)


@contextlib.contextmanager
def opened(folder, end=End.A, **options):
    store = Store(folder / "kme.sqlite", "kme", max_keys=1000, **options)
    try:
        yield store, store.bind_link(LinkRow("other", "link", end, Owner.A, Origin.QKD, 0))
    finally:
        store.close()


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return folder


def issue(store, *units, size=256):
    return bytes(store.issue("other", [[u.key_id for u in units]], size)[0].material)


# Sizes


@pytest.mark.parametrize("size", [8, 64, 128, 248, 256, 264, 512, 1000])
def test_a_key_is_whole_units_cut_to_size_at_both_ends(tmp_path, size):
    homes = [tmp_path / end for end in "ab"]
    terms = Terms("sae-a", ("sae-b",), size)
    units = [unit(i) for i in range(terms.units)]
    offer = Offer(*units[0], TOKEN, tuple(units[1:]))
    with opened(homes[0]) as (a, row_a), opened(homes[1], End.B) as (b, row_b):
        a.add_block(row_a, 0, block_of(0))
        b.add_block(row_b, 0, block_of(0))
        assert b.reserve("other", terms, [offer], 1.0).missing == []
        assert b.reserve("other", terms, [offer], 1.0).missing == []  # the same again
        other_size = Terms("sae-a", ("sae-b",), size + 8)
        assert b.reserve("other", other_size, [offer], 1.0).missing
        mine = issue(a, *units, size=size)
        [theirs] = b.fetch("sae-a", "sae-b", [offer.key_id])
        assert mine == bytes(theirs.material) == bytes(block_of(0))[: size // 8]
        assert a.counts("other").own_free == b.counts("other").peer_free == 4 - terms.units


def test_a_key_with_one_missing_unit_is_not_reserved_and_the_others_stay(home):
    with opened(home, End.B) as (b, row):
        b.add_block(row, 0, block_of(0))
        terms = Terms("sae-a", ("sae-b",), 512)
        bad = Offer(*unit(0), TOKEN, (unit(9),))
        answer = b.reserve("other", terms, [bad, Offer(*unit(1), TOKEN * 2, (unit(2),))], 1.0)
        assert answer.missing == [unit(9).key_id]
        assert (b.counts("other").peer_free, b.counts("other").reserved) == (2, 1)


# Several slaves


def test_each_slave_gets_the_key_once_and_the_last_takes_it_away(home):
    three = Terms("sae-a", ("s1", "s2", "s3"))
    with opened(home, End.B) as (b, row):
        b.add_block(row, 0, block_of(0))
        b.reserve("other", three, [Offer(*unit(0), TOKEN)], 1.0)
        for slave in ("s2", "s1", "s3"):
            [key] = b.fetch("sae-a", slave, [unit(0).key_id])
            assert bytes(key.material) == material(0, 0)
            with pytest.raises(KeysNotFound):
                b.fetch("sae-a", slave, [unit(0).key_id])
        assert b._db.execute("SELECT count(*) FROM delivery").fetchone() == (0,)
        assert b.counts("other").fetched == 3


# One key over two links


def deposit_for(terms, key, *, pad=0, mac=1, mac_key=None, key_id="11111111-1111-8111-8111-111111111111"):
    masked = bytes(xor(key, material(0, pad)))
    made = Deposit(key_id, TOKEN, (unit(pad),), unit(mac), masked, b"")
    tag = deposit_tag(mac_key or material(0, mac), "link", terms, made)
    return Deposit(key_id, TOKEN, made.pad, made.mac, masked, tag)


def test_a_deposit_comes_out_as_it_went_in_and_its_pad_is_spent(home):
    terms = Terms("sae-a", ("sae-b",), 256, Origin.SIMULATED, 3)
    key = os.urandom(32)
    with opened(home, End.B) as (b, row):
        b.add_block(row, 0, block_of(0))
        deposit = deposit_for(terms, key)
        for _ in range(2):  # an answer that was lost
            answer = b.deposit("other", terms, [deposit], 1.0)
            assert (answer.missing, answer.origin, answer.hops) == ([], Origin.SIMULATED, 3)
        assert b.counts("other").peer_free == 2
        [got] = b.fetch("sae-a", "sae-b", [deposit.key_id])
        assert (bytes(got.material), got.origin, got.hops) == (key, Origin.SIMULATED, 3)
        assert b.deposit("other", terms, [deposit], 1.0).missing == [unit(0).key_id, unit(1).key_id]


@pytest.mark.parametrize("spoil", ["mac", "masked", "slave", "origin", "name"])
def test_a_deposit_that_is_not_authentic_is_refused_and_its_pad_burnt(home, spoil):
    terms = Terms("sae-a", ("sae-b",), 256, Origin.RELAYED, 1)
    made = deposit_for(terms, bytes(32))
    match spoil:
        case "mac":
            made = deposit_for(terms, bytes(32), mac_key=bytes(32))
        case "masked":
            made = Deposit(made.key_id, TOKEN, made.pad, made.mac, bytes(32), made.tag)
        case "slave":
            terms = Terms("sae-a", ("sae-c",), 256, Origin.RELAYED, 1)
        case "origin":
            terms = Terms("sae-a", ("sae-b",), 256, Origin.QKD, 1)
        case "name":  # authentic, but named like a unit that another master may be given
            made = deposit_for(terms, bytes(32), key_id=unit(3).key_id)
    with opened(home, End.B) as (b, row):
        b.add_block(row, 0, block_of(0))
        with pytest.raises(BadDeposit):
            b.deposit("other", terms, [made], 1.0)
        assert (b.counts("other").peer_free, b.counts("other").reserved) == (2, 0)


def test_a_deposit_may_not_claim_more_than_its_link(home):
    terms = Terms("sae-a", ("sae-b",), 256, Origin.QKD, 0)
    with opened(home, End.B) as (b, _):
        row = b.bind_link(LinkRow("other", "link", End.B, Owner.A, Origin.SIMULATED, 0))
        b.add_block(row, 0, block_of(0))
        with pytest.raises(BadDeposit, match="claims more"):
            b.deposit("other", terms, [deposit_for(terms, bytes(32))], 1.0)


def test_withdrawn_keys_are_gone_for_every_slave(home):
    with opened(home, End.B) as (b, row):
        b.add_block(row, 0, block_of(0))
        b.reserve("other", Terms("sae-a", ("s1", "s2")), [Offer(*unit(0), TOKEN)], 1.0)
        assert b.withdraw("another", [TOKEN]) == 0
        assert b.withdraw("other", [TOKEN, "u" * 20]) == 1
        with pytest.raises(KeysNotFound):
            b.fetch("sae-a", "s1", [unit(0).key_id])


# Site key and epochs


def test_no_file_of_the_store_has_a_key_in_clear(home):
    with opened(home, End.B) as (b, row):
        b.add_block(row, 0, block_of(0, 40))
        b.reserve("other", BOB, [Offer(*unit(0), TOKEN)], 1.0)
        b.begin_epoch(2.0)
        while b.rewrap():
            pass
        b.fetch("sae-a", "sae-b", [unit(0).key_id])
        everything = {file.name: file.read_bytes() for file in home.iterdir()}
    for name, content in everything.items():
        for position in range(40):
            assert material(0, position) not in content, name


@pytest.mark.parametrize("spelling", [bytes, base64.b64encode, lambda raw: base64.b64encode(raw) + b"\n"])
def test_a_site_key_is_32_bytes_or_their_base64(tmp_path, spelling):
    path = tmp_path / "site.key"
    path.write_bytes(spelling(bytes(range(200, 232))))
    path.chmod(0o600)
    assert read_site_key(path) == bytes(range(200, 232))
    path.chmod(0o640)
    with pytest.raises(StoreError, match="0640"):
        read_site_key(path)


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33, base64.b64encode(b"x" * 16)])
def test_what_is_no_site_key_is_refused(tmp_path, content):
    path = tmp_path / "site.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="32 bytes"):
        read_site_key(path)


def test_a_credential_of_the_service_manager(tmp_path, monkeypatch):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(StoreError, match="CREDENTIALS_DIRECTORY"):
        site_key_path("credential:kme", tmp_path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/kme.service")
    assert str(site_key_path("credential:kme", tmp_path)) == "/run/credentials/kme.service/kme"
    assert site_key_path("a/b", tmp_path) == tmp_path / "a/b"


def test_with_another_site_key_or_none_the_store_does_not_open_and_is_not_harmed(home, tmp_path):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    new_site_key(right)
    new_site_key(wrong)
    with opened(home, site_key=right) as (a, row):
        a.add_block(row, 0, block_of(0))
    for path, says in ((wrong, "another site key"), (None, "another site key"), (tmp_path / "no", "No such file")):
        with pytest.raises(StoreError, match=says), opened(home, site_key=path):
            pass
    epochs = home / "kme.sqlite.epochs"
    kept = epochs.read_bytes()
    epochs.unlink()
    with pytest.raises(StoreError, match="not in this file"), opened(home, site_key=right):
        pass
    epochs.write_bytes(kept)
    with opened(home, site_key=right) as (a, _):
        assert issue(a, unit(0)) == material(0, 0)


def test_a_destroyed_epoch_makes_every_copy_useless(home, tmp_path):
    """Copies of database and log from before, the site key of today: nothing can be read."""
    with opened(home) as (a, row):
        a.add_block(row, 0, block_of(0))
        first, _ = a.epoch
        old = tmp_path / "copy"
        shutil.copytree(home, old)
        a.begin_epoch(5.0)
        assert a.epoch == (first + 1, 5.0)
        while a.rewrap(2):
            pass
        assert a._epochs.alive == [first + 1]
        assert issue(a, unit(1)) == material(0, 1)
    shutil.copy(home / "kme.sqlite.epochs", old / "kme.sqlite.epochs")
    with pytest.raises(StoreError, match=f"epoch {first} is not in this file"), opened(old):
        pass
    with opened(home) as (a, _):
        assert issue(a, unit(2)) == material(0, 2)


def test_what_is_left_of_a_destroyed_epoch_key(home):
    """The bytes of its slot are gone from the file, and a number never comes back."""
    with opened(home) as (a, row):
        a.add_block(row, 0, block_of(0))
        for number in range(2, 30):
            before = a._epochs.path.read_bytes()
            a.begin_epoch(float(number))
            while a.rewrap():
                pass
            after = a._epochs.path.read_bytes()
            slots = [before[32 + 128 * i :][:68] for i in range(8)]
            assert not any(slot in after for slot in slots if any(slot))
            assert a.epoch[0] == number
        assert issue(a, unit(0)) == material(0, 0)
    (home / "kme.sqlite.epochs").unlink()
    with pytest.raises(StoreError), opened(home):
        pass


def test_a_torn_slot_is_no_reason_to_stop(home):
    with opened(home) as (a, row):
        a.add_block(row, 0, block_of(0))
    with (home / "kme.sqlite.epochs").open("r+b") as file:
        file.seek(32 + 5 * 128)
        file.write(os.urandom(60))
    with opened(home) as (a, _):
        assert issue(a, unit(0)) == material(0, 0)
        assert not any(a._epochs.path.read_bytes()[32 + 5 * 128 :][:128])


@pytest.mark.parametrize("content", [b"", b"nonsense" * 200])
def test_a_file_of_epoch_keys_that_is_none(home, content):
    path = home / "x.epochs"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="not a file of epoch keys"):
        EpochKeys(path, bytes(32), "kme")


def test_a_damaged_row_is_said_once_and_stops_nobody_twice(home):
    with opened(home, End.B) as (b, row):
        b.add_block(row, 0, block_of(0))
        b.reserve("other", BOB, [Offer(*unit(0), TOKEN), Offer(*unit(1), "u" * 20)], 1.0)
        b._db.execute("UPDATE delivery SET slave = 'sae-x' WHERE key_id = ?", (unit(0).key_id,))  # made over
        with pytest.raises(StoreError, match="damaged"):
            b.fetch("sae-a", "sae-x", [unit(0).key_id])
        with pytest.raises(KeysNotFound):
            b.fetch("sae-a", "sae-x", [unit(0).key_id])
        assert b.fetch("sae-a", "sae-b", [unit(1).key_id])


def test_rows_cannot_change_places(home):
    with opened(home) as (a, row):
        a.add_block(row, 0, block_of(0))
        rows = dict(a._db.execute("SELECT key_id, material FROM key").fetchall())
        first, second = unit(0).key_id, unit(1).key_id
        for here, there in ((first, second), (second, first)):
            a._db.execute("UPDATE key SET material = ? WHERE key_id = ?", (rows[there], here))
        with pytest.raises(StoreError, match="damaged"):
            issue(a, unit(0))


# A store of the first release

OLD = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE link (peer TEXT PRIMARY KEY, name TEXT NOT NULL, end TEXT NOT NULL, owner TEXT NOT NULL,
    origin TEXT NOT NULL, hops INTEGER NOT NULL, next_block INTEGER NOT NULL, alarm TEXT NOT NULL,
    issued INTEGER NOT NULL, fetched INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE key (key_id TEXT PRIMARY KEY, peer TEXT NOT NULL, own INTEGER NOT NULL, block INTEGER NOT NULL,
    position INTEGER NOT NULL, origin TEXT NOT NULL, hops INTEGER NOT NULL, material BLOB NOT NULL, master TEXT,
    slave TEXT, token TEXT, since REAL) WITHOUT ROWID;
CREATE INDEX key_order ON key (peer, own, master, block, position);
CREATE INDEX key_since ON key (since) WHERE since IS NOT NULL;
INSERT INTO meta VALUES ('kme', 'kme');
INSERT INTO link VALUES ('other', 'link', 'b', 'a', 'qkd', 0, 1, '', 7, 3);
"""


def old_store(home):
    path = home / "kme.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(OLD)
        for position in range(4):
            taken = ("sae-a", "sae-b", TOKEN, 1000.0) if position == 3 else (None,) * 4
            row = (unit(position).key_id, "other", 0, 0, position, "qkd", 0, material(0, position), *taken)
            db.execute(f"INSERT INTO key VALUES ({', '.join('?' * 12)})", row)
        db.commit()
    path.chmod(0o600)


def test_a_store_in_clear_is_wrapped_and_keeps_everything(home):
    old_store(home)
    assert material(0, 0) in (home / "kme.sqlite").read_bytes()
    with opened(home, End.B) as (b, row):
        assert b.migrated
        assert row.next_block == 1
        counts = b.counts("other")
        assert (counts.peer_free, counts.reserved, counts.issued, counts.fetched) == (3, 1, 7, 3)
        [key] = b.fetch("sae-a", "sae-b", [unit(3).key_id])
        assert bytes(key.material) == material(0, 3)
        assert b.reserve("other", BOB, [Offer(*unit(0), TOKEN)], 1.0).missing == []
        for file in home.iterdir():
            assert not any(material(0, position) in file.read_bytes() for position in range(4)), file
    with opened(home, End.B) as (b, _):
        assert not b.migrated
        assert bytes(b.fetch("sae-a", "sae-b", [unit(0).key_id])[0].material) == material(0, 0)


# A store of the second release: wrapped, but not bound to origin and hops

SECOND = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE link (peer TEXT PRIMARY KEY, name TEXT NOT NULL, end TEXT NOT NULL, owner TEXT NOT NULL,
    origin TEXT NOT NULL, hops INTEGER NOT NULL, next_block INTEGER NOT NULL, alarm TEXT NOT NULL,
    issued INTEGER NOT NULL, fetched INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE key (key_id TEXT PRIMARY KEY, peer TEXT NOT NULL, own INTEGER NOT NULL, block INTEGER NOT NULL,
    position INTEGER NOT NULL, origin TEXT NOT NULL, hops INTEGER NOT NULL, epoch INTEGER NOT NULL,
    material BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX key_order ON key (peer, own, block, position);
CREATE INDEX key_epoch ON key (epoch);
CREATE TABLE delivery (key_id TEXT NOT NULL, slave TEXT NOT NULL, master TEXT NOT NULL, peer TEXT NOT NULL,
    size INTEGER NOT NULL, origin TEXT NOT NULL, hops INTEGER NOT NULL, epoch INTEGER NOT NULL, material BLOB,
    token TEXT NOT NULL, since REAL NOT NULL, PRIMARY KEY (key_id, slave)) WITHOUT ROWID;
CREATE INDEX delivery_peer ON delivery (peer);
CREATE INDEX delivery_since ON delivery (since);
CREATE INDEX delivery_epoch ON delivery (epoch);
INSERT INTO meta VALUES ('kme', 'kme'), ('epoch', '1');
INSERT INTO link VALUES ('other', 'link', 'b', 'a', 'qkd', 2, 1, '', 7, 3);
PRAGMA user_version = 2;
"""


def second_store(home):
    """As that release wrote it: labels of the key_ID and the SAEs, nothing else."""
    path = home / "kme.sqlite"
    new_site_key(home / "kme.sqlite.site-key")
    epochs = EpochKeys(home / "kme.sqlite.epochs", read_site_key(home / "kme.sqlite.site-key"), "kme")
    epochs.begin(1, 0.0)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SECOND)
        for position in (0, 1):
            key_id = unit(position).key_id
            label = "\0".join(("unit", key_id, "other", "0")).encode()
            row = (key_id, "other", 0, 0, position, "qkd", 2, 1, epochs.seal(label, material(0, position)))
            db.execute("INSERT INTO key VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        for slave, blob in (("sae-b", material(0, 3)), ("sae-c", None)):
            key_id = unit(3).key_id
            label = "\0".join(("delivery", key_id, slave, "sae-a")).encode()
            wrapped = epochs.seal(label, blob) if blob else None
            row = (key_id, slave, "sae-a", "other", 256, "qkd", 2, 1, wrapped, TOKEN, 1000.0)
            db.execute("INSERT INTO delivery VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        db.commit()
    epochs.close()
    path.chmod(0o600)


def test_a_store_whose_rows_were_bound_to_less_keeps_its_keys(home):
    second_store(home)
    with opened(home, End.B) as (b, row):
        assert b.migrated
        assert (row.next_block, b.counts("other").issued) == (1, 7)
        [key] = b.fetch("sae-a", "sae-b", [unit(3).key_id])
        assert (bytes(key.material), key.hops) == (material(0, 3), 2)
        assert b.reserve("other", BOB, [Offer(*unit(0), TOKEN)], 1.0).missing == []
        assert bytes(b.fetch("sae-a", "sae-b", [unit(0).key_id])[0].material) == material(0, 0)
    with opened(home, End.B) as (b, _):
        assert not b.migrated


def test_a_row_of_the_second_release_that_cannot_be_unwrapped_is_dropped(home):
    second_store(home)
    with contextlib.closing(sqlite3.connect(home / "kme.sqlite")) as db:
        db.execute("UPDATE key SET key_id = 'another' WHERE position = 1")
        db.commit()
    with opened(home, End.B) as (b, _):
        assert b.counts("other").peer_free == 1
        assert b.counts("other").reserved == 1


@pytest.mark.parametrize("make", [old_store, second_store])
def test_an_old_file_ends_with_the_tables_of_a_new_one(home, tmp_path, make):
    def tables(folder):
        with contextlib.closing(sqlite3.connect(folder / "kme.sqlite")) as db:
            names = db.execute("SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2").fetchall()
            columns = {name: db.execute(f"PRAGMA table_info({name})").fetchall() for kind, name, _ in names}
            indices = {name: db.execute(f"PRAGMA index_info({name})").fetchall() for kind, name, _ in names}
            step = db.execute("SELECT version_num FROM alembic_version").fetchall()
            return names, columns, indices, step, db.execute("PRAGMA user_version").fetchone()

    make(home)
    with opened(home, End.B):
        pass
    fresh = tmp_path / "fresh"
    with opened(fresh, End.B):
        pass
    assert tables(home) == tables(fresh)


def test_the_steps_are_those_of_the_folder():
    script = ScriptDirectory(str(migrate.FOLDER))
    assert script.get_heads() == [migrate.HEAD]
    assert [step.revision for step in reversed(list(script.walk_revisions()))] == list(migrate.STEPS)


def test_a_step_writes_the_labels_that_the_store_reads():
    step = importlib.import_module("keysource.kme.migrations.versions.step_0003")
    assert step.unit_label("id", "peer", 1, "qkd", 2) == schema.unit_label("id", "peer", 1, "qkd", 2)
    waiting = ("id", "slave", "master", "peer", 256, "qkd", 2)
    assert step.delivery_label(*waiting) == schema.delivery_label(*waiting)


def test_a_new_store_needs_no_alembic(home):
    code = "import sys; from pathlib import Path; from keysource.kme.store import Store\n"
    code += "Store(Path(sys.argv[1]), 'kme', max_keys=10).close(); print('alembic' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(home / "kme.sqlite")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("change", ["origin = 'qkd'", "hops = 0", "size = 128", "peer = 'third'"])
def test_a_waiting_row_cannot_be_made_better_than_it_is(home, change):
    with opened(home, End.B) as (b, _):
        row = b.bind_link(LinkRow("other", "link", End.B, Owner.A, Origin.SIMULATED, 3))
        b.add_block(row, 0, block_of(0))
        b.reserve("other", BOB, [Offer(*unit(0), TOKEN)], 1.0)
        b._db.execute(f"UPDATE delivery SET {change}")
        with pytest.raises(StoreError, match="damaged"):
            b.fetch("sae-a", "sae-b", [unit(0).key_id])


@pytest.mark.parametrize("change", ["origin = 'qkd'", "hops = 0"])
def test_a_free_row_cannot_be_made_better_than_it_is(home, change):
    with opened(home) as (a, _):
        row = a.bind_link(LinkRow("other", "link", End.A, Owner.A, Origin.SIMULATED, 3))
        a.add_block(row, 0, block_of(0))
        a._db.execute(f"UPDATE key SET {change}")
        with pytest.raises(StoreError, match="damaged"):
            issue(a, unit(0))


def test_a_store_of_a_newer_release_is_left_alone(home):
    with opened(home):
        pass
    with contextlib.closing(sqlite3.connect(home / "kme.sqlite")) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(StoreError, match="newer release"), opened(home):
        pass
    with contextlib.closing(sqlite3.connect(home / "kme.sqlite")) as db:
        db.execute("PRAGMA user_version=3")
        db.execute("UPDATE alembic_version SET version_num = '0099'")
        db.commit()
    with pytest.raises(StoreError, match="newer release"), opened(home):
        pass


def test_two_processes_cannot_share_epoch_keys(tmp_path):
    """The second one's start would free the slots that it cannot read: the first one's keys."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir(mode=0o700)
    shared = tmp_path / "epochs"
    with opened(tmp_path / "a", epoch_keys=shared):
        before = shared.read_bytes()
        with pytest.raises(StoreError, match="another KME process uses these epoch keys"):
            Store(tmp_path / "b" / "kme.sqlite", "kme-b", max_keys=10, epoch_keys=shared)
        assert shared.read_bytes() == before
    with opened(tmp_path / "a", epoch_keys=shared):
        pass  # the lock went with it


def test_a_site_key_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "site.key"

    def no_link(*names):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space"):
        broken.setattr(os, "link", no_link)
        new_site_key(path)
    assert not list(tmp_path.iterdir())
    new_site_key(path)
    first = path.read_bytes()
    with pytest.raises(FileExistsError):
        new_site_key(path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["site.key"]
    assert path.stat().st_mode & 0o777 == 0o600
