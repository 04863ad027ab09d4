"""Stores of an older release, brought up to date with Alembic: one transaction over all steps, or nothing.

The steps are in ``migrations/versions``.  A step finds the :class:`~keysource.kme.vault.Vault` in Alembic's
``config.attributes["vault"]``, since stored keys are wrapped and only the KME can wrap them anew: that is why
``qvpn-kme serve`` runs the steps itself and Alembic's own command line cannot.  A new store starts with today's
tables, and Alembic (with SQLAlchemy) is not even imported.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keysource.kme import crashpoints

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from keysource.kme.vault import Vault

HEAD = "0003"
"""The step that this release writes; a test compares it with the folder."""
STEPS = ("0001", "0002", HEAD)
FOLDER = Path(__file__).with_name("migrations")


def known(revision: str) -> bool:
    """Does this release know this step?"""
    return revision in STEPS


def upgrade(vault: Vault, db: sqlite3.Connection, revision: str) -> bool:
    """Bring an SQLite store up to date; True where it was older.

    Step 0002 wraps what lay there in clear; then the file is written anew, so that no page of it has a key.
    """
    if revision != HEAD:
        _run(vault, db, revision)
        crashpoints.at("migrate.committed")
    if db.execute("SELECT 1 FROM meta WHERE name = 'unclean'").fetchone() is not None:
        db.execute("VACUUM")  # done again where a crash came before the last of these lines
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("DELETE FROM meta WHERE name = 'unclean'")
    return revision != HEAD


def _run(vault: Vault, db: sqlite3.Connection, revision: str) -> None:
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import StaticPool

    engine = create_engine("sqlite://", creator=lambda: db, poolclass=StaticPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver begins nothing by itself

    with engine.connect() as connection, connection.begin():
        _steps(vault, connection, revision)
        crashpoints.at("migrate.in-transaction")


def _steps(vault: Vault, connection: Connection, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    attributes: dict[str, Any] = {"connection": connection, "vault": vault, "from": revision}
    config = Config(attributes=attributes)
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    command.upgrade(config, HEAD)
