"""``extension_mandatory`` and ``extension_optional`` (ETSI GS QKD 014 V1.1.1 clause 6.2): what we know of them.

``qvpn_origin``
    an origin, or a list of them: no key may be of another (``"qkd"``, ``["qkd", "relayed"]``)
``qvpn_max_hops``
    the most trusted nodes that a key may have passed

As mandatory they are met or the request is refused; as optional they are ignored, as the standard allows.
"""

from __future__ import annotations

from collections.abc import Sequence

from keysource.base import Origin
from keysource.etsi014.messages import Extension
from keysource.kme.records import ANY, Wanted

ORIGIN, MAX_HOPS = "qvpn_origin", "qvpn_max_hops"
_MOST_NAMED = 16


class BadExtension(Exception):
    """A known extension with a value that it cannot have; one sentence."""


def unknown(extensions: Sequence[Extension]) -> list[str]:
    """Names that this KME does not know, each at most 64 characters and not too many of them."""
    names = [name for extension in extensions for name in extension if name not in (ORIGIN, MAX_HOPS)]
    return [name[:64] for name in names[:_MOST_NAMED]]


def wanted(extensions: Sequence[Extension]) -> Wanted:
    """What the known ones ask for, all at once.  Raises :class:`BadExtension`."""
    origins, max_hops = set(ANY.origins), ANY.max_hops
    for extension in extensions:
        if ORIGIN in extension:
            origins &= _origins(extension[ORIGIN])
        if MAX_HOPS in extension:
            max_hops = min(max_hops, _hops(extension[MAX_HOPS]))
    return Wanted(tuple(origin for origin in Origin if origin in origins), max_hops)


def _origins(value: object) -> set[Origin]:
    names = value if isinstance(value, list) else [value]
    try:
        return {Origin(str(name)) for name in names}
    except ValueError:
        raise BadExtension(f"{ORIGIN} is one of {', '.join(Origin)}, or a list of them") from None


def _hops(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadExtension(f"{MAX_HOPS} is a number from 0 on")
    return value
