"""Alembic runs this: on the connection, and in the transaction, of :mod:`keysource.kme.migrate`."""

from __future__ import annotations

from alembic import context

attributes = context.config.attributes
context.configure(connection=attributes["connection"], transactional_ddl=True)
if not context.get_context().get_current_heads():  # a file from before this table
    context.get_context().stamp(context.script, attributes["from"])
context.run_migrations()
