"""The wrapping of a row covers its origin and hops too (and, of a waiting key, the link and the size).

Before, whoever could write to the file could pass a simulated key off as one of a quantum link.  What a row says now
is what it is wrapped with now; a row that cannot be unwrapped is deleted, as it would be when it is asked for.
``user_version`` goes to 3 for good: the step is in Alembic's table from here on.
"""

from __future__ import annotations

from alembic import context, op

from keysource.kme.migrations.versions.step_0002 import delivery_label as old_delivery_label
from keysource.kme.migrations.versions.step_0002 import unit_label as old_unit_label

revision = "0003"
down_revision = "0002"


def unit_label(key_id: str, peer: str, own: int, origin: str, hops: int) -> bytes:
    """As this release has it."""
    return "\0".join(("unit 3", key_id, peer, str(own), origin, str(hops))).encode()


def delivery_label(key_id: str, slave: str, master: str, peer: str, size: int, origin: str, hops: int) -> bytes:
    """As this release has it."""
    return "\0".join(("delivery 3", key_id, slave, master, peer, str(size), origin, str(hops))).encode()


def upgrade() -> None:
    """Every wrapped row anew."""
    _units()
    _waiting()
    op.execute("PRAGMA user_version=3")


def _units() -> None:
    vault, db = context.config.attributes["vault"], op.get_bind()
    columns = "key_id, peer, own, origin, hops, epoch, material"
    for key_id, peer, own, origin, hops, epoch, blob in db.exec_driver_sql(f"SELECT {columns} FROM key").fetchall():
        new = unit_label(key_id, peer, own, origin, hops)
        sealed = vault.resealed(epoch, old_unit_label(key_id, peer, own), blob, new)
        if sealed is None:
            db.exec_driver_sql("DELETE FROM key WHERE key_id = ?", (key_id,))
        else:
            db.exec_driver_sql("UPDATE key SET epoch = ?, material = ? WHERE key_id = ?", (*sealed, key_id))


def _waiting() -> None:
    vault, db = context.config.attributes["vault"], op.get_bind()
    columns = "key_id, slave, master, peer, size, origin, hops, epoch, material"
    query = f"SELECT {columns} FROM delivery WHERE material IS NOT NULL"
    for key_id, slave, master, peer, size, origin, hops, epoch, blob in db.exec_driver_sql(query).fetchall():
        new = delivery_label(key_id, slave, master, peer, size, origin, hops)
        sealed = vault.resealed(epoch, old_delivery_label(key_id, slave, master), blob, new)
        if sealed is None:
            db.exec_driver_sql("DELETE FROM delivery WHERE key_id = ?", (key_id,))
        else:
            where = "WHERE key_id = ? AND slave = ?"
            values = (*sealed, key_id, slave)
            db.exec_driver_sql(f"UPDATE delivery SET epoch = ?, material = ? {where}", values)
