"""What only a PostgreSQL store has: several processes at once, commits in doubt, claims, epochs that all share."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from keysource.base import End, Origin, Owner, derive_key_id
from keysource.kme import checks, stores
from keysource.kme.config import ConfigError, load
from keysource.kme.epochs import new_site_key
from keysource.kme.pgserver import Server
from keysource.kme.postgres import PostgresStore
from keysource.kme.records import Alarmed, KeysNotFound, LinkRow, Offer, StoreError, Terms
from keysource.kme.scaffold import SitePlan, write_pair
from tests.kme.pgcluster import DATABASE_PASSWORD
from tests.kme.places import PostgresPlace

PROCESSES = 6
ROUNDS = 60 if os.environ.get("QVPN_TEST_LONG") == "1" else 6
PAIR = ("sae-a", "sae-b")
TERMS = Terms("sae-a", ("sae-b",))


@pytest.fixture
def place(postgres):
    return PostgresPlace(postgres)


@pytest.fixture
def several(place):
    """Stores of as many processes; keys of block 0 and on are theirs to issue, or with ``end`` B the other end's."""
    with contextlib.ExitStack() as stack:

        def make(end=End.A, count=PROCESSES):
            stores = [place.store("kme") for _ in range(count)]
            for store in stores:
                stack.callback(store.close)
            row = stores[0].bind_link(LinkRow("other", "link", end, Owner.A, Origin.QKD, 0))
            return stores, row

        yield make


