"""Secrets that can be forgotten: what is overwritten is gone, also from under a database that forgets nothing."""

from __future__ import annotations

import contextlib
import threading

import pytest
from cryptography.exceptions import InvalidTag

from keysource.base import End, Origin, Owner
from keysource.kme.postgres import PostgresStore, Process, SharedEpochs
from keysource.kme.records import LinkRow, StoreError
from keysource.kme.schema import unit_label
from keysource.kme.slots import Slots
from tests.kme.places import SITE_KEY, PostgresPlace


@pytest.fixture
def slots(tmp_path):
    with contextlib.closing(Slots(tmp_path / "slots")) as slots:
        yield slots


def test_a_secret_is_there_until_it_is_forgotten_and_then_nowhere_in_the_file(slots):
    for number in (1, 2, 3):
        slots.make(number)
    secrets = [slots.secret(number) for number in (1, 2, 3)]
    assert len(set(secrets)) == 3 and all(len(secret) == 32 for secret in secrets)
    slots.forget(3, keep=[2])
    assert [slots.secret(number) for number in (1, 2, 3)] == [None, *secrets[1:]]
    content = slots.path.read_bytes()
    assert secrets[0] not in content and secrets[1] in content
    assert slots.path.stat().st_mode & 0o777 == 0o600


def test_a_number_made_again_overwrites_what_it_had(slots):
    slots.make(7)
    first = slots.secret(7)
    slots.make(7)
    assert slots.secret(7) != first
    assert first not in slots.path.read_bytes()


def test_another_process_sees_it_and_a_torn_slot_is_none(slots):
    slots.make(1)
    with contextlib.closing(Slots(slots.path)) as other:
        assert other.secret(1) == slots.secret(1)
        with slots.path.open("r+b") as file:
            file.seek(64 + 20)
            file.write(b"torn")
        assert other.secret(1) is None
        other.make(1)
        assert slots.secret(1) == other.secret(1) is not None


def test_many_at_once_lose_nothing(slots):
    """Each with a file of its own, as processes have; sixty-four fit and not one more."""

    def make(start):
        with contextlib.closing(Slots(slots.path)) as mine:
            for number in range(start, start + 16):
                mine.make(number)

    threads = [threading.Thread(target=make, args=(1 + 16 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({slots.secret(number) for number in range(1, 65)} - {None}) == 64
    with pytest.raises(StoreError, match="64 epochs are alive"):
        slots.make(65)


def test_a_file_that_is_something_else_is_refused(tmp_path):
    file = tmp_path / "slots"
    file.write_bytes(b"qvpn-kme epochs 1".ljust(4200, b"\0"))
    file.chmod(0o600)
    with pytest.raises(StoreError, match="not a file of epoch keys of a PostgreSQL store"):
        Slots(file)
    file.chmod(0o644)
    with pytest.raises(StoreError, match="mode 0600"):
        Slots(file)


def test_a_copy_of_the_database_and_the_site_key_give_nothing_of_an_epoch_that_ended(postgres, tmp_path):
    place = PostgresPlace(postgres)
    server = place.server("kme")
    with (
        contextlib.closing(Slots(tmp_path / "slots")) as slots,
        contextlib.closing(
            PostgresStore(Process(server, slots=slots), "kme", max_keys=100, site_key=SITE_KEY, now=1.0)
        ) as store,
    ):
        row = store.bind_link(LinkRow("other", "link", End.A, Owner.A, Origin.QKD, 0))
        store.add_block(row, 0, bytearray(range(64)))
        columns = "SELECT key_id, own, origin, hops, epoch, material FROM key ORDER BY position"
        copied = store._db.execute(columns).fetchall()
        epochs = store._db.execute("SELECT number, begun, wrapped FROM epoch").fetchall()

        def thief(file):
            """Whoever has the site key, a copy of the database of then, and this file."""
            found = SharedEpochs(store._db, SITE_KEY, "kme", file)
            [(number, begun, wrapped)] = epochs
            cipher = found.read_key(number, begun, wrapped)
            key_id, own, origin, hops, _epoch, blob = copied[0]
            return cipher.decrypt(blob[:12], blob[12:], unit_label(key_id, "other", own, origin, hops))

        assert thief(slots) == bytes(range(32))  # while the epoch lives that is enough
        with pytest.raises(InvalidTag):
            thief(None)  # the site key alone never was
        store.begin_epoch(2.0)
        while store.rewrap():
            pass
        assert store.epoch[0] == 2
        with pytest.raises(InvalidTag):
            thief(slots)
        [one, _two] = store.free_own("other", 2)
        [key] = store.issue("other", [[one.key_id]], 256)
        assert bytes(key.material) == bytes(range(32))


def test_a_process_without_the_file_says_so_and_an_older_database_takes_one_up(postgres, tmp_path):
    place = PostgresPlace(postgres)
    server = place.server("kme")
    with contextlib.closing(PostgresStore(Process(server), "kme", max_keys=9, site_key=SITE_KEY, now=1.0)) as plain:
        row = plain.bind_link(LinkRow("other", "link", End.A, Owner.A, Origin.QKD, 0))
        plain.add_block(row, 0, bytearray(range(64)))
    with (
        contextlib.closing(Slots(tmp_path / "slots")) as slots,
        contextlib.closing(
            PostgresStore(Process(server, slots=slots), "kme", max_keys=9, site_key=SITE_KEY, now=2.0)
        ) as store,
    ):
        assert store.epoch[0] == 1  # begun before there was a file
        store.begin_epoch(2.0)
        while store.rewrap():
            pass
        assert slots.secret(2) is not None
        [one, _two] = store.free_own("other", 2)
        assert bytes(store.issue("other", [[one.key_id]], 256)[0].material) == bytes(range(32))
    with pytest.raises(StoreError, match="another file of epoch_keys"):
        PostgresStore(Process(server), "kme", max_keys=9, site_key=SITE_KEY)
