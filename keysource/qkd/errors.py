"""What can go wrong on a link.

::

    KeySourceError
    └── LinkError              base of what this package raises on purpose
        ├── LinkSettings       the configuration is wrong
        ├── BadFrame           the other end (or whoever stands between) broke the protocol
        ├── Disagreement       both ends have the pad, but their configurations differ
        ├── Forged             a tag of the transcript does not fit: nothing of this block may be used
        ├── PeerLost           connection gone or silent
        └── Fatal              the process must end: nothing here heals by itself
            ├── PadEmpty       no authentication key is left
            ├── BadRandomness  the random number generator failed its health test, or is gone
            ├── StateLost      the state cannot be written
            └── RolledBackLink our state is older than what the peer has seen of it
"""

from __future__ import annotations

from keysource.errors import KeySourceError


class LinkError(KeySourceError):
    """Base."""


class LinkSettings(LinkError):
    """One sentence with file, table and key."""


class BadFrame(LinkError):
    """A frame that does not belong here."""


class Disagreement(LinkError):
    """The two configurations do not fit."""


class Forged(LinkError):
    """Authentication failed."""


class PeerLost(LinkError):
    """Nobody there."""


class Fatal(LinkError):
    """Ends the process with its sentence."""


class StateLost(Fatal):
    """Without a state on disk nothing may be used."""


class PadEmpty(Fatal):
    """The pre-shared pad is used up."""


class BadRandomness(Fatal):
    """A generator that is broken chooses nothing for this link."""


class RolledBackLink(Fatal):
    """State restored from a backup: it would use pad twice."""
