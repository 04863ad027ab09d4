"""What can go wrong in a benchmark; each message is one sentence for the user."""

from __future__ import annotations


class BenchError(Exception):
    """A measurement could not be made, or its result cannot be trusted."""


class Unbalanced(BenchError):
    """The daemon's own counters do not add up: a packet was opened or written without its check, or the reverse."""
