"""What the parts of a node share: the map, the disk, the state of the links, and what is to go out.  No I/O here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from keysource.network.messages import Message
from keysource.network.store import NodeStore
from keysource.network.topology import LinkEntry, Topology

# Implementation constants, in seconds.
HOP_RETRY = 1.0
"""A share that was not acknowledged goes again, under a new pad."""
HOP_ATTEMPTS = 4
LACKING_WAIT = 0.25
"""The next node did not have the pad's units (yet)."""
KEPT = 30.0
"""What a node remembers of a share that passed."""
RESEND = 1.0
"""Open, Ready and Proof are repeated until something comes back."""
ARRIVAL = 6.0
"""All shares are at the target so soon after Open, or it says which is missing."""
GIVE_UP = 12.0
"""The initiator's patience up to the target's proof."""
DECIDED = 60.0
"""The target's patience from its proof to the commit."""
MOST_KEPT = 1024
"""Shares that a node remembers at once."""


class Event(NamedTuple):
    """Something for log, status and audit: a word and facts, nothing secret."""

    kind: str
    facts: dict[str, Any]


@dataclass(slots=True)
class LinkState:
    """The device at our end of a link, now."""

    entry: LinkEntry
    up: bool = False
    alarm: str = ""
    qber: float | None = None
    key_rate: float | None = None
    trouble: str = "the device was not reached yet"
    compared: bool = False
    """The other end has said, since this node started, how far it saw us use our units, and we are not behind."""
    behind: bool = False
    """We are: the store was restored from a backup, and would use pads twice."""


@dataclass(slots=True)
class Fault:
    """A node that does on order what a bought one would do in secret.

    ``copied`` gets every share that passes, as far as this node can read it; ``alter`` changes it.
    """

    copied: Callable[[dict[str, Any], bytes], None] = lambda _header, _share: None
    received: Callable[[dict[str, Any], bytes], None] = lambda _header, _masked: None
    corrupt: bool = False
    """Started as one: only then it takes orders."""
    alter: bool = False
    swallow: bool = False


@dataclass(slots=True)
class Core:
    """See the module."""

    name: str
    topology: Topology
    store: NodeStore
    links: dict[str, LinkState]
    random: Callable[[int], bytes] = os.urandom
    fault: Fault = field(default_factory=Fault)
    outgoing: list[tuple[str, Message]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def send(self, to: str, message: Message) -> None:
        self.outgoing.append((to, message))

    def tell(self, kind: str, **facts: Any) -> None:
        self.events.append(Event(kind, facts))