def block_of(count):
    return bytearray(b"".join(bytes([i % 256, i // 256]) * 16 for i in range(count)))


def all_at_once(stores, work):
    """What each of them got, or the error."""
    gate = threading.Barrier(len(stores))

    def run(store):
        gate.wait(10)
        try:
            return work(store)
        except (KeysNotFound, StoreError) as error:
            return error

    with ThreadPoolExecutor(len(stores)) as threads:
        return list(threads.map(run, stores))


# Exactly once


def test_of_many_that_issue_the_same_unit_one_does(several):
    stores, row = several()
    stores[0].add_block(row, 0, block_of(ROUNDS))
    for position in range(ROUNDS):
        key_id = derive_key_id("link", 0, position)
        answers = all_at_once(stores, lambda store, key_id=key_id: store.issue("other", [[key_id]], 256))
        assert sum(isinstance(answer, list) for answer in answers) == 1, answers
    assert stores[1].counts("other").issued == ROUNDS
    assert stores[1].counts("other").own_free == 0


def test_of_many_that_fetch_the_same_key_one_does(several):
    stores, row = several(End.B)
    stores[0].add_block(row, 0, block_of(ROUNDS))
    two = Terms("sae-a", ("sae-b", "sae-c"))
    for position in range(ROUNDS):
        key_id = derive_key_id("link", 0, position)
        assert stores[1].reserve("other", two, [Offer(key_id, 0, "t" * 20)], 1.0).missing == []
        slaves = dict(zip(map(id, stores), ["sae-b", "sae-c"] * PROCESSES, strict=False))
        answers = all_at_once(
            stores,
            lambda store, key_id=key_id, to=slaves: (to[id(store)], store.fetch("sae-a", to[id(store)], [key_id])),
        )
        assert sorted(a[0] for a in answers if isinstance(a, tuple)) == ["sae-b", "sae-c"], answers
    assert stores[1].counts("other").fetched == 2 * ROUNDS
    assert stores[1].counts("other").reserved == 0


def test_an_offer_that_comes_many_times_at_once_is_one_reservation(several):
    stores, row = several(End.B)
    stores[0].add_block(row, 0, block_of(ROUNDS))
    for position in range(ROUNDS):
        offer = Offer(derive_key_id("link", 0, position), 0, "t" * 20)
        answers = all_at_once(stores, lambda store, offer=offer: store.reserve("other", TERMS, [offer], 1.0))
        assert [answer.missing for answer in answers] == [[]] * PROCESSES
    assert stores[0].counts("other").reserved == ROUNDS


def test_of_many_different_offers_for_one_unit_one_is_taken(several):
    stores, row = several(End.B)
    stores[0].add_block(row, 0, block_of(ROUNDS))
    tokens = {id(store): f"token-of-process-number-{i}" for i, store in enumerate(stores)}
    for position in range(ROUNDS):
        key_id = derive_key_id("link", 0, position)
        answers = all_at_once(
            stores,
            lambda store, key_id=key_id: store.reserve("other", TERMS, [Offer(key_id, 0, tokens[id(store)])], 1.0),
        )
        assert sorted(len(answer.missing) for answer in answers) == [0] + [1] * (PROCESSES - 1)


def test_a_block_that_comes_through_several_processes_is_stored_once(several):
    stores, row = several()
    answers = all_at_once(stores, lambda store: store.add_block(row, 0, block_of(8)))
    assert answers.count(True) == 1
    assert stores[0].counts("other").own_free == 8


# Claims


def test_two_processes_never_offer_the_same_unit_and_see_all_of_them(several):
    stores, row = several()
    stores[0].add_block(row, 0, block_of(PROCESSES * 5))
    found = all_at_once(stores, lambda store: store.free_own("other", 5))
    units = [unit for some in found for unit in some]
    assert len(units) == len(set(units)) == PROCESSES * 5
    assert stores[0].free_own("other", 100) == found[0]  # its own claims, again


def test_what_a_dead_process_has_claimed_comes_back(several, place):
    (living, dead), row = several(count=2)
    living.add_block(row, 0, block_of(4))
    assert len(dead.free_own("other", 4)) == 4
    assert living.free_own("other", 4) == []
    assert living.drop_own("other", [], below=1, keep=()) == 0  # the other KME has those reserved, perhaps
    living._db.execute("UPDATE process SET seen = seen - interval '1 hour' WHERE id = ?", (dead._process.id,))
    assert len(living.free_own("other", 4)) == 4


def test_what_a_process_has_claimed_comes_back_as_soon_as_its_sessions_are_gone(several, place):
    """A KME that is killed and started again is another process: it must not wait for its own claims."""
    (living, dead), row = several(count=2)
    living.add_block(row, 0, block_of(4))
    assert len(dead.free_own("other", 4)) == 4
    assert living.free_own("other", 4) == []
    dead.close()
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = ?"
    end = time.monotonic() + 10
    while living._db.execute(sessions, (f"qvpn-kme {dead._process.id}",)).fetchone()[0]:
        assert time.monotonic() < end, "the server keeps the session"
        time.sleep(0.01)
    assert len(living.free_own("other", 4)) == 4


def test_an_alarm_that_one_process_hears_of_stops_all(several):
    (one, two), row = several(count=2)
    one.add_block(row, 0, block_of(4))
    [unit] = two.free_own("other", 1)
    one.set_alarm("other", "qber: 0.2")
    for call in (
        lambda: two.issue("other", [[unit.key_id]], 256),
        lambda: two.take([("other", [unit.key_id])]),
        lambda: two.reserve("other", TERMS, [Offer(*unit, "t" * 20)], 1.0),
    ):
        with pytest.raises(Alarmed, match=r"0\.2"):
            call()
    one.set_alarm("other", "")
    assert two.issue("other", [[unit.key_id]], 256)


# Epochs


def test_an_epoch_that_one_process_begins_and_ends_is_everybodys(several):
    (one, two), row = several(count=2)
    one.add_block(row, 0, block_of(8))
    first = two.epoch[0]
    one.begin_epoch(5.0)
    two.begin_epoch(5.0)  # knew of the first one only: nothing to do
    assert one.epoch == two.epoch == (first + 1, 5.0)
    while one.rewrap(3):
        pass
    assert two._db.execute("SELECT number FROM epoch").fetchall() == [(first + 1,)]
    two.add_block(row, 1, block_of(2))
    for store in (one, two):
        [unit] = store.free_own("other", 1)
        assert store.issue("other", [[unit.key_id]], 256)


def test_no_row_is_ever_wrapped_under_an_epoch_that_is_gone(several):
    stores, row = several()
    stores[0].add_block(row, 0, block_of(40))
    over = time.monotonic() + 0.1 * ROUNDS

    def turn(store):
        number, taken = stores.index(store), 0
        while time.monotonic() < over:
            if number < 2:
                store.begin_epoch(time.time())
                store.rewrap(10)
            else:
                for unit in store.free_own("other", 1):
                    taken += len(store.issue("other", [[unit.key_id]], 256))
        return taken

    answers = all_at_once(stores, turn)
    errors = [answer for answer in answers if isinstance(answer, Exception)]
    assert not any("damaged" in str(error) or "destroyed" in str(error) for error in errors), errors
    taken = sum(answer for answer in answers[2:] if isinstance(answer, int))
    rest = [store.issue("other", [[u.key_id]], 256) for store in stores for u in store.free_own("other", 100)]
    if not errors:
        assert taken + len(rest) == 40


def test_another_site_key_or_another_kme_is_refused_and_harms_nothing(place):
    with contextlib.closing(place.store("kme")) as store:
        process = place.process("kme")
        with pytest.raises(StoreError, match="another site key"):
            PostgresStore(process, "kme", max_keys=10, site_key=bytes(32))
        with pytest.raises(StoreError, match="store of KME 'kme', not of 'kme-z'"):
            PostgresStore(process, "kme-z", max_keys=10, site_key=bytes(32))
        assert store.epoch[0] == 1


# Doubt


@contextlib.contextmanager
def standby_names(place, names):
    def set_to(statement):
        with place.node.admin() as admin:
            admin.execute(statement)
            admin.execute("SELECT pg_reload_conf()")
        time.sleep(0.1)

    set_to(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    try:
        yield lambda: set_to("ALTER SYSTEM RESET synchronous_standby_names")
    finally:
        set_to("ALTER SYSTEM RESET synchronous_standby_names")


def test_without_a_standby_nothing_is_served_unless_the_operator_says_so(place):
    with pytest.raises(StoreError, match="synchronous_standby_names of the PostgreSQL server is empty"):
        PostgresStore(place.process("kme", require_standby=True), "kme", max_keys=10, site_key=bytes(32))
    with contextlib.closing(place.store("kme")) as store:
        store._process.server.require_standby = True
        with pytest.raises(StoreError, match="synchronous_standby_names"):
            store.free_own("other", 1)
        assert "synchronous_standby_names" in store.health()["trouble"]


def test_while_no_standby_confirms_keys_are_neither_handed_out_nor_burnt(place):
    with contextlib.closing(place.store("kme")) as store:
        row = store.bind_link(LinkRow("other", "link", End.A, Owner.A, Origin.QKD, 0))
        store.add_block(row, 0, block_of(8))
        units = [unit.key_id for unit in store.free_own("other", 8)]
        server = store._process.server
        server.require_standby, server.timeout = True, 0.4
        with standby_names(place, "absent") as released:
            with pytest.raises(StoreError, match="not confirmed"):
                store.issue("other", [[units[0]]], 256)
            for _ in range(5):  # one of those at most is tried, on a row without consequence
                with pytest.raises(StoreError, match=r"confirmed"):
                    store.issue("other", [[units[1]]], 256)
            assert waiting(place) == 0  # nothing is left behind at the server
            assert store.counts("other").own_free == 7
            released()
        server.probed = 0.0
        with pytest.raises(StoreError, match="synchronous_standby_names"):
            store.issue("other", [[units[1]]], 256)
        server.require_standby, server.probed = False, 0.0
        with pytest.raises(KeysNotFound):
            store.issue("other", [[units[0]]], 256)  # its deletion was committed here, so nobody ever gets it
        assert store.issue("other", [[units[1]]], 256)


def test_a_wait_that_the_operator_ends_is_no_confirmation(place):
    """By a cancel, which looks like success; and by emptying the setting, which looks like nothing at all."""
    with contextlib.closing(place.store("kme")) as store:
        row = store.bind_link(LinkRow("other", "link", End.A, Owner.A, Origin.QKD, 0))
        store.add_block(row, 0, block_of(8))
        units = [unit.key_id for unit in store.free_own("other", 8)]
        server = store._process.server
        for unit, how in zip(units, ("cancel", "empty", "terminate"), strict=False):
            server.require_standby, server.timeout, server.doubt = True, 10.0, ""
            with standby_names(place, "absent") as released, ThreadPoolExecutor(1) as thread:
                call = thread.submit(store.issue, "other", [[unit]], 256)
                until(lambda: waiting(place) == 1)
                if how == "empty":
                    released()
                else:
                    with place.node.admin() as admin:
                        admin.execute(
                            f"SELECT pg_{how}_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                        )
                with pytest.raises(StoreError, match="not confirmed, nothing of it is handed out"):
                    call.result(10)
            assert server.doubt
        server.require_standby, server.probed = False, 0.0
        assert store.issue("other", [[units[5]]], 256)
        assert not server.doubt


def waiting(place):
    with place.node.admin() as admin:
        return admin.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'").fetchone()[0]


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_connection_that_broke_while_idle_is_made_again_and_one_in_use_is_an_error(place):
    with contextlib.closing(place.store("kme")) as store:
        row = store.bind_link(LinkRow("other", "link", End.A, Owner.A, Origin.QKD, 0))
        store.add_block(row, 0, block_of(4))

        def terminate():
            with place.node.admin() as admin:
                admin.execute("SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity WHERE usename = 'qvpn'")

        terminate()
        [unit] = store.free_own("other", 1)
        with pytest.raises(StoreError), store._transaction():
            terminate()
            store._db.execute("DELETE FROM key")
        assert store.counts("other").own_free == 4
        assert store.issue("other", [[unit.key_id]], 256)


def test_no_password_in_any_text(place):
    server = Server(place.server("kme").conninfo, "a-secret-that-is-wrong")
    with pytest.raises(StoreError) as caught:
        server.connect()
    assert "authentication" in str(caught.value)
    assert "a-secret" not in str(caught.value) + repr(server)


# check


@pytest.fixture
def configured(place, tmp_path):
    """A site whose configuration names the database, changed."""
    [file, _] = write_pair(tmp_path, SitePlan("alice", "127.0.0.1"), SitePlan("bob", "127.0.0.2"))
    new_site_key(file.with_name("site.key"))
    password = file.with_name("password")
    password.write_text(DATABASE_PASSWORD + "\n")
    password.chmod(0o600)

    def make(*changes):
        table = 'site_key = "site.key"\n[store]\nkind = "postgresql"\npassword = "password"\n'
        table += f'conninfo = "{place.server("kme").conninfo}"\n'
        text = file.read_text().replace('store = "kme-state/kme.sqlite"', table)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        changed = file.with_name("changed.toml")
        changed.write_text(text)
        return load(changed)

    return make


def said(findings):
    return "\n".join(f"{'FAULT' if finding.fault else 'hint'}: {finding.text}" for finding in findings)


def test_check_asks_the_database(configured, place):
    text = said(checks.database(configured()))
    assert f"hint: [store]: PostgreSQL 'qvpn' at {place.node.folder} answers, version 1" in text
    assert "FAULT: [store]: synchronous_standby_names of the PostgreSQL server is empty" in text
    assert "FAULT: [store]: fsync of the server is off" in text  # as it is for these tests
    assert "hint: [store]: synchr" in said(
        checks.database(configured(("[store]", "[store]\nrequire_standby = false")))
    )
    assert "FAULT: [store]: PostgreSQL" in said(checks.database(configured((str(place.node.folder), "/nowhere"))))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[store]", "[store]\nrequire_standby = false"), "hint: [store] require_standby = false: a failover"),
        (('device = "link/device.sock"\n', ""), "hint: [[link]]: this process has no device"),
        (('"password"', '"no-password"'), "no-password: the password of the database: No such file"),
        (('"password"', '"credential:db"'), "[store] password 'credential:db': $CREDENTIALS_DIRECTORY is not set"),
        (("[store]", "[store]\nkind_ = 1"), None),
    ],
)
def test_check_knows_without_asking(configured, monkeypatch, change, says):
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    if says is None:
        with pytest.raises(ConfigError, match="kind_: no such key"):
            configured(change)
        return
    text = said(checks.findings(configured(change), datetime.datetime.now(datetime.UTC)))
    assert says in text
    assert DATABASE_PASSWORD not in text


def test_without_the_extra_it_is_said_what_to_install(configured, monkeypatch):
    config = configured()
    monkeypatch.setitem(sys.modules, "keysource.kme.pgserver", None)
    with pytest.raises(StoreError, match=r"needs the extra qvpn\[postgres\]"):
        stores.open_stores(config)
