"""A node's audit log: the KME's (:mod:`keysource.kme.audit`), with what a node does.

========================  =================================================================================
``relayed``               a share of these keys passed here, or came to its end: from whom, to whom, which path
``committed``             both ends have the block: origin, trusted nodes, paths
``handed out``            a block went to the device socket; again after a restart where nobody confirmed it
``given up``, ``refused``, ``altered``, ``unconfirmed``, ``behind``  and why
========================  =================================================================================

A key stands there as the SHA-256 of its key_ID, the same as in the KMEs' logs, so that it can be told which nodes a
key came over.  A line is written before anything of what it tells goes out: where it cannot be written the node
stands still, and answers 503.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from keysource.base import KEY_BYTES, derive_key_id
from keysource.kme.audit import Audit, AuditError
from keysource.network.core import Event
from keysource.network.rows import Block

_KINDS = ("relayed", "committed", "given up", "refused", "altered", "unconfirmed", "behind")


class NodeAudit:
    """Events of the logic as lines, in order."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._waiting: deque[Event] = deque()

    def note(self, events: Iterable[Event]) -> None:
        """They are written with the next :meth:`write`."""
        self._waiting += [event for event in events if event.kind in _KINDS]

    def write(self, now: float) -> None:
        """Raises :class:`AuditError`; what was not written waits.  ``now`` in seconds, of any clock."""
        while self._waiting:
            kind, known = self._waiting[0]
            facts = {name: value for name, value in known.items() if name != "keys"}
            if kind == "refused":
                self._audit.refused(facts.pop("reason"), now, **facts)
            else:
                self._audit.write(kind, key_ids(known), **facts)
            self._waiting.popleft()

    def handed_out(self, block: Block) -> None:
        """Raises :class:`AuditError`."""
        facts = block.facts
        names = {"connection": block.connection, "block": block.block, "keys": len(block.keys) // KEY_BYTES}
        said = {"origin": facts.origin.value, "hops": facts.hops, "paths": facts.paths}
        self._audit.write("handed out", key_ids(names), connection=block.connection, block=block.block, **said)


def key_ids(facts: dict[str, Any]) -> list[str]:
    """Those of the block that an event is about; none where it does not say how many."""
    count = facts.get("keys", 0)
    return [derive_key_id(facts["connection"], facts["block"], position) for position in range(count)]


__all__ = ["AuditError", "NodeAudit", "key_ids"]
