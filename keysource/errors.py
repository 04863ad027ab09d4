"""What a key source can say instead of a key.

::

    KeySourceError
    ├── Unavailable        nobody answered, or the answer was "not now" (HTTP 503)
    │   └── Exhausted      reachable, but no key is left for this pair
    ├── UnknownKeyID       the other end's key_ID is not (or no longer) here
    ├── Unauthorized       this SAE may not have the key (HTTP 401 or 403): an alarm, never retried
    ├── BadAnswer          an answer that breaks the protocol: wrong length, not JSON, a key_ID twice
    │   └── RepeatedKey    a key, or a key_ID, that had been delivered before: an alarm
    ├── NotOwner           this end may not issue keys of this link (see ``keysource.base.Owner``)
    ├── RolledBack         local state is older than what the peer has seen of it
    └── BadSettings        the configuration table of this source is wrong

Every message is one sentence for an operator.  None carries key material.
"""

from __future__ import annotations


class KeySourceError(Exception):
    """Base of everything a key source raises on purpose."""


class Unavailable(KeySourceError):
    """No key now.

    ``answered`` tells whether the other side is known to have refused *before* it consumed anything.  Only then
    may the same call be tried once more; after a timeout or a broken connection the key may already be gone,
    so the caller goes on with another key_ID.  ``retry_after`` is in seconds, 0 where nothing was said.
    """

    def __init__(self, message: str, *, answered: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.answered = answered
        self.retry_after = retry_after


class Exhausted(Unavailable):
    """The source works but its stock for this pair is empty."""

    def __init__(self, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message, answered=True, retry_after=retry_after)


class UnknownKeyID(KeySourceError):
    """A key_ID that this end does not hold: never delivered, already taken, or not yet in step."""


class Unauthorized(KeySourceError):
    """The key manager refuses this SAE."""


class BadAnswer(KeySourceError):
    """The other program broke the protocol; whatever it sent is thrown away."""


class RepeatedKey(BadAnswer):
    """The key manager gave a key, or a key_ID, that it had given before; an operator must hear of that."""


class NotOwner(KeySourceError):
    """All keys of this link belong to the other end."""


class RolledBack(KeySourceError):
    """The state on disk is behind what the peer has seen of it (a restored backup or snapshot)."""


class BadSettings(KeySourceError):
    """A wrong table.  ``key`` is the offending key of the table, empty where the whole table is meant."""

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key
