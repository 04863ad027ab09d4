"""The first release: one table of keys, in clear.  Nothing to do: such a file is only ever found, never made."""

from __future__ import annotations

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Where everything starts."""
