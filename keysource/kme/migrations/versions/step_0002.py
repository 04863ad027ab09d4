"""Key bytes are wrapped; keys that wait for slaves have a table of their own, with a row for each slave.

Everything here is as it was in that release: what later ones changed is in their steps.
"""

from __future__ import annotations

from alembic import context, op

revision = "0002"
down_revision = "0001"
_UNIT_BITS = 256
_TABLES = (
    """CREATE TABLE key (key_id TEXT PRIMARY KEY, peer TEXT NOT NULL, own INTEGER NOT NULL, block INTEGER NOT NULL,
    position INTEGER NOT NULL, origin TEXT NOT NULL, hops INTEGER NOT NULL, epoch INTEGER NOT NULL,
    material BLOB NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX key_order ON key (peer, own, block, position)",
    "CREATE INDEX key_epoch ON key (epoch)",
    """CREATE TABLE delivery (key_id TEXT NOT NULL, slave TEXT NOT NULL, master TEXT NOT NULL, peer TEXT NOT NULL,
    size INTEGER NOT NULL, origin TEXT NOT NULL, hops INTEGER NOT NULL, epoch INTEGER NOT NULL, material BLOB,
    token TEXT NOT NULL, since REAL NOT NULL, PRIMARY KEY (key_id, slave)) WITHOUT ROWID""",
    "CREATE INDEX delivery_peer ON delivery (peer)",
    "CREATE INDEX delivery_since ON delivery (since)",
    "CREATE INDEX delivery_epoch ON delivery (epoch)",
)
_OLD = "SELECT key_id, peer, own, block, position, origin, hops, material, master, slave, token, since FROM key_v0"


def unit_label(key_id: str, peer: str, own: int) -> bytes:
    """As that release had it."""
    return "\0".join(("unit", key_id, peer, str(own))).encode()


def delivery_label(key_id: str, slave: str, master: str) -> bytes:
    """As that release had it."""
    return "\0".join(("delivery", key_id, slave, master)).encode()


def upgrade() -> None:
    """One table in clear -> two tables, wrapped."""
    vault, db = context.config.attributes["vault"], op.get_bind()
    for index in ("key_order", "key_since"):
        op.execute(f"DROP INDEX IF EXISTS {index}")
    op.execute("ALTER TABLE key RENAME TO key_v0")
    for table in _TABLES:
        op.execute(table)
    for row in db.exec_driver_sql(_OLD).fetchall():
        key_id, peer, own, block, position, origin, hops, material, master, slave, token, since = row
        if master is None:
            sealed = vault.seal(unit_label(key_id, peer, own), material)
            values = (key_id, peer, own, block, position, origin, hops, *sealed)
            db.exec_driver_sql("INSERT INTO key VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        else:
            sealed = vault.seal(delivery_label(key_id, slave, master), material)
            waiting = (key_id, slave, master, peer, _UNIT_BITS, origin, hops, *sealed, token, since)
            db.exec_driver_sql("INSERT INTO delivery VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", waiting)
    op.execute("DROP TABLE key_v0")
    op.execute("INSERT INTO meta VALUES ('unclean', 'keys lay here in clear')")
