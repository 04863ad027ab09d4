"""What can go wrong in the network.

::

    NetworkError
    ├── TopologyError     a map or a node's file is wrong; names file, table and key
    ├── NoRoute           too few disjoint paths with enough key
    ├── TooFew            a link has fewer own units than a hop costs
    ├── Lacking           a pad that the other end names is not here
    └── NotAuthentic      a tag, share or confirmation is wrong

Every message is one sentence; none carries key material.
"""

from __future__ import annotations


class NetworkError(Exception):
    """Base of all of them."""


class TopologyError(NetworkError):
    """Nothing was started."""


class NoRoute(NetworkError):
    """No key now; a link may come back, or get more key."""


class TooFew(NetworkError):
    """Nothing was drawn."""


class Lacking(NetworkError):
    """Nothing was spent.  The other end can tell from the two numbers which of its units are of no use.

    ``first_block``: here is no free unit of the other end in any block below.
    ``next_block``: all blocks below were received here.
    """

    def __init__(self, first_block: int, next_block: int) -> None:
        super().__init__("units that the other end names are not here")
        self.first_block, self.next_block = first_block, next_block


class NotAuthentic(NetworkError):
    """It was thrown away."""
